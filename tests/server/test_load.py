"""Many clients at once, a third of which give up, with malformed requests between."""

from __future__ import annotations

import pytest

from bench.serve_soak import soak

pytestmark = pytest.mark.early


@pytest.mark.slow
def test_a_short_soak(load_pipe):
    """The long one is `python -m bench.serve_soak`."""
    prompts = ["A cat on a mat.", "A dog.", "Two cups on a table."]
    outcome = soak(load_pipe(), prompts, requests=150, clients=20)
    assert not outcome.problems
    assert outcome.counts["right"] == 100 and outcome.counts["given up"] == 50
    assert outcome.counts["malformed"] == 21 and outcome.counts["queue full"]
