"""`python -m omnigen_fast.cli`."""

from .main import main

main(prog_name="omnigen-fast")
