"""Rings: no buffer is read before its copy or overwritten before its last reader has finished."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omnigen_fast import streaming as offload
from omnigen_fast.memory import device
from omnigen_fast.streaming import HostMemory, Ring, Streamed, ThreadLane, lane_for, spread


class TwoStreams:
    """A lane and a computation as a GPU runs them: later than they are issued, in any interleaving
    that streams and events allow.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._issued: dict[str, list] = {"compute": [], "copy": []}
        self._passed: set[object] = set()

    def _record(self, stream: str) -> object:
        event = object()
        self._issued[stream].append(("record", event))
        return event

    def submit(self, copy: Callable[[], None], after: object) -> object:
        if after is not None:
            self._issued["copy"].append(("wait", after))
        copy()  # issues its own work by `do`
        return self._record("copy")

    def mark(self) -> object:
        return self._record("compute")

    def wait(self, mark: object) -> None:
        self._issued["compute"].append(("wait", mark))

    def drain(self) -> None:
        while self._issued["copy"]:  # the computation may go on
            self.run(most=1)

    def do(self, stream: str, *parts: Callable[[], None]) -> None:
        """Issues work; other work may come between its parts."""
        self._issued[stream] += [("work", part) for part in parts]

    def run(self, most: int | None = None) -> None:
        """Runs what was issued, all of it unless told."""
        while any(self._issued.values()) and most != 0:
            ready = [
                queue
                for queue in self._issued.values()
                if queue and (queue[0][0] != "wait" or queue[0][1] in self._passed)
            ]
            assert ready, "each stream waits for the other"
            kind, what = self._random.choice(ready).pop(0)
            if kind == "work":
                what()
            elif kind == "record":
                self._passed.add(what)
            most = None if most is None else most - 1


class Buffers:
    """What the ring's slots hold; reading and writing take time."""

    def __init__(self, streams: TwoStreams, slots: int) -> None:
        self._streams = streams
        self._holds: list = [None] * slots
        self._readers = [0] * slots
        self.stored: dict[int, object] = {}

    def write(self, stream: str, slot: int, value: object) -> None:
        def begin() -> None:
            assert not self._readers[slot], "overwritten while it is read"
            self._holds[slot] = None

        def end() -> None:
            assert self._holds[slot] is None, "two writers"
            self._holds[slot] = value

        self._streams.do(stream, begin, end)

    def read(self, stream: str, slot: int, value: object, done=lambda: None) -> None:
        def begin() -> None:
            assert self._holds[slot] == value, "read before its copy"
            self._readers[slot] += 1

        def end() -> None:
            assert self._holds[slot] == value, "overwritten while it is read"
            self._readers[slot] -= 1
            done()

        self._streams.do(stream, begin, end)


@settings(max_examples=400, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    slots=st.integers(1, 4),
    items=st.integers(1, 7),
    plan=st.lists(
        st.sampled_from(("pass", "write", "cut", "late", "reset")), min_size=1, max_size=6
    ),
    eager=st.integers(0, 4),
)
def test_order_in_any_interleaving(seed, slots, items, plan, eager):
    """Passes that read, that write, cut short or begun late, with and without a reset.

    What the computation does with the buffers' memory before there is a ring counts too.
    """
    streams = TwoStreams(seed)
    buffers = Buffers(streams, slots)
    for slot in range(slots):
        buffers.read("compute", slot, None)
    version = dict.fromkeys(range(items), 0)
    ring = Ring(
        streams,
        slots,
        range(items),
        lambda slot, item: buffers.write("copy", slot, (item, version[item])),
    )
    for what in plan:
        if what == "reset":
            ring.reset()
            continue
        half = (items + 1) // 2
        for item in range(half if what == "late" else 0, half if what == "cut" else items):
            if what == "write":
                slot = ring.lend(item)
                version[item] += 1
                value = (item, version[item])
                buffers.write("compute", slot, value)

                def store(slot: int, item=item, value=value) -> None:
                    done = lambda: buffers.stored.update({item: value})  # noqa: E731
                    buffers.read("copy", slot, value, done)

                ring.release(item, store)
            else:
                slot = ring.take(item)
                buffers.read("compute", slot, (item, version[item]))
                ring.release(item)
            streams.run(most=eager)
        if what == "write":
            ring.reset()  # what the host holds has changed
            assert buffers.stored == {item: (item, version[item]) for item in range(items)}
    streams.run()


class Marks:
    """A lane on which copies run at once; keeps what each was told to wait for."""

    def __init__(self) -> None:
        self.now, self.waited_for = 0, []

    def submit(self, copy: Callable[[], None], after: int | None) -> str:
        self.waited_for.append(after)
        copy()
        return "copied"

    def mark(self) -> int:
        return self.now

    def wait(self, mark: object) -> None:
        pass

    def drain(self) -> None:
        pass


def test_the_first_copies_wait_for_what_the_computation_did_before():
    """The memory of the buffers was another tensor's, whose readers may still run."""
    lane = Marks()
    lane.now = 1
    ring = Ring(lane, 2, range(3), lambda slot, item: None)
    lane.now = 2
    ring.take(0)
    assert lane.waited_for == [1, 1]
    lane.now = 3  # and after a reset, since what failed in between may still read them
    ring.reset()
    lane.now = 4
    ring.take(0)
    assert lane.waited_for == [1, 1, 3, 3]


def test_copies_run_ahead_of_their_use():
    """While an item is used, the next ones are on their way, one for each other slot."""
    streams, filled = TwoStreams(0), []
    ring = Ring(streams, 3, range(5), lambda slot, item: filled.append(item))
    ring.take(0)
    assert filled == [0, 1, 2]
    ring.take(1)
    assert filled == [0, 1, 2]
    ring.release(0)
    assert filled == [0, 1, 2, 3]
    ring.release(1)
    for item in (2, 3, 4, 0):
        ring.take(item)
        ring.release(item)
    assert filled == [0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_a_thread_copies_and_reports_what_failed():
    source = torch.arange(6.0).view(3, 2)
    buffers = torch.zeros(2, 2)
    broken = [True]

    def fill(slot: int, item: int) -> None:
        if item == 1 and broken[0]:
            raise OSError("the file is gone")
        buffers[slot].copy_(source[item])

    ring = Ring(ThreadLane(), 2, range(3), fill)
    assert torch.equal(buffers[ring.take(0)], source[0])
    with pytest.raises(OSError, match="the file is gone"):
        ring.take(1)
    broken[0] = False
    ring.reset()
    for _ in range(2):
        for item in range(3):
            assert torch.equal(buffers[ring.take(item)], source[item])
            ring.release(item)


def test_a_thread_is_drained_when_its_copies_are_done():
    lane, go, done = lane_for(torch.device("cpu")), threading.Event(), []
    lane.drain()  # of nothing
    lane.submit(lambda: done.append(go.wait(10)), None)
    threading.Timer(0.05, go.set).start()
    lane.drain()
    assert done == [True]


def test_a_copy_that_cannot_be_submitted_leaves_the_ring_as_it_was():
    class Refusing(ThreadLane):
        refuse = False

        def submit(self, copy, after):
            if self.refuse:
                raise RuntimeError("CUDA out of memory")
            return super().submit(copy, after)

    lane, filled = Refusing(), []
    ring = Ring(lane, 2, range(4), lambda slot, item: filled.append((slot, item)))
    ring.take(0)
    lane.refuse = True
    with pytest.raises(RuntimeError):
        ring.release(0)
    lane.refuse = False
    ring.reset()
    slots = []
    for item in range(4):
        slots.append(ring.take(item))
        ring.release(item)
    assert set(slots) == {0, 1}


def test_streamed_layers_and_resident_ones():
    slots = ["a", "b"]
    lane, filled = ThreadLane(), []
    ring = Ring(lane, 2, [1, 3], lambda slot, item: filled.append(item))
    layers = Streamed(ring, slots, {0: "zero", 2: "two"})
    for _ in range(2):
        found = []
        for layer in range(4):
            found.append(layers.take(layer))
            layers.release(layer)
        assert found[0] == "zero" and found[2] == "two"
        assert {found[1], found[3]} == {"a", "b"}


@given(st.integers(0, 40), st.integers(1, 40))
def test_resident_layers_are_spread_evenly(resident, layers):
    resident = min(resident, layers)
    found = spread(resident, layers)
    assert len(found) == resident and found <= set(range(layers))
    gaps = [layer for layer in range(layers) if layer not in found]
    if resident:
        runs, last = [], -1
        for layer in [*sorted(found), layers]:
            runs.append(layer - last - 1)
            last = layer
        assert max(runs) - min(runs[:-1]) <= -(-layers // resident)
    assert len(gaps) == layers - resident


class Driver:
    """Locks on paper; refuses from some byte on."""

    def __init__(self) -> None:
        self.places: dict[int, int] = {}
        self.refuse_beyond = 1 << 60

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        assert flags == 0
        if sum(self.places.values()) + size > self.refuse_beyond:
            return 2  # cudaErrorMemoryAllocation
        self.places[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.places[address]
        return 0


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    return driver


CUDA = torch.device("cuda")


def test_locked_memory_has_its_exact_size_and_a_bound(driver, caplog):
    host = HostMemory(CUDA, 1000)
    first = host.empty((25, 10), torch.float16)
    assert driver.places == {first.data_ptr(): 500}
    second = host.empty((300,), torch.float16)  # would be more than the bound
    third = host.empty((250,), torch.float16)
    assert set(driver.places) == {first.data_ptr(), third.data_ptr()}
    assert second.shape == (300,)
    view = first[3:]
    del first
    assert len(driver.places) == 2, "a view holds the memory"
    del view
    assert set(driver.places) == {third.data_ptr()}
    fourth = host.empty((250,), torch.float16)  # in the place of the first
    assert set(driver.places) == {third.data_ptr(), fourth.data_ptr()}
    assert host.empty((1,), torch.float16).data_ptr() not in driver.places
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "page-locked" in caplog.text


def test_memory_that_cannot_be_locked_is_used_as_it_is(driver, caplog):
    host, driver.refuse_beyond = HostMemory(CUDA, 1000), 0
    assert host.empty((250,), torch.float32).shape == (250,)
    assert not driver.places and len(caplog.records) == 1
    driver.refuse_beyond = 1000
    assert host.empty((250,), torch.float32).data_ptr() in driver.places  # it was not counted


def test_half_of_the_free_memory_is_locked_at_most(driver, monkeypatch):
    monkeypatch.setattr(device, "free_host_bytes", lambda: 1000)
    host = HostMemory(CUDA)
    kept = [host.empty((100,), torch.uint8) for _ in range(6)]
    assert list(driver.places) == [one.data_ptr() for one in kept[:5]]


def test_only_memory_that_cuda_copies_from_is_locked(driver):
    plain = HostMemory(torch.device("cpu"), 1000).empty((3,), torch.float32)
    empty = HostMemory(CUDA, 1000).empty((0, 3), torch.float32)
    assert (plain.shape, empty.shape) == ((3,), (0, 3)) and not driver.places


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_out_of_memory(error, expected):
    assert offload.is_out_of_memory(error) is expected


def test_an_interrupt_loses_no_buffer(monkeypatch):
    """Between the item that is done with and the buffer that is free again, both are nowhere."""
    lane = ThreadLane()
    ring = Ring(lane, 2, range(3), lambda slot, item: None)

    def interrupted():
        raise KeyboardInterrupt

    for _ in range(2):
        ring.take(0)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(lane, "mark", interrupted)
            ring.release(0)
        ring.reset()
    for item in (0, 1, 2, 0):
        assert ring.take(item) in (0, 1)
        ring.release(item)
