"""The load test of the server: what arrives, what is computed of the answers, what is shown."""

from __future__ import annotations

import io
import json
import time
from contextlib import nullcontext
from itertools import pairwise

import pytest
from golden_cases import TINY
from PIL import Image

from bench import serve_load
from bench.serve_load import Answer, Arrival, Kind, arrivals, jain, percentile, summary

KINDS = [(Kind("text", 64, 4), Kind("text", 64, 40)), (Kind("edit", 64, 2), Kind("edit", 64, 20))]


def test_arrivals_are_of_the_seed_and_the_rate():
    found = arrivals(KINDS, 500, 8.0, 1)
    assert found == arrivals(KINDS, 500, 8.0, 1)
    assert found != arrivals(KINDS, 500, 8.0, 2)
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    assert found[-1].seconds < 500
    assert len(found) == pytest.approx(4000, rel=0.1)
    assert sum(one.is_long for one in found) == pytest.approx(0.2 * len(found), rel=0.15)
    gaps = [b.seconds - a.seconds for a, b in pairwise(found)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(mean**2, rel=0.2)  # exponential, so not evenly spaced
    assert {one.kind for one in found if one.is_long} == {long for _, long in KINDS}


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(1, 50, 1), (1, 99, 1), (2, 50, 1), (100, 50, 50), (100, 99, 99), (200, 99, 198)],
)
def test_percentiles(count, share, expected):
    assert percentile(list(range(1, count + 1)), share) == expected


def test_fairness():
    assert jain([3.0] * 5) == pytest.approx(1)
    assert jain([1.0, 0, 0, 0]) == pytest.approx(0.25)


def test_summary():
    (short, long), _ = KINDS
    given = [(short, False, 2.0), (short, False, 4.0), (long, True, 10.0)]
    answers = [Answer(Arrival(0, kind, is_long, 0), seconds) for kind, is_long, seconds in given]
    found = summary(answers, 20.0, {short: 1.0, long: 10.0})
    assert (found["requests"], found["per_second"]) == (3, 0.15)
    assert found["short"] == {"mean": 3.0, "p50": 2.0, "p95": 4.0, "p99": 4.0}
    assert found["long"]["mean"] == 10
    assert found["worst_slowdown"] == 4
    assert found["fairness"] == pytest.approx(49 / 63, abs=1e-3)  # of 2, 4 and 1


class TestLengthened:
    """Ten times the seconds, whatever part of them the steps take."""

    @pytest.fixture
    def seconds(self, monkeypatch):
        def set_to(fixed: float, per_step: float) -> None:
            monkeypatch.setattr(
                serve_load, "alone", lambda _, kind, *more: fixed + per_step * kind.steps
            )

        return set_to

    @pytest.mark.parametrize(("fixed", "per_step", "steps"), [(0, 1, 40), (4, 1, 76), (1, 0, 120)])
    def test_steps(self, seconds, fixed, per_step, steps):
        seconds(fixed, per_step)
        assert serve_load.lengthened(None, Kind("text", 64, 4)).steps == steps


def test_pictures_are_compared():
    def answer(level: int) -> Answer:
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (level, 0, 0)).save(file, "PNG")
        return Answer(Arrival(0, KINDS[0][0], False, 0), picture=file.getvalue())

    serve_load.check_same([answer(7)], [answer(8)])
    with pytest.raises(RuntimeError, match="other pictures"):
        serve_load.check_same([answer(7)], [answer(9)])


class Fake:
    """A server that answers at once, with the same picture."""

    def ask(self, kind: Kind, seed: int) -> bytes:
        time.sleep(kind.steps / 1000)
        return self.picture

    def __init__(self) -> None:
        file = io.BytesIO()
        Image.new("RGB", (4, 4)).save(file, "PNG")
        self.picture = file.getvalue()


def test_a_run(tmp_path, monkeypatch):
    """In a moment; the table and the plot of what it finds."""
    monkeypatch.setattr(serve_load, "served", lambda *_: nullcontext(Fake()))
    result = serve_load.measure(1, 0.5, 2, 0, "shapes", "float32")
    result = json.loads(json.dumps(result))
    assert set(result["variants"]) == set(serve_load.VARIANTS)
    text = serve_load.markdown(result)
    assert all(name in text for name in serve_load.VARIANTS) and "128 x 128" in text
    pytest.importorskip("matplotlib")
    serve_load.plot(result, tmp_path / "load.png")
    assert (tmp_path / "load.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_server_answers_both_tasks():
    with serve_load.served((), str(TINY), "float32") as client:
        for task in ("text", "edit"):
            image = Image.open(io.BytesIO(client.ask(Kind(task, 32, 1), 0)))
            assert image.size == (32, 32)
        with pytest.raises(RuntimeError, match="400"):
            client.ask(Kind("text", 33, 1), 0)
