"""What is computed once and kept: tensors by content, latents, prompt embeddings."""
