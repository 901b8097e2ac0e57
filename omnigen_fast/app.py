"""`python -m omnigen_fast.app`: the command line's `app`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    main(["app", *sys.argv[1:]], prog_name="omnigen-fast")
