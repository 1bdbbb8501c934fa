"""Datasets: which images there are, what each one becomes, and in which order they are seen."""
