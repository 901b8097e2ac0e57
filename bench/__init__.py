"""Benchmarks. Each script says what it measured on, and refuses to print times of wrong results.

`python -m bench.NAME` in the repository's root, whether the package is installed or not.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import omnigen_fast

if find_spec("omnigen_fast.kernels") is None:  # lies beside the package in the repository
    omnigen_fast.__path__.append(str(Path(__file__).parents[1]))
