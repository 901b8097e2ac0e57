"""ConditionCache: rows never overlap, kept rows keep their contents, the bound holds."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnigen_fast.cache import ConditionCache, Span
from omnigen_fast.config import ModelConfig

CONFIG = ModelConfig(
    hidden_size=4,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=4,
    vocab_size=4,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    short_factor=(1.0,),
    long_factor=(1.0,),
    max_position_embeddings=64,
    original_max_position_embeddings=64,
    pos_embed_size=4,
)
ROW_BYTES = 2 * 2 * 1 * 2 * 4  # keys and values, layers, heads, head_dim, float32
# (condition tokens, steps) of branch 0, 1, 2, ...
SIZES = [(1, 1), (5, 1), (2, 4), (30, 2), (3, 3), (12, 10), (7, 1), (60, 1), (1, 20), (9, 9)]
SIZES += [(1, 2), (2, 2), (2, 3), (5, 2), (8, 9), (19, 1)]  # a row more or less than others


def rows(branch: int) -> int:
    condition, steps = SIZES[branch]
    return condition + 1 + steps


def make(budget_rows: int, **arguments) -> ConditionCache:
    cpu = torch.device("cpu")
    return ConditionCache(CONFIG, torch.float32, cpu, budget_rows * ROW_BYTES, **arguments)


def reserve(cache: ConditionCache, *branches: int) -> list:
    return cache.reserve({branch: SIZES[branch] for branch in branches})


def contents(cache: ConditionCache, branch: int) -> torch.Tensor:
    """What a branch's rows must hold: different in each branch, row, layer, feature."""
    shape = (cache.layers, rows(branch), 1, 2)
    return 10_000.0 * (branch + 1) + torch.arange(cache.layers * rows(branch) * 2).view(shape)


def write(cache: ConditionCache, branch: int) -> None:
    span = cache[branch]
    cache.keys[:, span.start : span.stop] = contents(cache, branch)
    cache.values[:, span.start : span.stop] = -contents(cache, branch)


def check(cache: ConditionCache, branches) -> None:
    """Spans lie in the storage, apart from each other, and hold what was written."""
    spans = sorted((cache[branch] for branch in branches), key=lambda span: span.start)
    for before, after in pairwise(spans):
        assert before.stop <= after.start
    if spans:
        assert spans[0].start >= 0
        assert spans[-1].stop <= cache.keys.shape[1]
    assert cache.keys.shape == cache.values.shape
    assert cache.used_rows == sum(map(rows, branches))
    for branch in branches:
        span = cache[branch]
        assert (span.condition, span.steps) == SIZES[branch]
        assert torch.equal(cache.keys[:, span.start : span.stop], contents(cache, branch))
        assert torch.equal(cache.values[:, span.start : span.stop], -contents(cache, branch))


branch_lists = st.lists(st.integers(0, len(SIZES) - 1), min_size=1, max_size=5, unique=True)


@settings(max_examples=250, deadline=None)
@given(
    budget=st.integers(0, 150),
    requests=st.lists(st.tuples(branch_lists, st.booleans()), max_size=16),
)
def test_any_sequence_of_requests(budget, requests):
    cache = make(budget)
    kept: dict[int, int] = {}  # when each branch was used last
    for now, (branches, fails) in enumerate(requests):
        missing = reserve(cache, *branches)
        assert missing == [branch for branch in branches if branch not in kept]
        needed = sum(map(rows, branches))
        limit = max(budget, needed)
        assert cache.nbytes <= limit * ROW_BYTES
        assert all(branch in cache for branch in branches)

        dropped = [branch for branch in kept if branch not in cache]
        left = [branch for branch in kept if branch in cache and branch not in branches]
        if dropped:
            newest = max(kept[branch] for branch in dropped)
            assert all(kept[branch] >= newest for branch in left)
            # none was dropped that could have stayed
            last = max(rows(branch) for branch in dropped if kept[branch] == newest)
            assert cache.used_rows + last > limit
        kept = {branch: kept[branch] for branch in left} | dict.fromkeys(branches, now)
        assert len(cache) == len(kept)

        if fails:
            cache.discard(missing)
            for branch in missing:
                assert branch not in cache
                del kept[branch]
        else:
            for branch in missing:
                write(cache, branch)
        check(cache, kept)


def test_growth_keeps_contents():
    cache = make(1000)
    for branch in range(len(SIZES)):
        reserve(cache, branch)
        write(cache, branch)
        check(cache, range(branch + 1))


def test_compaction_keeps_contents():
    cache = make(rows(5) + rows(8) + rows(9))
    reserve(cache, 5, 8, 9)
    for branch in (5, 8, 9):
        write(cache, branch)
    before = cache.nbytes
    assert cache[8].start == rows(5)  # in the middle
    cache.discard([5, 9])
    assert reserve(cache, 3) == [3]  # larger than either gap
    write(cache, 3)
    assert cache[8].start == 0
    assert cache.nbytes == before
    check(cache, (8, 3))


def test_the_least_recently_used_goes_first():
    cache = make(rows(0) + rows(1) + rows(2))
    for branch in (0, 1, 2, 0):  # 1 is the oldest now
        reserve(cache, branch)
    assert reserve(cache, 6) == [6]
    assert [branch for branch in range(len(SIZES)) if branch in cache] == [0, 6]


def test_a_request_beyond_the_budget_is_served_and_then_shrunk():
    cache = make(10)
    reserve(cache, 7, 5)
    assert cache.nbytes == (rows(7) + rows(5)) * ROW_BYTES
    reserve(cache, 0)
    assert cache.nbytes <= 10 * ROW_BYTES
    assert 7 not in cache and 5 not in cache


def test_a_hit_beyond_the_budget_is_kept_while_in_use():
    cache = make(0)
    reserve(cache, 7)
    write(cache, 7)
    assert reserve(cache, 7, 1) == [1]
    write(cache, 1)
    check(cache, (7, 1))


def test_clear_frees_the_storage():
    cache = make(100)
    reserve(cache, 1, 2)
    cache.clear()
    assert (len(cache), cache.nbytes, cache.used_rows) == (0, 0, 0)
    assert reserve(cache, 1) == [1]


def test_select_step_moves_that_step_behind_the_condition():
    cache = make(100)
    reserve(cache, 2, 5)
    for branch in (2, 5):
        write(cache, branch)
    slots = torch.tensor([cache[branch].time_slot for branch in (2, 5)])
    cache.select_step(slots, 3)
    for branch in (2, 5):
        condition, _ = SIZES[branch]
        start, slot = cache[branch].start, cache[branch].time_slot
        expected = contents(cache, branch)
        expected[:, condition] = expected[:, condition + 1 + 3]
        assert slot == start + condition
        assert torch.equal(cache.keys[:, start : start + rows(branch)], expected)
        assert torch.equal(cache.values[:, start : start + rows(branch)], -expected)


def test_one_layer():
    cache = make(10, layers=1)
    reserve(cache, 1)
    assert cache.keys.shape[0] == 1
    assert cache.nbytes == cache.keys.nbytes + cache.values.nbytes == cache.keys.shape[1] * 16


def test_span():
    span = Span(start=10, condition=5, steps=3)
    assert (span.rows, span.stop, span.time_slot) == (9, 19, 15)
