"""`python -m holdfast`."""

from holdfast.cli.app import main

main()
