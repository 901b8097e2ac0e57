"""How a server answers: names, keys and bounds."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RequestError
from ..web.hosts import Hosts

_HIGH_STEPS = {"auto": 1.0, "high": 1.0, "hd": 1.0, "standard": 1.0, "medium": 2 / 3, "low": 1 / 3}


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
        steps: of a request that does not say how many.
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
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise RequestError("the API key must be of printable ASCII characters")
        if self.api_key == "":
            raise RequestError("the API key is empty; set its variable, or give --no-key")

    def steps_of(self, quality: str | None) -> int:
        """Steps of a request that gives no number."""
        return max(1, round(self.steps * _HIGH_STEPS[quality or "auto"]))
