"""Pictures from live weights: which to draw, drawing them, and the sheets that compare them."""
