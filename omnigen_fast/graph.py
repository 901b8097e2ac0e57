"""Captured steps: the work of one step recorded as a CUDA graph, replayed for all the others.

A step launches hundreds of small kernels whose sizes never change; a replay launches them at once.
Captures are kept by shape. A later call of the same shapes copies its own values (guidance, rotary
tables, time embeddings, places in the cache) into the captured tensors and replays.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from .cache import ConditionCache
from .denoise import Loop
from .kernels import ops

_log = logging.getLogger("omnigen_fast")

Replay = Callable[[], None]


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
    loop: Loop  # whose tensors the recording reads and writes
    replay: Replay


class StepGraphs:
    """Captured steps of the latest shapes.

    Args:
        capture: records a step; None where steps can't be captured, so all run eagerly.
        most: how many shapes are kept; each holds the memory of one step's intermediate results.
        possible: asked at every call whether steps can be captured now.
    """

    def __init__(
        self,
        capture: Callable[[Replay], Replay] | None,
        most: int = 1,
        possible: Callable[[], bool] = lambda: True,
    ) -> None:
        self._capture = capture
        self._most = most
        self._possible = possible
        self._captured: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._refused: set[Hashable] = set()  # shapes that could not be captured

    @classmethod
    def on(cls, device: torch.device) -> StepGraphs:
        """Captures on a GPU while the kernels run there; none on other devices."""
        if device.type != "cuda":
            return cls(None)
        capture = partial(capture_cuda, device=device)
        return cls(capture, possible=lambda: ops.capturable(device))

    def possible(self) -> bool:
        """Whether steps can be captured now."""
        return self._capture is not None and self._possible()

    def clear(self) -> None:
        """Drops all captures: weights or their places have changed."""
        self._captured.clear()
        self._refused.clear()

    def runner(self, loop: Loop, cache: ConditionCache) -> Replay:
        """What takes `loop`'s steps one by one, captured where that is possible and pays.

        Args:
            loop: at its first step; its tensors hold the result of every step as if it ran
                eagerly.
            cache: the one that the loop's velocities come from.
        """
        key = _key(loop, cache)
        if not self.possible() or key in self._refused:
            return loop.step
        if key in self._captured:
            self._captured.move_to_end(key)
            captured = self._captured[key]
            for theirs, mine in zip(captured.loop.tensors(), loop.tensors()):
                theirs.copy_(mine)
            return _Replayed(loop, captured)
        if len(loop.lengths) < 3:  # a capture costs about a step
            return loop.step
        return _Capturing(self, key, loop)

    def _record(self, key: Hashable, loop: Loop) -> Replay:
        """Captures a loop whose first step ran; falls back to eager steps."""
        assert self._capture is not None
        while len(self._captured) >= self._most:
            self._captured.popitem(last=False)
        try:
            replay = self._capture(loop.step)
        except RuntimeError as error:  # out of memory is one of these
            reason = str(error).strip().partition("\n")[0]
            _log.warning("a step can't be captured (%s); steps run one kernel at a time", reason)
            self._refused.add(key)
            return loop.step
        self._captured[key] = _Captured(loop, replay)
        return replay


class _Capturing:
    """The first step eagerly (which compiles kernels and sets up libraries), then the capture."""

    def __init__(self, graphs: StepGraphs, key: Hashable, loop: Loop) -> None:
        self._graphs, self._key, self._loop = graphs, key, loop
        self._run: Replay | None = None
        self._started = False

    def __call__(self) -> None:
        if not self._started:
            self._started = True
            self._loop.step()
            return
        if self._run is None:
            self._run = self._graphs._record(self._key, self._loop)
        self._run()


class _Replayed:
    """Replays another loop's capture; latents travel there and back, a callback may change them."""

    def __init__(self, loop: Loop, captured: _Captured) -> None:
        self._loop, self._captured = loop, captured

    def __call__(self) -> None:
        theirs = self._captured.loop
        theirs.latents.copy_(self._loop.latents)
        self._captured.replay()
        self._loop.latents.copy_(theirs.latents)


def _key(loop: Loop, cache: ConditionCache) -> Hashable:
    """Equal for loops that one recording serves."""
    shapes = tuple((tuple(t.shape), t.dtype) for t in loop.tensors())
    storage = (cache.keys.data_ptr(), cache.values.data_ptr(), tuple(cache.keys.shape))
    pictures = tuple(groups.pictures for groups in loop.plan.passes)
    return shapes, storage, pictures
