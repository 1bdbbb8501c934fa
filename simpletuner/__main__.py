"""`python -m simpletuner`."""

from simpletuner.cli import main

main()
