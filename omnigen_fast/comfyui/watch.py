"""Progress, previews and interruption of a call, in ComfyUI's terms."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from comfy import model_management
from comfy.utils import ProgressBar
from latent_preview import MAX_PREVIEW_RESOLUTION

from ..fewer_steps import left_to_preset
from ..request import step_times
from ..vae.preview import Preview, expected

_PREVIEW_SECONDS = 0.2  # least time between previews, to spare the browser and the network


class Watch:
    """The pipeline's callback after each step.

    Args:
        arguments: of the call.
        preview: None for progress alone.
    """

    def __init__(self, arguments: Mapping[str, Any], preview: Preview | None) -> None:
        chosen = {**left_to_preset(arguments), **arguments}
        count, strength = chosen["num_inference_steps"], chosen.get("strength", 1.0)
        times = step_times(count, chosen["time_shift"], None, strength)
        self._ends = times or tuple(step / count for step in range(count + 1))
        self._preview = preview
        self._before: Any = None  # latents after the last step
        self._shown = 0.0
        self._bar = ProgressBar(len(self._ends) - 1)

    def __call__(self, _pipe: Any, step: int, _time: float, tensors: Mapping[str, Any]) -> None:
        """Raises ComfyUI's own exception where the user has interrupted the run."""
        model_management.throw_exception_if_processing_interrupted()
        latents, before = tensors["latents"], self._before
        shown = None
        if self._preview is not None:
            self._before = latents
            if before is not None and time.monotonic() - self._shown > _PREVIEW_SECONDS:
                start, end = self._ends[step : step + 2]
                image = self._preview.image(
                    expected(before[0], latents[0], (1 - end) / (end - start))
                )
                shown = ("JPEG", image, MAX_PREVIEW_RESOLUTION)
                self._shown = time.monotonic()
        self._bar.update_absolute(step + 1, len(self._ends) - 1, shown)
