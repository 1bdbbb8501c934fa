"""Mathematics only: tensors and numbers in, tensors out; no configuration, no models, no files."""
