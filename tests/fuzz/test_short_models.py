"""A few inputs of the kinds that are read with a model."""

from __future__ import annotations

import pytest

from fuzz.kinds import KINDS, LIGHT
from fuzz.runner import fuzz

NUMBER = 100


@pytest.fixture(scope="module")
def found():
    return fuzz(dict.fromkeys(KINDS.keys() - LIGHT, (0, NUMBER)), seed=0, jobs=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - LIGHT))
def test_nothing_is_found(found, kind):
    assert found[kind].inputs == NUMBER
    assert not found[kind].faults
    assert found[kind].taken > NUMBER / 20 and found[kind].refused > NUMBER / 10
