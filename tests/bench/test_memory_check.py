"""The check of measured peaks against the estimate, with a GPU and without."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from golden_cases import TINY

from bench import common, memory_check
from omnigen_fast import OmniGenPipeline
from omnigen_fast.memory.overview import Report

ARGUMENTS = [str(TINY), "--side", "64", "--steps", "1", "--settings", "kv,kv+separate"]


def test_a_cpu_measures_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    assert memory_check.main(ARGUMENTS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all("'not measured'" in line for line in lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow_for("1.05-0")
@pytest.mark.parametrize(("factor", "status"), [(1.05, 0), (1.2, 1)])
def test_a_wrong_estimate_is_found(monkeypatch, tmp_path, factor, status):
    """An allocator that reserved so many times what was predicted."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)

    last_report = OmniGenPipeline.last_report

    def measured(pipe: OmniGenPipeline) -> Report:
        report = last_report.__get__(pipe)
        return replace(report, measured_bytes=round(factor * report.predicted.peak_bytes))

    monkeypatch.setattr(OmniGenPipeline, "last_report", property(measured))
    monkeypatch.setattr(memory_check, "context_bytes", lambda: 0)
    assert memory_check.main(ARGUMENTS) == status
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert [row["status"] for row in rows] == ["missed" if status else "ok"] * 6
    assert torch.tensor([row["error"] for row in rows]).mean().item() == pytest.approx(
        1 / factor - 1, abs=1e-3
    )
