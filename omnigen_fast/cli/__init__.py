"""The command line; `main` is `omnigen-fast`."""

from .main import main

__all__ = ["main"]
