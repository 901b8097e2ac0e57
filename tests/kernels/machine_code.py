"""Machine code of the cases that a file's tests ask for, compiled in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

_T = TypeVar("_T")
_ROOT = Path(__file__).parents[2]
_PROCESSES = 2
_FEW = 40  # cases, which one process compiles: the second would take as long to start
_SECONDS = 1500


def compile_selected(
    request: pytest.FixtureRequest, module: str, read: Callable[[dict[str, Any]], _T]
) -> dict[str, _T | str]:
    """By their ids, what `read` makes of each case's code, or the error.

    Args:
        request: of a fixture; its tests take it as "compiled" and a `case` each.
        module: run with ids, it prints a line of JSON for each (`ahead.report`).
        read: of the fields that it prints.
    """
    tests = [one for one in request.session.items if one.path == request.path]
    ids = sorted(
        {one.callspec.params["case"].id for one in tests if "compiled" in one.fixturenames}
    )
    processes = _PROCESSES if len(ids) > _FEW else 1
    # a process that interprets can't compile
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", module, *ids[part::processes]],
            cwd=_ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for part in range(processes)
    ]
    results: dict[str, _T | str] = {}
    for worker in workers:
        out, err = worker.communicate(timeout=_SECONDS)
        assert worker.returncode == 0, err
        for line in map(json.loads, out.splitlines()):
            code = line.get("compiled")
            results[line["id"]] = read(code) if code else line["error"]
    return results
