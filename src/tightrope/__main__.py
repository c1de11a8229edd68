"""`python -m tightrope`: the command line."""

from tightrope.cli import main

main()
