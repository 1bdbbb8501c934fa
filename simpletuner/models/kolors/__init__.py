"""Kolors."""
