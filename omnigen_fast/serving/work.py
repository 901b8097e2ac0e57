"""Requests as values: what is asked for, how it goes on, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import OmniGenError

if TYPE_CHECKING:
    from torch import Tensor

# How a request ends; names of the metric's label and of the log.
DONE, CANCELLED, TIMEOUT, CLOSED, FAILED = "done", "cancelled", "timeout", "closed", "failed"


class ServingError(OmniGenError):
    """A request was not carried out, and not for what it asks.

    Attributes:
        reason: how it ended, as metrics and logs name it.
        retry_after: predicted seconds after which another try may succeed; None if unknown.
    """

    reason = FAILED

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class QueueFullError(ServingError):
    """As many requests as allowed run or wait already."""

    reason = "queue_full"


class NotReadyError(ServingError):
    """The model is still being loaded, or could not be."""

    reason = "not_ready"


class ClosedError(ServingError):
    """The scheduler takes no more requests, or ended while this one ran or waited."""

    reason = CLOSED


class CancelledError(ServingError):
    """Whoever asked for it has cancelled it."""

    reason = CANCELLED


class TimedOutError(ServingError):
    """The time that it was given is over."""

    reason = TIMEOUT


@dataclass(frozen=True)
class Step:
    """A step that was taken."""

    done: int  # steps so far
    steps: int
    # [pictures, 4, height / 8, width / 8]: what the picture would be if the velocity stayed as it
    # is; None unless the request wants to see this step
    expected: Tensor | None


@dataclass
class Facts:
    """What is known of a request that is over, for logs and metrics."""

    seconds: float = 0.0  # since it was submitted
    queued_seconds: float = 0.0  # of these, before its first step
    steps: int = 0
    packed_steps: int = 0  # of these, taken together with other requests' steps


@dataclass
class Ticket:
    """A request that was accepted.

    `future` gets what a call of the pipeline returns, or the error: a `ServingError`, or what the
    call raised. Cancelling the future itself does nothing; use `cancel`.
    """

    id: str
    seed: int | None
    size: tuple[int, int]  # (height, width) of the pictures
    pictures: int
    text_tokens: int  # of the prompt, wrapped
    image_tokens: int  # of its input images
    noise_tokens: int  # of all pictures
    future: Future[Any] = field(default_factory=Future)
    facts: Facts = field(default_factory=Facts)
    _cancel: Callable[[ServingError], None] = field(default=lambda error: None, repr=False)

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # so that its own `cancel` does nothing

    def cancel(self) -> None:
        """Ends the request: at once if it waits, after the current step if it runs."""
        self._cancel(CancelledError("the request was cancelled"))

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the end; see `future`."""
        return self.future.result(timeout)
