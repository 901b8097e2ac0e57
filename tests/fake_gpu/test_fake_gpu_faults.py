"""Each kind of call on the fake GPU fails once a fault of its own is put into the product."""

from __future__ import annotations

import pytest
from fake_calls import CASES, MARKS, carry_out
from fake_device import FakeGpu

pytestmark = MARKS


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_fault_is_found(case, monkeypatch):
    gpu, (kind, said) = FakeGpu(), case.found
    with pytest.raises(kind, match=said), monkeypatch.context() as patch, gpu.present():
        case.fault(patch)
        carry_out(case, gpu)


def test_at_least_twelve_faults():
    assert len({case.fault for case in CASES}) >= 12
