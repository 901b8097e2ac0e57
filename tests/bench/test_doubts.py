"""Cells whose times are doubtful: found, measured again, and said."""

from __future__ import annotations

import copy

import pytest

from bench import report, suite
from bench.cases import Size, Task
from bench.doubts import doubts, raise_limit
from bench.suite import Plan


def times(lowest: float, seconds: float, highest: float, spread: float, samples: int = 9) -> dict:
    return {
        "seconds": seconds,
        "lowest": lowest,
        "highest": highest,
        "spread": spread,
        "samples": samples,
    }


def cell(**changes) -> dict:
    row = {
        "status": "ok",
        "picture": times(0.95, 1.0, 1.1, 0.1, 3),
        "step": times(0.1, 0.2, 0.9, 0.02),  # one step was slow
        "share_of_limit": 0.3,
        "share_of_limit_step": 0.35,
    }
    other = {"status": "failed", "why": "no memory"}
    return {"contenders": {"omnigen_fast": {**row, **changes}, "diffusers": other}}


def test_a_steady_cell():
    assert doubts(cell()) == []
    assert doubts(cell(picture=times(0.9, 1.0, 1.09, 0.1))) == []  # 19 %
    assert doubts(cell(step=times(0.1, 0.2, 0.9, 0.9, samples=2))) == []  # too few for quartiles


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        (
            {"picture": times(0.9, 1.0, 1.11, 0.1)},
            "omnigen_fast's pictures spread over 21% of their median",
        ),
        (
            {"step": times(0.1, 0.2, 0.9, 0.05)},
            "omnigen_fast's steps spread over 25% of their median",
        ),
        ({"share_of_limit_step": 1.04}, "104% of the limit, which was measured too low"),
    ),
)
def test_a_doubtful_cell(changes, said):
    assert doubts(cell(**changes)) == [said]


def test_a_higher_limit_is_that_of_all_cells():
    result = {"limits": {"product_flops_per_second": 1e12}, "cells": [cell()]}
    raise_limit(result, 0.5e12)
    assert result["limits"]["product_flops_per_second"] == 1e12
    raise_limit(result, 2e12)
    assert result["limits"]["product_flops_per_second"] == 2e12
    ours = result["cells"][0]["contenders"]["omnigen_fast"]
    assert (ours["share_of_limit"], ours["share_of_limit_step"]) == (0.15, 0.175)


STEADY, SPREAD = cell(), cell(picture=times(0.5, 1.0, 1.5, 0.1))
OVER = cell(share_of_limit=1.2)


@pytest.mark.parametrize(
    ("measured", "kept", "warnings"),
    (
        ([STEADY], 0, 0),
        ([SPREAD, STEADY], 1, 0),
        ([SPREAD, SPREAD], 1, 1),
        ([SPREAD, cell(picture=times(0.5, 1, 1.5, 0.1), share_of_limit=1.2)], 0, 1),
        ([OVER, OVER], 1, 1),
    ),
)
def test_a_doubtful_cell_is_measured_again(monkeypatch, measured, kept, warnings):
    import torch

    left, said = [copy.deepcopy(one) for one in measured], []
    made = list(left)
    monkeypatch.setattr(suite, "_cell", lambda *_: left.pop(0))
    rates = []

    def limits(*_):
        rates.append(3e12)
        return type("", (), {"flops_per_second": 3e12})

    monkeypatch.setattr(suite, "measure_limits", limits)
    plan = Plan("random:tiny", torch.device("cpu"), ((Size(64, 64), 0),), 3)
    result = {"limits": {"product_flops_per_second": 1e12}, "cells": []}
    task = Task(Size(64, 64), 0, 3)
    found = suite._steady_cell(plan, task, None, {}, result, said.append)
    assert found is made[kept] and not left
    assert len(found["warnings"]) == warnings and found.get("repeated", False) == (len(made) > 1)
    assert [line for line in said if line.startswith("warning: ")] == said
    assert len(said) == (len(made) > 1) + bool(warnings)
    assert len(rates) == (measured[0] is OVER)


def test_the_report_says_what_stayed_doubtful():
    one = {"size": "512 px", "setting": "default", "column": "text", "warnings": ["a", "b"]}
    assert report._warnings({"cells": [one, {}]}) == [
        "Warning: 512 px, default, text: a.",
        "Warning: 512 px, default, text: b.",
    ]
