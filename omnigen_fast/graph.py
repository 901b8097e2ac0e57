"""Captured steps: the work of one step recorded as a CUDA graph, replayed for all the others.

A step launches hundreds of small kernels whose sizes never change; a replay launches them at once.
A capture is kept with its loop. A later call of the same shapes copies its own values (guidance,
rotary tables, time embeddings, places in the cache) into that loop and replays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
from torch import Tensor

from .cache import ConditionCache
from .denoise import Loop
from .errors import first_line
from .kernels import library, ops
from .schedule import StepKind
from .step_values import StepValues

_log = logging.getLogger("omnigen_fast")
_WORTH = 3  # steps of a kind: a capture costs about one

Replay = Callable[[], None]
Runner = Callable[[StepKind], None]


def capture_cuda(work: Replay, device: torch.device) -> Replay:
    """Records what `work` launches on a device; the returned function launches it again.

    Raises RuntimeError where it can't be recorded or the graph's own memory can't be had.
    """
    graph = torch.cuda.CUDAGraph()
    # A capture is of one stream, so of one device: on another's it would hold nothing. The stream
    # that is current is named too, since a capture that fails leaves its own one current.
    with (
        torch.cuda.device(device),
        torch.cuda.stream(torch.cuda.current_stream(device)),
        torch.cuda.graph(graph, stream=_capture_stream(device)),
    ):
        work()
    return graph.replay


@lru_cache(maxsize=16)
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures of a device: the matrix products keep a work space for each stream."""
    return torch.cuda.Stream(device)


@dataclass(frozen=True)
class _Captured:
    key: Hashable
    loop: Loop  # whose tensors the recordings read and write
    replays: dict[StepKind, Replay] = field(default_factory=dict)


class StepGraphs:
    """The captured steps of the latest shape: they hold the memory of a loop.

    Args:
        capture: records a step; None where steps can't be captured, so all run eagerly.
        possible: asked at every call whether steps can be captured now.
    """

    def __init__(
        self,
        capture: Callable[[Replay], Replay] | None = None,
        possible: Callable[[], bool] = lambda: True,
    ) -> None:
        self._capture = capture
        self._possible = possible
        self._shape: Hashable = None
        self._captured: _Captured | None = None
        self._refused: set[Hashable] = set()  # shapes that could not be captured

    @classmethod
    def on(cls, device: torch.device) -> StepGraphs:
        """Captures on a GPU while the kernels run there; none on other devices."""
        if device.type != "cuda":
            return cls()
        capture = partial(capture_cuda, device=device)
        return cls(capture, possible=lambda: ops.capturable(device))

    def possible(self) -> bool:
        """Whether steps can be captured now."""
        return self._capture is not None and self._possible()

    @property
    def captured(self) -> bool:
        """Whether a captured step is kept."""
        return self._captured is not None and bool(self._captured.replays)

    @property
    def refused(self) -> bool:
        """Whether a step could not be captured."""
        return bool(self._refused)

    def tensors(self) -> list[Tensor]:
        """The memory that a kept capture holds."""
        return [] if self._captured is None else self._captured.loop.memory()

    def clear(self) -> None:
        """Drops what is kept: weights or their places have changed."""
        self._captured = None
        self._refused.clear()

    def expect(self, shape: Hashable) -> None:
        """Drops what serves calls of another shape, before memory is needed for this one.

        Args:
            shape: equal for calls that may share a capture; None if this one captures nothing.
        """
        if shape is None or shape != self._shape:
            self.clear()
        self._shape = shape

    def loop_for(self, values: StepValues, cache: ConditionCache, mlp_rows: int) -> Loop | None:
        """The loop that was captured with the same shapes, now with these values; None without."""
        kept = self._captured
        if kept is None or kept.loop.busy or kept.key != _key(values, cache, mlp_rows):
            return None
        if not self.possible():
            return None
        kept.loop.bind(values)
        return kept.loop

    def runner(
        self, loop: Loop, cache: ConditionCache, mlp_rows: int, counts: Mapping[StepKind, int]
    ) -> Runner:
        """What takes `loop`'s steps one by one, captured where that is possible and pays.

        Args:
            loop: at its first step; its values are those of every step as if it ran eagerly.
            cache: the one that the loop's velocities come from.
            mlp_rows: see `model.Workspace`.
            counts: how many steps of each kind there are.
        """
        key = _key(loop.values, cache, mlp_rows)
        if not self.possible() or key in self._refused:
            return loop.step
        kept = self._captured
        if kept is not None and kept.loop is not loop and kept.loop.busy:
            return loop.step  # another call replays it
        if kept is None or kept.loop is not loop:
            kept = _Captured(key, loop)
        return _Capturing(self, kept, counts)

    def record(self, captured: _Captured, kind: StepKind) -> bool:
        """Captures a step of a loop; False if that fails, and steps run eagerly."""
        assert self._capture is not None
        if captured.key in self._refused:
            return False
        if self._captured is not captured:
            self._captured = None  # its memory first
        try:
            captured.replays[kind] = self._capture(partial(captured.loop.step, kind))
        except RuntimeError as error:  # out of memory is one of these
            _log.warning(
                "a step can't be captured (%s); steps run one kernel at a time", first_line(error)
            )
            self._refused.add(captured.key)
            return False
        self._captured = captured
        return True


class _Capturing:
    """The first step of a kind eagerly (which compiles kernels), then a capture, then replays."""

    def __init__(
        self, graphs: StepGraphs, captured: _Captured, counts: Mapping[StepKind, int]
    ) -> None:
        self._graphs, self._captured, self._counts = graphs, captured, counts
        self._started: set[StepKind] = set()

    def __call__(self, kind: StepKind) -> None:
        replays, loop = self._captured.replays, self._captured.loop
        if kind not in replays:
            eager = kind not in self._started or self._counts[kind] < _WORTH
            self._started.add(kind)
            if eager or not self._graphs.record(self._captured, kind):
                loop.step(kind)
                return
        replays[kind]()


def _key(values: StepValues, cache: ConditionCache, mlp_rows: int) -> Hashable:
    """Equal for calls that one recording serves."""
    shapes = tuple((tuple(one.shape), one.dtype) for one in values.tensors())
    storage = (cache.keys.data_ptr(), cache.values.data_ptr(), tuple(cache.keys.shape))
    groups = tuple(
        (kind, tuple(each.pictures for each in one.passes)) for kind, one in values.kinds.items()
    )
    attention = ops.choice().attention
    places: Hashable = None
    if attention in library.READS_SPANS:  # recorded with the step
        places = tuple(
            (kind, tuple(each.cached for each in one.passes)) for kind, one in values.kinds.items()
        )
    return shapes, storage, groups, mlp_rows, attention, places
