"""`python -m hetserve` is the `hetserve` command."""

from hetserve.cli import main

main()
