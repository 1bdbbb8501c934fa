"""Sana."""
