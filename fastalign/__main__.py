"""`python -m fastalign` is the command `fastalign`."""

from .cli import main

main()
