"""Where the kernels run in these tests: on the GPU if there is one, else in Triton's interpreter.

The interpreter must be asked for before triton is first imported, and then holds for the whole
process; what compiles kernels does so in processes of its own (`bench/kernels/ahead.py`).
"""

from __future__ import annotations

import interpreter
import torch

if not torch.cuda.is_available():
    interpreter.start()


def pytest_terminal_summary(terminalreporter) -> None:
    table = getattr(terminalreporter.config, "compiled_table", None)
    if table:
        terminalreporter.section("kernels compiled ahead of time")
        terminalreporter.write_line(table)
