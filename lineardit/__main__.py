"""`python -m lineardit` is the command `lineardit`."""

from .cli import main

main()
