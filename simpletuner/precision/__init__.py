"""Frozen weights in few bits: how they are packed, the layer that computes with them, and putting it into a model."""
