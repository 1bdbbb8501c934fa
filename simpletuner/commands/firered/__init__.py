"""Command lines of FireRed-Image-Edit's training, read as work of this program: embeddings first, then a run."""
