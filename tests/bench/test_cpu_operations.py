"""The benches of a CPU: what they print and compare, on the smallest of everything."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from omnigen_fast.kernels import cpu, ops, widened

from bench import common, cpu_operations, cpu_peer
from omnigen_fast.compilation import compiler

pytestmark = pytest.mark.early


@pytest.mark.skipif(
    cpu.why_not() is not None or compiler() is None, reason="nothing can be compiled here"
)
def test_operations(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu, "_libraries", {})
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(cpu_operations, "_ATTENTIONS", ((64, 10),))
    monkeypatch.setattr(cpu_operations, "_ROWS", 16)
    monkeypatch.setattr(cpu_operations, "product_rate", lambda rounds: 1e12)
    monkeypatch.setattr(sys, "argv", ["bench", "--rounds", "1", "--pictures", "0"])
    threads = torch.get_num_threads()
    try:
        assert cpu_operations.main() == 0
    finally:
        torch.set_num_threads(threads)
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert len(result["operations"]) == len(lines) == 9
    for row in result["operations"]:
        assert row["reference"] > 0 and row["cpp"] > 0
    assert result["operations"][0]["flops"] == 4 * 64 * 74 * 8 * 96
    assert json.loads(next(tmp_path.glob("cpu-operations-*.json")).read_text()) == result


def test_operations_run_in_turns():
    seen = []
    found = cpu_operations.in_turns(lambda: seen.append(ops.choice().kernels), 2)
    assert seen == ["reference", "cpp"] * 3 and set(found) == {"reference", "cpp"}


@pytest.mark.parametrize("faster", (True, False))
def test_plain_is_in_the_dtype_that_is_given(monkeypatch, faster):
    seen, dtype = [], torch.bfloat16
    monkeypatch.setattr(widened, "_decided", {dtype: faster})
    cpu_operations.in_turns(lambda: seen.append(widened.faster(dtype)), 1)
    assert seen == [False, faster] * 2 and widened.faster(dtype) is faster


def test_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setattr(cpu_operations, "compiler", lambda: None)
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert cpu_operations.main() == 1
    assert capsys.readouterr().err == "nothing can be compiled here: there is no C++ compiler\n"


@pytest.mark.parametrize(("ratios", "status"), (((2.0, 4.1, 6.5), 0), ((2.0, 3.9, 6.5), 1)))
def test_targets(monkeypatch, capsys, tmp_path, ratios, status):
    def run(plan, record, say):
        assert plan.peers == ("diffusers",) and len(plan.cells) == 3
        record.result["cells"] = [
            {
                "size": str(size),
                "column": str(column),
                "contenders": {
                    "diffusers": {"status": "ok", "picture_ratio": ratio, "step_ratio": 1}
                },
            }
            for (size, column), ratio in zip(plan.cells, ratios)
        ]

    monkeypatch.setattr(cpu_peer, "run", run)
    monkeypatch.setattr(cpu_peer, "RESULTS", tmp_path)
    monkeypatch.setattr(cpu_peer, "build_seconds", lambda: 1.5)
    monkeypatch.setattr(sys, "argv", ["bench"])
    assert cpu_peer.main() == status
    out = capsys.readouterr().out
    assert "compiling takes 1.5 s, once" in out and ("missed" in out) == bool(status)
