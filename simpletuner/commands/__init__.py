"""What each verb of the command line does; `cli` only reads arguments and calls these."""
