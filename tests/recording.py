"""Steps recorded without a GPU: a trace of the operations on the very tensors of the loop.

Like a CUDA graph it knows nothing of what Python would have done differently the next time.
"""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from omnigen_fast.graph import StepGraphs


def trace(work):
    """Records the operations of a loop's step on the tensors that they touch.

    Ours are recorded as they are called under torch.compile, whole: like a kernel they then read
    lengths and places on the device. Tracing runs what it records, a CUDA graph's capture does not:
    what it did is undone.
    """
    values = work.func.__self__.values
    written = [values.latents, values.counters]
    written += [] if values.solver is None else [values.solver.history]
    written += [] if values.reuse is None else [values.reuse.kept]
    before = [(tensor, tensor.clone()) for tensor in written]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        recorded = make_fx(lambda: work())()
    for tensor, value in before:
        tensor.copy_(value)
    return recorded


def recording_graphs() -> tuple[StepGraphs, list[str]]:
    """Captures that are traces, and the list of what was captured and replayed."""
    events: list[str] = []

    def capture(work):
        replay = trace(work)
        events.append("capture")
        return lambda: events.append("replay") or replay()

    return StepGraphs(capture), events
