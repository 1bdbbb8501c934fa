"""Facts of model families: data that is read without torch, and that the configuration is checked against."""
