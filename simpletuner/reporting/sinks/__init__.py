"""Where events go: the terminal, `metrics.jsonl`, TensorBoard. A sink's own packages are imported when it needs them."""
