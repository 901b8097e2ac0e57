"""Whole calls on a GPU that is not there; `fake_device` lists what is checked of each."""

from __future__ import annotations

import pytest
from fake_calls import CASES, MARKS, STEPS, carry_out
from fake_device import FakeGpu

pytestmark = MARKS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_calls(case):
    gpu = FakeGpu()
    with gpu.present():
        carry_out(case, gpu)
    assert gpu.captures >= case.captures
    assert gpu.replays >= (STEPS - 1) * case.captures
    # a step by Euler's method finds all its memory in the loop
    assert not gpu.captured_bytes or case.allocates
