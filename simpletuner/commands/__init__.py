"""What each verb of the command line does; `cli.py` only reads arguments and calls these."""
