"""Hunyuan-DiT."""
