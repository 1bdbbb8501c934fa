"""Where a dataset's files are."""
