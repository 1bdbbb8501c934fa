"""OmniGen (arXiv 2409.11340): text and image tokens in one causal transformer, no text encoder."""
