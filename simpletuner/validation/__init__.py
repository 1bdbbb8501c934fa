"""Images from live weights: which to generate, generating them, and the sheets that compare them."""
