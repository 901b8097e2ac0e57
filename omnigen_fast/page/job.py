"""The page without its looks: its fields as a call, a call as a job, and what it saves."""

from __future__ import annotations

import itertools
import os
import queue
import re
import secrets
import shutil
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OmniGenError, RequestError, brief
from ..fewer_steps import QUALITIES, left_to_preset, preset
from ..request import DEFAULT_NEGATIVE_PROMPT
from ..solvers import shifted
from ..whole_files import write_whole
from .record import (
    RECORDED_PRECISION,
    Record,
    png_info,
    recorded_arguments,
    recorded_file,
    recorded_images,
    recorded_precision,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipeline import OmniGenPipeline
    from ..vae.preview import Preview

_PREVIEW_SECONDS = 0.3  # least time between previews, to spare the browser and the network
_RECENT_STEPS = 8  # steps whose median predicts the time left
_MAX_SEED = (1 << 32) - 1
_SHOWN_PLANS = 8
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".avif"}
_SUFFIXES |= {".heic", ".heif", ".ppm"}
TABLE_HEADERS = ["", "GB (predicted)", "s (predicted)", "plan"]
MAX_PICTURES = 16  # of a request
_WHOLE = re.compile(r"[+-]?\d{1,20}")


@dataclass(frozen=True)
class Fields:
    """The page's fields, unchecked: any of them may be empty or of the wrong type."""

    prompt: Any
    image_1: Any  # path of an upload, or None
    image_2: Any
    image_3: Any
    height: Any
    width: Any
    guidance_scale: Any
    img_guidance_scale: Any
    steps: Any
    seed: Any
    randomize: Any
    max_input_image_size: Any
    use_input_image_size: Any
    negative_prompt: Any
    memory: Any
    quality: Any = QUALITIES[0]
    mask: Any = None  # path of an upload, or None
    mask_blur: Any = 0
    pictures: Any = 1
    seeds: Any = ""  # a list that replaces the seed
    lora: Any = None  # a name of `loras.Loras`; they are no arguments of a call
    lora_strength: Any = 1.0

    def call(self) -> dict[str, Any]:
        """The arguments of the first picture's call, see `calls`."""
        return self.calls()[0]

    def calls(self) -> list[dict[str, Any]]:
        """The arguments of a call for each picture, whose values the pipeline checks.

        Raises RequestError for mistakes that only the page allows.
        """
        images = [self.image_1, self.image_2, self.image_3]
        given = [image is not None for image in images]
        if given != sorted(given, reverse=True):
            raise RequestError(
                f"image {len(given) - given[::-1].index(True)} is given but image "
                f"{given.index(False) + 1} is not; fill them from the first"
            )
        for i, image in enumerate(images, 1):
            if image is not None and not os.path.exists(image):
                raise RequestError(f"image {i} is no longer on the server; upload it again")
        call = {
            "prompt": self.prompt,
            "input_images": [image for image in images if image is not None],
            "height": _whole(self.height),
            "width": _whole(self.width),
            "num_inference_steps": _whole(self.steps),
            "guidance_scale": self.guidance_scale,
            "img_guidance_scale": self.img_guidance_scale,
            "max_input_image_size": _whole(self.max_input_image_size),
            "use_input_image_size_as_output": self.use_input_image_size,
            "negative_prompt": (
                None if self.negative_prompt == DEFAULT_NEGATIVE_PROMPT else self.negative_prompt
            ),
            "memory": self.memory or "auto",
            "quality": self.quality or QUALITIES[0],
        }
        if self.mask is not None:
            if not os.path.exists(self.mask):
                raise RequestError("the mask is no longer on the server; paint it again")
            # the result is as large as the image that it is a part of
            call |= {"mask_image": self.mask, "use_input_image_size_as_output": True}
            call["mask_blur"] = _whole(0 if self.mask_blur is None else self.mask_blur)
        return [{**call, "seed": seed} for seed in self._seeds()]

    def _seeds(self) -> list[Any]:
        """A seed for each picture."""
        count = _whole(1 if self.pictures is None else self.pictures)
        if not isinstance(count, int) or not 1 <= count <= MAX_PICTURES:
            raise RequestError(f"pictures must be from 1 to {MAX_PICTURES}, got {count}")
        listed = re.split(r"[\s,;]+", (self.seeds or "").strip(" \t\r\n,;"))
        if listed != [""]:
            wrong = [one for one in listed if not _WHOLE.fullmatch(one)]
            if wrong:
                raise RequestError(f"seeds must be integers such as 1, 2, 3, got {brief(wrong[0])}")
            if len(listed) > MAX_PICTURES:
                raise RequestError(f"at most {MAX_PICTURES} seeds are taken, got {len(listed):,}")
            if count not in (1, len(listed)):
                raise RequestError(
                    f"{len(listed)} seeds are listed for {count} pictures; each makes one picture, "
                    "so leave pictures at 1, or empty the list"
                )
            return [int(one) for one in listed]
        if self.randomize:
            return [secrets.randbelow(_MAX_SEED + 1) for _ in range(count)]
        seed = _whole(self.seed)
        if seed is None:
            raise RequestError("seed must be an integer, got None; or choose a random one")
        return [seed + i for i in range(count)]


@dataclass(frozen=True)
class Progress:
    """The state after a step."""

    done: int
    steps: int
    seconds_per_step: float | None  # None until one has been timed
    preview: Image | None  # None if it would come too soon after the last one

    def __str__(self) -> str:
        text = f"Step {self.done} of {self.steps}"
        if self.seconds_per_step is None:
            return text
        left = self.seconds_per_step * (self.steps - self.done)
        return f"{text}, {self.seconds_per_step:.2f} s each, {clock(left)} left"


@dataclass(frozen=True)
class Finished:
    """The end of a call."""

    image: Image
    done: int
    steps: int
    seconds: float

    @property
    def stopped(self) -> bool:
        return self.done < self.steps


class Job:
    """A call in its own thread, which can be watched and stopped."""

    def __init__(
        self,
        pipe: OmniGenPipeline,
        arguments: Mapping[str, Any],
        preview: Preview | None = None,
        weights: AbstractContextManager[Any] | None = None,
        limit: int | None = None,
    ) -> None:
        """A call that has not begun.

        Args:
            pipe: which is called.
            arguments: of the call.
            preview: of the picture that the steps lead to.
            weights: entered around the call; prepares the weights.
            limit: bytes of memory to use at most; None for what is free.
        """
        self._pipe, self._arguments, self._preview = pipe, arguments, preview
        self._weights, self._limit = weights or nullcontext(), limit
        self._told = False
        self._shift = preset(arguments.get("quality", QUALITIES[0]))["time_shift"]
        self._stop = threading.Event()
        self._events: queue.SimpleQueue[Progress | Finished | BaseException] = queue.SimpleQueue()
        self._last: tuple[float, Any] = (0.0, None)  # time and latents of the last step
        self._shown = 0.0
        self._done = 0
        self._seconds: deque[float] = deque(maxlen=_RECENT_STEPS)

    def stop(self) -> None:
        """Ends the call after the current step, and the request that it is part of."""
        self._told = True
        self._stop.set()

    def abandon(self) -> None:
        """Ends the call for those who watch it, now; its thread ends after the current step."""
        self.stop()
        self._events.put(OmniGenError("the page is closing; start it again"))

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    @property
    def told(self) -> bool:
        """Whether someone wanted it to stop, rather than that it has come to its end."""
        return self._told

    def run(self) -> Iterator[Progress | Finished]:
        """Runs the call and yields its progress; closing the iterator stops the call.

        Raises whatever the call raises.
        """
        threading.Thread(target=self._work, daemon=True).start()
        try:
            while True:
                event = self._events.get()
                while isinstance(event, Progress) and not self._events.empty():
                    event = self._events.get()  # skips to the latest
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            self._stop.set()

    def _work(self) -> None:
        start = time.monotonic()
        steps = self._arguments["num_inference_steps"]
        try:
            memory = _at_most_free(self._pipe, self._arguments["memory"], self._limit)
            with self._weights:
                (image,) = self._pipe(
                    **{**self._arguments, "memory": memory},
                    progress=False,
                    callback_on_step_end=self._after_step,
                )
            self._events.put(Finished(image, self._done, steps, time.monotonic() - start))
        except BaseException as error:  # raised again in `run`
            self._events.put(error)

    def _after_step(self, pipe: Any, step: int, time_: float, tensors: dict[str, Any]) -> None:
        now, latents = time.monotonic(), tensors["latents"]
        steps = self._arguments["num_inference_steps"]
        (before, earlier), self._last = self._last, (now, latents)
        self._done = step + 1
        if earlier is not None:
            self._seconds.append(now - before)
        image = None
        due = now - self._shown > _PREVIEW_SECONDS
        if self._preview is not None and earlier is not None and due:
            from ..vae.preview import expected

            end = shifted((step + 1) / steps, self._shift)
            left = (1 - end) / (end - time_)
            image = self._preview.image(expected(earlier, latents, left)[0])
            self._shown = time.monotonic()
        median = statistics.median(self._seconds) if self._seconds else None
        self._events.put(Progress(step + 1, steps, median, image))
        if self._stop.is_set():
            pipe._interrupt = True


def save(
    image: Image,
    arguments: Mapping[str, Any],
    model: str,
    dtype: str,
    folder: Path,
    *,
    loras: Sequence[str] = (),
    loading: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a picture with its request, and its input images next to it; returns its path.

    Overwrites nothing, and leaves nothing behind if it fails. The picture appears last, whole.

    Args:
        image: the picture.
        arguments: of the call that made it.
        model, dtype: of the pipeline.
        folder: for the files; made if it does not exist.
        loras: that acted, as the command line takes them.
        loading: other arguments that the pipeline was loaded with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{arguments['seed']}"
    for number in itertools.count(1):
        path = folder / f"{name}{f'-{number}' if number > 1 else ''}.png"
        if path.exists():
            continue
        inputs: list[Path] = []
        try:
            for i, source in enumerate(arguments["input_images"], 1):
                copy = path.with_name(f"{path.stem}-input-{i}{_suffix(source)}")
                write_whole(copy, partial(shutil.copyfile, source), replace=False)
                inputs.append(copy)
            mask = arguments.get("mask_image")
            if mask is not None:
                copy = path.with_name(f"{path.stem}-mask{_suffix(mask)}")
                write_whole(copy, partial(shutil.copyfile, mask), replace=False)
                inputs.append(mask := copy)
            images = inputs[: len(arguments["input_images"])]
            record = _record(arguments, model, dtype, images, folder, mask, loras, loading or {})
            info = png_info(record)
            write_whole(path, partial(image.save, pnginfo=info), replace=False)
            return path
        except BaseException as error:
            for written in inputs:
                written.unlink(missing_ok=True)
            if not isinstance(error, FileExistsError):  # else another process took the name
                raise
    raise AssertionError("the numbers have no end")


def _suffix(source: str) -> str:
    """The suffix of an upload if it is an image's: clients choose the names of their files."""
    suffix = Path(source).suffix.lower()
    return suffix if suffix in _SUFFIXES else ""


def _record(
    arguments: Mapping[str, Any],
    model: str,
    dtype: str,
    inputs: Sequence[Path],
    folder: Path,
    mask: Path | None,
    loras: Sequence[str],
    loading: Mapping[str, Any],
) -> Record:
    negative = arguments["negative_prompt"]
    recorded = {"use_img_guidance": True, "num_images_per_prompt": 1, "dtype": dtype}
    recorded |= {**left_to_preset(arguments), **arguments}
    return Record(
        model=model,
        prompts=(arguments["prompt"],),
        input_images=recorded_images([inputs], folder),
        negative_prompts=None if negative is None else (negative,),
        arguments=recorded_arguments(recorded),
        loras=tuple(loras),
        vae_path=loading.get("vae_path"),
        revision=loading.get("revision"),
        mask_image=None if mask is None else recorded_file(mask, folder),
        precision=recorded_precision({**RECORDED_PRECISION, **loading}),
    )


def memory_table(
    pipe: OmniGenPipeline, arguments: Mapping[str, Any], limit: int | None = None
) -> list[list[str]]:
    """The planner's plans for a request, with the columns of TABLE_HEADERS.

    Raises:
        RequestError: the request is invalid.
        MemoryBudgetError: no plan fits.
    """
    from ..memory.planner import describe

    memory = _at_most_free(pipe, arguments["memory"], limit)
    decision = pipe.plan(**{**arguments, "memory": memory})
    plans = decision.candidates
    chosen = plans.index(decision.chosen)
    last = len(plans) - 1
    shown = {round(i * last / (_SHOWN_PLANS - 1)) for i in range(_SHOWN_PLANS)} | {chosen}
    return [
        [
            "chosen" if i == chosen else "fits" if decision.fits(plans[i]) else "too large",
            f"{plans[i].peak_bytes / 1e9:.2f}",
            f"{plans[i].seconds:.1f}",
            describe(plans[i].plan, pipe.config),
        ]
        for i in sorted(shown)
    ]


def sentence(error: BaseException) -> str:
    """An error in one sentence; for ours, the same as in Python and on the command line."""
    if isinstance(error, OmniGenError | OSError):
        return str(error)
    return f"it failed ({type(error).__name__}: {error}); the terminal has the details"


def clock(seconds: float) -> str:
    """3.5 s, 12 s, 3 min 20 s, 1 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _at_most_free(pipe: OmniGenPipeline, memory: Any, limit: int | None = None) -> str | int:
    """The requested amount of memory, but no more than is free: others use the machine too.

    Raises RequestError if it is not an amount.
    """
    from ..memory.device import free_bytes, parse_memory, profile_of

    amounts = [one for one in (parse_memory(memory), limit) if one is not None]
    if not amounts:
        return "auto"
    held = pipe.engine.held_bytes()
    return max(1 << 20, min(*amounts, free_bytes(pipe.device, profile_of(pipe.device), held)))


def _whole(value: Any) -> Any:
    """A browser's float as an integer; other values stay, for the pipeline to reject."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
