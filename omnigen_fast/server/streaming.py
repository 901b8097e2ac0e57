"""Server-sent events: partial images while a picture is made, then the picture."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from ..serving.work import Step, Ticket
from ..vae.preview import Preview
from .errors import as_api_error
from .gate import Trace
from .pictures import described, encode, usage
from .schemas import Common

if TYPE_CHECKING:
    from torch import Tensor

_ALIVE_SECONDS = 15.0  # after which a comment says that the connection lives


class Steps:
    """The steps of a request, from the engine thread to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Tensor | None] = asyncio.Queue()

    def tell(self, step: Step) -> None:
        """Called in the engine thread."""
        if step.expected is not None:
            self._put(step.expected)

    def end(self, ticket: Ticket) -> None:
        """The request is over; called in the thread that ends it."""
        self._put(None)

    def _put(self, one: Tensor | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, one)

    async def next(self) -> Tensor | None:
        """Latents to show, or None at the end; raises TimeoutError after some time."""
        return await asyncio.wait_for(self._queue.get(), _ALIVE_SECONDS)


async def events(
    kind: str, given: Common, ticket: Ticket, steps: Steps, preview: Preview, trace: Trace
) -> AsyncIterator[bytes]:
    """The events of a request.

    Args:
        kind: "image_generation" or "image_edit", which the names of events begin with.
        given: what the client sent.
        ticket: of the request.
        steps: that it takes.
        preview: what makes partial images.
        trace: of the request.
    """
    index = 0
    while True:
        try:
            latents = await steps.next()
        except (TimeoutError, asyncio.TimeoutError):
            yield b": waiting\n\n"
            continue
        if latents is None:
            break
        picture = await asyncio.to_thread(_partial, preview, latents, given, ticket)
        more = {"b64_json": picture, "partial_image_index": index}
        yield _event(f"{kind}.partial_image", {**_common(given, ticket), **more})
        index += 1
    try:
        (image,) = ticket.result(0)
    except Exception as failure:
        refusal = as_api_error(failure)
        trace.code = refusal.code
        yield _event("error", refusal.body())
        return
    whole = await asyncio.to_thread(encode, image, given)
    done = {"b64_json": whole, "usage": usage(ticket), "seed": ticket.seed}
    yield _event(f"{kind}.completed", {**_common(given, ticket), **done})


def _partial(preview: Preview, latents: Tensor, given: Common, ticket: Ticket) -> str:
    height, width = ticket.size
    return encode(preview.image(latents[0]).resize((width, height)), given)


def _common(given: Common, ticket: Ticket) -> dict[str, Any]:
    return {"created_at": int(time.time()), **described(given, ticket)}


def _event(name: str, data: dict[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()
