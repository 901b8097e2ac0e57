"""`python -m bench`: the same as `omnigen-fast bench`, where nothing is installed."""

from .commands import bench

bench(prog_name="python -m bench")
