"""Uploads to the Hugging Face Hub: what is checked before a run, the model card, and the thread that uploads."""
