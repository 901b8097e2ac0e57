"""A short soak, and what it would say of a process that loses memory."""

from __future__ import annotations

import random

import pytest
import torch

from soak import watch
from soak.mixed import Mixed
from soak.repeated import repeat
from soak.watch import COUNTS, MOST_BYTES_PER_REQUEST, growth

pytestmark = pytest.mark.early

REQUESTS = 40


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You are using a model:UserWarning")
def test_mixed_requests(tmp_path, monkeypatch):
    folder = tmp_path / "theirs"
    folder.mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(watch.tempfile, "tempdir", str(tmp_path / "temporary"))
    soak = Mixed(random.Random(0), folder)
    for _ in range(REQUESTS):
        soak.step()
    before = soak.measure(REQUESTS)
    assert sum(count for name, count in soak.done.items() if name != "budget too small") == REQUESTS
    assert len(soak.done) > 10
    for _ in range(5):
        soak.step()
    after = soak.measure(REQUESTS + 5)
    assert {name: after[name] for name in COUNTS} == {name: before[name] for name in COUNTS}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_six_requests_have_one_answer_each(dtype):
    answers = []
    repeat(random.Random(0), dtype, 3, lambda: answers.append(1))
    assert len(answers) == 18


def curve(**last):
    """Twelve points of a process that is steady but for noise; `last` is added per request."""
    noise = random.Random(0)
    point = dict.fromkeys(COUNTS, 5)
    return [
        {
            **point,
            **{name: 5 + value * (i - 7) for name, value in last.items() if i > 7},
            "request": 25 * i,
            "in_use": (200 << 20) + noise.randrange(1 << 19) + 25 * i * last.get("bytes", 0),
            "anonymous": (400 << 20) + noise.randrange(4 << 20) + 25 * i * last.get("mapped", 0),
        }
        for i in range(12)
    ]


def test_a_steady_process_passes():
    assert growth(curve()) == []
    assert growth(curve(bytes=MOST_BYTES_PER_REQUEST // 4)) == []


@pytest.mark.parametrize("name", COUNTS)
def test_a_growing_count_is_seen(name):
    (fault,) = growth(curve(**{name: 1}))
    assert fault.startswith(name)


def test_memory_that_grows_is_seen():
    (fault,) = growth(curve(bytes=40 << 10))
    assert fault.startswith("memory, in_use")
    (fault,) = growth(curve(mapped=400 << 10))
    assert fault.startswith("memory, anonymous")


def test_a_tensor_that_nobody_should_hold_is_counted():
    before = watch.measure([])
    lost = torch.zeros(3)
    assert watch.measure([])["tensors"] == before["tensors"] + 1
    assert watch.measure([lost])["tensors"] == before["tensors"]
