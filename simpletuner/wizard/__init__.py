"""`simpletuner configure`: a few questions, then both files, right; existing files are opened and edited."""
