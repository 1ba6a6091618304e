"""`python -m eventwatch`."""

from eventwatch.cli import main

main()
