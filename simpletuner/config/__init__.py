"""Configuration: one declaration per option, read from files, environment and command line. Imports no torch."""
