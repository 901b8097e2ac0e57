"""One run of the check: its parts, its time, and its result, kept on disk as it grows."""

from __future__ import annotations

import gc
import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from omnigen_fast.config import ModelConfig

from ..common import full_config, tiny_config
from ..kernels import workload
from ..record import write_whole

OK, FAILED, CUT_OFF, NOT_MEASURED = "ok", "failed", "cut off", "not measured"
NO_TIME, NO_GPU = "time", "needs a GPU"


class TimeUp(BaseException):
    """The budget is spent. Not an Exception, so that no part takes it for a failure of its own."""


class Interrupted(BaseException):
    """The process was told to end."""


class NotMeasured(Exception):
    """A part has nothing to measure here; the message says why."""


class CheckFailed(Exception):
    """Something was computed wrongly."""


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    config: ModelConfig
    check: ModelConfig  # of the model whose results are checked
    check_side: int  # pixels of its pictures
    sides: tuple[int, ...]  # pixels of the pictures that are timed, and of their input images
    steps: int
    eager_steps: int
    operations: workload.Size


def sizes_of(tiny: bool) -> Sizes:
    """The real model's sizes, or what a CPU does in a moment."""
    full = full_config()
    if not tiny:
        values = vars(full) | {"num_layers": 4}
        return Sizes(full, ModelConfig(**values), 512, (1024, 512), 50, 5, workload.FULL)
    config = tiny_config()
    return Sizes(config, config, 64, (64, 48), 5, 2, workload.Size(16, (20, 6, 12), 2, 192, 256))


class Run:
    """What the parts share.

    Args:
        device: where everything runs.
        tiny: small sizes.
        path: of the result.
        deadline: on `time.monotonic`'s clock.
    """

    def __init__(self, device: torch.device, tiny: bool, path: Path, deadline: float) -> None:
        self.device, self.tiny, self.path, self.deadline = device, tiny, path, deadline
        self.sizes = sizes_of(tiny)
        self.result: dict[str, Any] = {"state": "running", "tiny": tiny, "parts": {}}
        self._limits: workload.Limits | None = None
        self._kept: dict[str, Any] = {}

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """What each part found, by name."""
        return self.result["parts"]

    @property
    def limits(self) -> workload.Limits:
        """Measured when first asked for."""
        if self._limits is None:
            self._limits = workload.measure_limits(self.device, torch.bfloat16)
        return self._limits

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """Made once, for several parts."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def drop(self) -> None:
        """Forgets what is kept, and frees its memory."""
        self._kept.clear()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def left(self) -> float:
        """Seconds until the budget is spent."""
        return self.deadline - time.monotonic()

    def save(self) -> None:
        """Writes the result as it stands; a reader sees this one or the one before, whole."""
        write_whole(self.path, json.dumps(self.result, indent=1) + "\n")


Part = Callable[[Run, dict[str, Any]], None]


def first_line(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:500]


def execute(run: Run, parts: Mapping[str, Part], selected: Collection[str]) -> None:
    """Runs the selected parts one after the other, until the time is up.

    A part that fails says so in the result, and the next one runs.
    """
    for name in parts:
        why = "not reached" if name in selected else "not selected"
        run.parts[name] = {"status": NOT_MEASURED, "why": why}
    run.save()
    with _signals(run) as guarded:
        for name, part in parts.items():
            if name not in selected:
                continue
            found = run.parts[name] = {"status": "running"}
            run.save()
            start = time.monotonic()
            if run.left() <= 0:
                found.update(status=NOT_MEASURED, why=NO_TIME)
                continue
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                with guarded():
                    part(run, found)
                found["status"] = OK
            except NotMeasured as error:
                found.update(status=NOT_MEASURED, why=str(error))
            except TimeUp:
                found.update(status=CUT_OFF, why=NO_TIME)
            except Interrupted:
                found.update(status=CUT_OFF, why="interrupted")
                run.result["state"] = "interrupted"
                return
            except Exception as error:
                found.update(status=FAILED, why=first_line(error))
                if not isinstance(error, CheckFailed):
                    found["traceback"] = traceback.format_exc()[-4000:]
            finally:
                found["seconds"] = time.monotonic() - start
                run.save()
    out_of_time = any(
        one["status"] == CUT_OFF or one.get("why") == NO_TIME for one in run.parts.values()
    )
    run.result["state"] = "out of time" if out_of_time else "complete"


@contextmanager
def _signals(run: Run) -> Iterator[Callable]:
    """Ends a part when the time is up or the process is told to end, and no writing in between."""
    inside, told = [], []

    def end(number, _frame) -> None:
        error = TimeUp() if number == signal.SIGALRM else Interrupted()
        if inside:
            raise error
        if number != signal.SIGALRM:
            told.append(error)

    @contextmanager
    def guarded() -> Iterator[None]:
        if told:
            raise told[0]
        if run.left() <= 0:
            raise TimeUp
        inside.append(True)
        try:
            yield
        finally:
            inside.clear()

    if threading.current_thread() is not threading.main_thread():
        yield guarded  # signals are the main thread's: parts look at the time themselves
        return
    numbers = (signal.SIGALRM, signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, end) for number in numbers}
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, run.left()))
    try:
        yield guarded
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
