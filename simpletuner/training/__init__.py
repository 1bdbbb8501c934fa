"""The shared trainer: the same loop for every family, adapter and dataset."""
