"""A few inputs of the kinds that need no model."""

from __future__ import annotations

import pytest

from fuzz.runner import fuzz


@pytest.mark.slow_except("records-300")
@pytest.mark.parametrize(("kind", "number"), [("images", 300), ("records", 300)])
def test_nothing_is_found(kind, number):
    found = fuzz({kind: (0, number)}, seed=0, jobs=1)[kind]
    assert found.inputs == number
    assert not found.faults
    assert found.taken > number / 10 and found.refused > number / 10
