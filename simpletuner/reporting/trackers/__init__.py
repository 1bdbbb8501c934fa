"""Dashboards beside the files that every run writes: W&B, and classes of one's own."""
