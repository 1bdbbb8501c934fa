"""OmniGen (arXiv 2409.11340): text and picture tokens in one causal transformer, no text encoder."""
