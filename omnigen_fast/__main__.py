"""`python -m omnigen_fast`: the command line."""

from .cli.main import main

main(prog_name="omnigen-fast")
