"""`python -m retrieval`."""

from .cli import main

main()
