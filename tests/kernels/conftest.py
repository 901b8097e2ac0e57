"""Where the kernels run in these tests: on the GPU if there is one, else in Triton's interpreter.

The interpreter must be asked for before triton is first imported, and then holds for the whole
process; what compiles kernels does so in processes of its own (`bench/kernels/ahead.py`).
"""

from __future__ import annotations

import interpreter
import pytest
import torch

if not torch.cuda.is_available():
    interpreter.start()


@pytest.fixture(autouse=True)
def _in_its_own_dtype(monkeypatch) -> None:
    """Plain PyTorch multiplies in the dtype given, so kernels meet the same bounds everywhere."""
    from omnigen_fast.kernels import widened  # not before the interpreter is asked for

    monkeypatch.setattr(widened, "faster", lambda dtype: False)


def pytest_terminal_summary(terminalreporter) -> None:
    table = getattr(terminalreporter.config, "compiled_table", None)
    if table:
        terminalreporter.section("kernels compiled ahead of time")
        terminalreporter.write_line(table)
