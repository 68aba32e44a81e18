"""`python -m lorax_kit`: the command line."""

from lorax_kit.cli import main

main()
