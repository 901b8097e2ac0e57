"""Caches: rows never overlap, kept rows keep their contents, the bound holds."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnigen_fast.cache import ConditionCache, Entry, Span
from omnigen_fast.config import ModelConfig
from omnigen_fast.errors import OmniGenError
from omnigen_fast.memory.plan import RING, Condition
from omnigen_fast.streamed_cache import StreamedCache
from omnigen_fast.streaming import HostMemory, ThreadLane

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
# (condition tokens of one or two branches, tokens they share, steps) of entry 0, 1, 2, ...
SIZES = [((1,), 0, 1), ((5,), 0, 1), ((2,), 0, 4), ((30,), 0, 2), ((3,), 0, 3), ((12,), 0, 10)]
SIZES += [((7,), 0, 1), ((60,), 0, 1), ((1,), 0, 20), ((9,), 0, 9)]
SIZES += [((1,), 0, 2), ((2,), 0, 2), ((2,), 0, 3), ((5,), 0, 2)]  # a row more or less than others
SIZES += [((8, 6), 4, 3), ((20, 9), 9, 2), ((5, 5), 2, 1)]
ENTRIES = [
    Entry(tuple((number, i) for i in range(len(tokens))), Condition(tokens, shared), steps)
    for number, (tokens, shared, steps) in enumerate(SIZES)
]


def rows(number: int) -> int:
    return ENTRIES[number].rows


def make(budget_rows: int, **arguments) -> ConditionCache:
    cpu = torch.device("cpu")
    return ConditionCache(CONFIG, torch.float32, cpu, budget_rows * ROW_BYTES, **arguments)


def hold(cache: ConditionCache, *numbers: int) -> list[int]:
    """Reserves entries; the numbers of those that are new."""
    return [ENTRIES.index(entry) for entry in cache.reserve([ENTRIES[i] for i in numbers])]


def give_back(cache: ConditionCache, *numbers: int) -> None:
    cache.give_back([ENTRIES[i] for i in numbers])


def reserve(cache: ConditionCache, *numbers: int) -> list[int]:
    """As a request that is over before the next one."""
    missing = hold(cache, *numbers)
    give_back(cache, *numbers)
    return missing


def has(cache: ConditionCache, number: int) -> bool:
    return ENTRIES[number] in cache


def place(cache: ConditionCache, number: int) -> int:
    """First row of an entry."""
    spans = cache[ENTRIES[number]]
    return spans[0].start if len(spans) == 1 else spans[1].times


def contents(cache: ConditionCache, number: int) -> torch.Tensor:
    """What an entry's rows must hold: different in each entry, row, layer, feature."""
    shape = (cache.layers, rows(number), 1, 2)
    return 10_000.0 * (number + 1) + torch.arange(cache.layers * rows(number) * 2).view(shape)


def write(cache: ConditionCache, number: int) -> None:
    mine = slice(place(cache, number), place(cache, number) + rows(number))
    cache.keys[:, mine] = contents(cache, number)
    cache.values[:, mine] = -contents(cache, number)


def check(cache: ConditionCache, numbers) -> None:
    """Entries lie in the storage, apart from each other, and hold what was written."""
    places = sorted((place(cache, number), rows(number)) for number in numbers)
    for (before, length), (after, _) in pairwise(places):
        assert before + length <= after
    if places:
        assert places[0][0] >= 0
        assert sum(places[-1]) <= cache.keys.shape[1]
    assert cache.keys.shape == cache.values.shape
    assert cache.used_rows == sum(map(rows, numbers))
    for number in numbers:
        mine = slice(place(cache, number), place(cache, number) + rows(number))
        assert torch.equal(cache.keys[:, mine], contents(cache, number))
        assert torch.equal(cache.values[:, mine], -contents(cache, number))


number_lists = st.lists(st.integers(0, len(SIZES) - 1), min_size=1, max_size=5, unique=True)


@settings(max_examples=250, deadline=None)
@given(
    budget=st.integers(0, 150),
    requests=st.lists(st.tuples(number_lists, st.booleans()), max_size=16),
)
def test_any_sequence_of_requests(budget, requests):
    cache = make(budget)
    kept: dict[int, int] = {}  # when each entry was used last
    for now, (numbers, fails) in enumerate(requests):
        had = cache.keys.shape[1]
        needed = sum(map(rows, numbers))
        if not needed <= had <= max(budget, needed):
            kept = {}  # storage of another size
        missing = reserve(cache, *numbers)
        assert missing == [number for number in numbers if number not in kept]
        limit = cache.keys.shape[1]
        assert needed <= limit <= max(budget, needed)
        assert all(has(cache, number) for number in numbers)

        dropped = [number for number in kept if not has(cache, number)]
        left = [number for number in kept if has(cache, number) and number not in numbers]
        if dropped:
            newest = max(kept[number] for number in dropped)
            assert all(kept[number] >= newest for number in left)
            # none was dropped that could have stayed
            last = max(rows(number) for number in dropped if kept[number] == newest)
            assert cache.used_rows + last > limit
        kept = {number: kept[number] for number in left} | dict.fromkeys(numbers, now)
        assert len(cache) == len(kept)

        if fails:
            cache.discard([ENTRIES[number] for number in missing])
            for number in missing:
                assert not has(cache, number)
                del kept[number]
        else:
            for number in missing:
                write(cache, number)
        check(cache, kept)


def fits(cache: ConditionCache, held: dict[int, int], numbers: list[int]) -> bool:
    """Whether entries, the largest first, find gaps between those that are held at some places."""
    taken = [(start, rows(number)) for number, start in held.items()]
    for size in sorted(map(rows, numbers), reverse=True):
        ends = [0, *(start + length for start, length in sorted(taken))]
        starts = [*(start for start, _ in sorted(taken)), cache.keys.shape[1]]
        gaps = [end for end, start in zip(ends, starts) if start - end >= size]
        if not gaps:
            return False
        taken.append((gaps[0], size))
    return True


@settings(max_examples=250, deadline=None)
@given(
    budget=st.integers(0, 150),
    events=st.lists(st.one_of(number_lists, st.integers(0, 5)), max_size=20),
    fails=st.sets(st.integers(0, 20)),
)
def test_any_requests_side_by_side(budget, events, fails):
    """A list of numbers begins a request, a number ends one of those that go on.

    What a request holds stays where it is and as it is, whatever begins or fails beside it; what
    does not fit beside it is refused, and changes nothing for it.
    """
    cache, going, kept = make(budget), [], set()
    for now, event in enumerate(events):
        held = {number: place(cache, number) for numbers in going for number in numbers}
        if isinstance(event, int):
            if going:
                give_back(cache, *going.pop(event % len(going)))
            continue
        alone = not going
        try:
            missing = hold(cache, *event)
        except OmniGenError as error:
            assert not alone and "another request holds" in str(error)
            assert not fits(cache, held, [number for number in event if number not in held])
            kept = {number for number in kept if has(cache, number)}
            check(cache, kept)
            continue
        kept = {number for number in kept if has(cache, number)} - set(missing)
        assert not set(missing) & held.keys()
        if now in fails:
            cache.discard([ENTRIES[number] for number in missing])
            cache.hold([ENTRIES[number] for numbers in going for number in numbers])
        else:
            for number in missing:
                write(cache, number)
            kept |= set(missing)
            going.append(event)
        assert all(place(cache, number) == where for number, where in held.items())
        assert all(has(cache, number) for numbers in going for number in numbers)
        check(cache, kept)


def test_a_held_entry_is_not_dropped_for_another():
    """The least recently used of the others is, and nothing moves."""
    cache = make(rows(5) + rows(8) + rows(2))
    hold(cache, 5)
    write(cache, 5)
    for number in (8, 2):
        reserve(cache, number)
        write(cache, number)
    assert hold(cache, 9) == [9]  # fits where 8 was
    write(cache, 9)
    assert not has(cache, 8) and place(cache, 5) == 0
    check(cache, (5, 9, 2))


def test_two_requests_hold_one_entry():
    """It stays until both have given it back."""
    cache = make(rows(5) + rows(8))
    hold(cache, 5)
    write(cache, 5)
    assert hold(cache, 5) == []
    give_back(cache, 5)
    with pytest.raises(OmniGenError, match="another request holds the condition cache"):
        hold(cache, 7)
    check(cache, (5,))
    give_back(cache, 5)
    assert hold(cache, 7) == [7]
    assert not has(cache, 5)


def test_a_request_that_is_refused_drops_nothing():
    cache = make(rows(5) + rows(6))
    hold(cache, 5)
    reserve(cache, 6)
    with pytest.raises(OmniGenError, match="another request holds the condition cache"):
        hold(cache, 9)  # fits beside neither
    assert has(cache, 5) and has(cache, 6)


def test_a_larger_budget_keeps_what_is_there_and_a_smaller_one_does_not():
    cache = make(rows(5) + rows(8))
    reserve(cache, 5, 8)
    for number in (5, 8):
        write(cache, number)
    cache.budget_bytes *= 2
    assert reserve(cache, 8) == []
    check(cache, (5, 8))
    cache.budget_bytes = rows(8) * ROW_BYTES
    assert reserve(cache, 8) == [8]
    assert cache.nbytes == cache.budget_bytes and not has(cache, 5)


def test_gaps_are_closed_in_place():
    cache = make(rows(5) + rows(8) + rows(9))
    reserve(cache, 5, 8, 9)
    for number in (5, 8, 9):
        write(cache, number)
    before = cache.keys.data_ptr()
    assert place(cache, 8) == rows(5)  # in the middle
    cache.discard([ENTRIES[5], ENTRIES[9]])
    assert reserve(cache, 3) == [3]  # larger than either gap
    write(cache, 3)
    assert place(cache, 8) == 0
    assert cache.keys.data_ptr() == before
    check(cache, (8, 3))


def test_the_least_recently_used_goes_first():
    cache = make(rows(0) + rows(1) + rows(2))
    for number in (0, 1, 2, 0):  # 1 is the oldest now
        reserve(cache, number)
    assert reserve(cache, 6) == [6]
    assert [number for number in range(len(SIZES)) if has(cache, number)] == [0, 6]


def test_a_request_beyond_the_budget_is_served_and_then_shrunk():
    cache = make(10)
    reserve(cache, 7, 5)
    assert cache.nbytes == (rows(7) + rows(5)) * ROW_BYTES
    reserve(cache, 0)
    assert cache.nbytes <= 10 * ROW_BYTES
    assert not has(cache, 7) and not has(cache, 5)


def test_a_hit_beyond_the_budget():
    cache = make(0)
    reserve(cache, 7)
    write(cache, 7)
    assert reserve(cache, 7) == []
    check(cache, (7,))


def test_clear_frees_the_storage():
    cache = make(100)
    reserve(cache, 1, 2)
    cache.clear()
    assert (len(cache), cache.nbytes, cache.used_rows) == (0, 0, 0)
    assert reserve(cache, 1) == [1]


def test_select_step_brings_that_step_beside_the_condition():
    cache = make(100)
    reserve(cache, 2, 14)
    cache.keys.fill_(7)  # of rows that no entry has: there may be NaN, which equals nothing
    for number in (2, 14):
        write(cache, number)
    spans = [span for number in (2, 14) for span in cache[ENTRIES[number]]]
    slots = torch.tensor([span.slot for span in spans])
    times = torch.tensor([span.times for span in spans])
    before = cache.keys.clone()
    cache.select_step(slots, times + 2, cache.staging(len(spans)))
    for span in spans:
        assert torch.equal(cache.keys[:, span.slot], before[:, span.times + 2])
        assert torch.equal(cache.values[:, span.slot], -before[:, span.times + 2])
        before[:, span.slot] = before[:, span.times + 2]
    assert torch.equal(cache.keys, before)


def test_one_layer():
    cache = make(10, layers=1)
    reserve(cache, 1)
    assert cache.keys.shape[0] == 1
    assert cache.nbytes == cache.keys.nbytes + cache.values.nbytes == cache.keys.shape[1] * 16


def test_spans_of_one_branch():
    (span,) = Entry(("a",), Condition((5,)), 3).spans(10)
    assert span == Span(start=10, condition=5, slot=15, times=16, shared=0, rest=10)
    assert span.rows(3, torch.device("cpu")).tolist() == [10, 11, 12, 13, 14, 16, 17, 18]


@given(st.integers(0, 20), st.integers(0, 9), st.integers(0, 9), st.integers(1, 5))
def test_two_branches_share_the_middle(shared, rest, other, steps):
    """Each reads one run of rows: its condition and its slot; no row is used twice."""
    entry = Entry(("a", "b"), Condition((shared + rest, shared + other), shared), steps)
    spans = entry.spans(7)
    written = [row for span in spans for row in span.rows(steps, torch.device("cpu")).tolist()]
    slots = [span.slot for span in spans]
    assert sorted(written + slots) == list(range(7, 7 + entry.rows))
    common = list(range(spans[0].rest, spans[0].rest + shared))
    for span, tokens in zip(spans, (shared + rest, shared + other)):
        rest_rows = list(range(span.rest, span.rest + tokens - span.shared))
        condition = rest_rows if span.shared == 0 else common + rest_rows
        assert span.condition == tokens
        assert sorted([*condition, span.slot]) == list(range(span.start, span.start + tokens + 1))
    assert spans[1].shared == shared


def test_an_interrupt_while_rows_are_given_leaves_none_marked(monkeypatch):
    cache = make(100)
    reserve(cache, 5, 8)
    for number in (5, 8):
        write(cache, number)
    gaps = iter([0])

    def find(self, rows):
        try:
            return next(gaps)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(ConditionCache, "_find_gap", find)
    with pytest.raises(KeyboardInterrupt):
        reserve(cache, 1, 2)
    monkeypatch.undo()
    assert reserve(cache, 5, 1, 2) == [5, 1, 2]


def make_streamed(budget_rows: int, host: HostMemory | None = None) -> StreamedCache:
    cpu = torch.device("cpu")
    host = host or HostMemory(cpu)
    budget = budget_rows * ROW_BYTES
    return StreamedCache(CONFIG, torch.float32, cpu, budget, host, ThreadLane())


def streamed_contents(number: int, layer: int) -> torch.Tensor:
    return contents(make(0), number)[layer]


def fill_streamed(cache: StreamedCache, numbers) -> None:
    with cache.filling([ENTRIES[number] for number in numbers]):
        for layer in range(cache.layers):
            keys, values = cache.take(layer)
            for number in numbers:
                mine = slice(place(cache, number), place(cache, number) + rows(number))
                keys[mine] = streamed_contents(number, layer)
                values[mine] = -streamed_contents(number, layer)
            cache.release(layer)


def check_streamed(cache: StreamedCache, numbers, step: int) -> None:
    """Every layer comes as it was written, the step's time tokens in their slots."""
    spans = [span for number in numbers for span in cache[ENTRIES[number]]]
    slots = torch.tensor([span.slot for span in spans])
    times = torch.tensor([span.times + step for span in spans])
    cache.select_step(slots, times, cache.staging(len(spans)))
    for layer in range(cache.layers):
        expected = torch.empty(sum(map(rows, numbers)), 1, 2)
        for number in numbers:
            mine = slice(place(cache, number), place(cache, number) + rows(number))
            expected[mine] = streamed_contents(number, layer)
        expected[slots] = expected[times]
        keys, values = cache.take(layer)
        assert torch.equal(keys, expected) and torch.equal(values, -expected)
        cache.release(layer)


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(0, 150),
    requests=st.lists(st.tuples(number_lists, st.booleans()), max_size=10),
)
def test_any_sequence_of_streamed_requests(budget, requests):
    """What is kept is what was used last, as far as the budget goes."""
    cache = make_streamed(budget)
    kept: list[int] = []  # the least recently used first
    for numbers, fails in requests:
        missing = hold(cache, *numbers)
        assert missing == [number for number in numbers if number not in kept]
        needed = sum(map(rows, numbers))
        assert cache.nbytes == RING * needed * ROW_BYTES // cache.layers
        rest = [number for number in kept if number not in numbers]
        while sum(map(rows, rest)) + needed > max(budget, needed):
            rest.pop(0)
        kept = [*rest, *(number for number in numbers if number in kept), *missing]
        if fails:
            cache.discard([ENTRIES[number] for number in missing])
            kept = [number for number in kept if number not in missing]
        else:
            fill_streamed(cache, missing)
            for step in (0, 0, min(ENTRIES[number].steps for number in numbers) - 1):
                check_streamed(cache, numbers, step)
        give_back(cache, *numbers)
        assert [number for number in range(len(SIZES)) if has(cache, number)] == sorted(kept)
        assert cache.used_rows == sum(map(rows, kept)) and len(cache) == len(kept)


def test_a_streamed_cache_serves_one_request_at_a_time():
    cache = make_streamed(100)
    hold(cache, 5)
    with pytest.raises(OmniGenError, match="another request streams its keys and values"):
        hold(cache, 5)
    give_back(cache, 5)
    assert hold(cache, 5) == []


def test_memory_that_runs_out_while_rows_are_given_leaves_none_marked():
    class Full(HostMemory):
        left = 5

        def empty(self, shape, dtype):
            self.left -= 1
            if self.left < 0:
                raise MemoryError
            return super().empty(shape, dtype)

    cache = make_streamed(100, Full(torch.device("cpu")))
    assert hold(cache, 5) == [5]
    give_back(cache, 5)
    with pytest.raises(MemoryError):
        hold(cache, 1, 2)  # the second layer of the second has none
    assert has(cache, 5) and not has(cache, 1) and not has(cache, 2)
    assert hold(cache, 5) == []


def test_a_streamed_cache_frees_the_device_and_then_the_host():
    cache = make_streamed(100)
    hold(cache, 5)
    fill_streamed(cache, [5])
    give_back(cache, 5)
    assert sum(one.nbytes for one in cache.tensors()) == cache.nbytes + rows(5) * ROW_BYTES
    cache.free()
    assert cache.nbytes == 0 and cache.used_rows == rows(5)
    assert hold(cache, 5) == []
    check_streamed(cache, [5], 1)
    cache.clear()
    assert (cache.nbytes, cache.used_rows, len(cache)) == (0, 0, 0)
    assert hold(cache, 5) == [5]
