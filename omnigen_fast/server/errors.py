"""Errors in OpenAI's form: a status, one sentence, and which parameter it is about."""

from __future__ import annotations

import errno
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import (
    MemoryBudgetError,
    OmniGenError,
    OutOfMemoryError,
    RequestError,
    first_line,
    printable,
)
from ..serving.work import (
    CancelledError,
    ClosedError,
    NotReadyError,
    QueueFullError,
    TimedOutError,
)
from ..web.bodies import Refusal

BAD, KEY, SERVER = "invalid_request_error", "authentication_error", "server_error"
RATE = "rate_limit_error"
UNKNOWN = "internal_error"  # the code of what nobody expected, which the log explains
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class ApiError(Exception):
    """What a client gets instead of an answer.

    Args:
        status: of HTTP.
        message: one sentence; it is cut and made printable.
        param: the parameter that it is about.
        code: for programs.
        retry_after: seconds.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(printable(message))
        self.status, self.code, self.param = status, code, param
        self.retry_after = retry_after

    @property
    def kind(self) -> str:
        if self.status in (401, 403):
            return KEY if self.status == 401 else BAD
        if self.status == 429:
            return RATE
        return BAD if self.status < 500 else SERVER

    def body(self) -> dict[str, Any]:
        """As JSON."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> Mapping[str, str]:
        """Those of its own."""
        found = {}
        if self.retry_after is not None:
            found["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            found["www-authenticate"] = "Bearer"
        if self.code in _FINAL:
            found["x-should-retry"] = "false"  # OpenAI's clients try again after 5xx
        return found


@dataclass(frozen=True)
class Kind:
    """A row of the documented errors."""

    status: int
    code: str
    when: str
    final: bool = field(default=False)  # another try of the same would fail alike


KINDS = (
    Kind(400, "invalid_value", "a parameter can't be used"),
    Kind(400, "unknown_parameter", "there is no parameter of that name"),
    Kind(400, "invalid_body", "the body is not JSON, or no form"),
    Kind(400, "memory_budget", "no plan for this request fits the memory", final=True),
    Kind(401, "invalid_api_key", "the key is missing or wrong"),
    Kind(403, "forbidden_host", "the Host header, or a browser's origin, is not known"),
    Kind(404, "not_found", "there is nothing at this address"),
    Kind(404, "model_not_found", "the model has another name"),
    Kind(405, "method_not_allowed", "the address has another method"),
    Kind(408, "too_slow", "the body came too slowly"),
    Kind(413, "too_large", "the body, or a part of it, has too many bytes"),
    Kind(429, "queue_full", "as many requests as allowed run or wait; see Retry-After"),
    Kind(500, UNKNOWN, "a fault of the server; its log has the details"),
    Kind(500, "failed", "the picture could not be made", final=True),
    Kind(503, "not_ready", "the model is still being loaded"),
    Kind(503, "shutting_down", "the server is ending"),
    Kind(503, "busy", "too many uploads at once"),
    Kind(503, "timeout", "the request took longer than the server allows", final=True),
    Kind(503, "cancelled", "the request was cancelled"),
    Kind(503, "out_of_memory", "memory ran out under every plan"),
    Kind(503, "disk_full", "an upload can't be stored"),
)
_FINAL = {kind.code for kind in KINDS if kind.final}
_STATUS = {kind.code: kind.status for kind in KINDS}


def error(code: str, message: str, **more: Any) -> ApiError:
    """An error of one of the documented kinds."""
    return ApiError(_STATUS[code], message, code=code, **more)


def as_api_error(failure: BaseException) -> ApiError:
    """What a client gets for an exception."""
    if isinstance(failure, ApiError):
        return failure
    if isinstance(failure, Refusal):
        code = {408: "too_slow", 413: "too_large"}.get(failure.status, "invalid_body")
        return error(code, str(failure))
    if isinstance(failure, QueueFullError):
        return error("queue_full", str(failure), retry_after=failure.retry_after)
    if isinstance(failure, NotReadyError):
        return error("not_ready", str(failure), retry_after=failure.retry_after or 5)
    if isinstance(failure, ClosedError):
        return error("shutting_down", str(failure), retry_after=5)
    if isinstance(failure, TimedOutError):
        return error("timeout", str(failure))
    if isinstance(failure, CancelledError):
        return error("cancelled", str(failure))
    if isinstance(failure, MemoryBudgetError):
        return error("memory_budget", str(failure))
    if isinstance(failure, RequestError):
        return error("invalid_value", str(failure), param=_named(str(failure)))
    if isinstance(failure, OutOfMemoryError) or "out of memory" in str(failure)[:20]:
        return error("out_of_memory", first_line(failure), retry_after=5)
    if isinstance(failure, OSError) and failure.errno in _NO_ROOM:
        return error("disk_full", "the server has no room for the upload; try again later")
    if isinstance(failure, OmniGenError):
        return error("failed", str(failure))
    return error(UNKNOWN, "the server failed; its log has the details")


def _named(sentence: str) -> str | None:
    """The parameter that a sentence begins with."""
    word = sentence.split(" ", 1)[0].partition("[")[0]
    return word if word.isidentifier() and word in PARAMETERS else None


PARAMETERS = frozenset(
    {
        "prompt",
        "negative_prompt",
        "height",
        "width",
        "num_inference_steps",
        "guidance_scale",
        "img_guidance_scale",
        "use_img_guidance",
        "max_input_image_size",
        "seed",
        "guidance_interval",
        "image_guidance_interval",
        "solver",
        "time_shift",
        "timesteps",
        "mask_image",
        "mask_blur",
        "strength",
        "input_images",
    }
)
