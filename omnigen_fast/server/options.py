"""How a server answers: names, keys and bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import RequestError
from ..fewer_steps import QUALITIES, preset
from ..web.hosts import Hosts

# OpenAI's names, but for "auto"
_QUALITIES = {"high": "exact", "hd": "exact", "standard": "high", "medium": "high", "low": "fast"}


@dataclass(frozen=True)
class Options:
    """What `create_app` is told.

    Args:
        model_name: by which clients ask for the model, see /v1/models.
        api_key: that clients must send; None for none.
        hosts: names in the Host header that are answered, besides this machine's own; None for
            any, where a proxy in front has checked them.
        max_pixels: of one picture, and of an input image after it is shrunk.
        max_images: pictures of one request.
        max_steps: of one request.
        steps: of a request that does not say how many, at full quality.
        quality: of a request that names none: "exact", "high" or "fast".
        max_upload_bytes: of the body of an edit.
        max_uploads: that are received at a time.
        log_prompts: whether the log shows prompts.

    Raises RequestError for a value that can't be used.
    """

    model_name: str = "omnigen"
    api_key: str | None = None
    hosts: Hosts | None = None
    max_pixels: int = 1024 * 1024
    max_images: int = 4
    max_steps: int = 100
    steps: int = 50
    quality: str = QUALITIES[0]
    max_upload_bytes: int = 128 << 20
    max_uploads: int = 8
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_images", "max_steps", "steps"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps > self.max_steps:
            raise RequestError(
                f"steps must be at most max_steps={self.max_steps}, got {self.steps}"
            )
        preset(self.quality)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise RequestError("the API key must be of printable ASCII characters")
        if self.api_key == "":
            raise RequestError("the API key is empty; set its variable, or give --no-key")

    def arguments_of(self, quality: str | None) -> dict[str, Any]:
        """The preset's arguments for a request, with as large a share of the steps as it has."""
        chosen = preset(_QUALITIES.get(quality or "auto", self.quality))
        share = chosen["num_inference_steps"] / preset(QUALITIES[0])["num_inference_steps"]
        return {**chosen, "num_inference_steps": max(1, round(self.steps * share))}
