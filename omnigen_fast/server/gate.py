"""What stands in front of every address: request ids, hosts, keys, the log, and the last resort."""

from __future__ import annotations

import hmac
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ..serving.work import CANCELLED, DONE, Ticket
from ..web.bodies import Body, Gone, Message, Receive
from ..web.hosts import Hosts
from .errors import UNKNOWN, ApiError, as_api_error, error
from .options import Options

Send = Callable[[Message], Awaitable[None]]
Scope = dict[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TRACE = "omnigen_trace"  # in a request's scope
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_FORWARDED = b"x-request-id"
_GUARDED = "/v1/"  # addresses that need the key
_log = logging.getLogger("omnigen_fast.server")


@dataclass
class Trace:
    """What the log's line says of a request."""

    id: str
    start: float = field(default_factory=time.monotonic)
    status: int = 0
    code: str | None = None
    ticket: Ticket | None = None
    reason: str | None = None
    prompt: str | None = None
    gone: bool = False  # the client hung up

    def line(self, method: str, path: str) -> dict[str, Any]:
        """Everything that is known, without what is not."""
        found: dict[str, Any] = {
            "request_id": self.id,
            "method": method,
            "path": path,
            "status": self.status or None,
            "code": self.code,
            "client_gone": self.gone or None,
            "reason": self.reason,
            "seconds": round(time.monotonic() - self.start, 4),
        }
        if self.ticket is not None:
            ticket, facts = self.ticket, self.ticket.facts
            found |= {
                "queued_seconds": round(facts.queued_seconds, 4),
                "steps": facts.steps,
                "packed_steps": facts.packed_steps,
                "height": ticket.size[0],
                "width": ticket.size[1],
                "images": ticket.pictures,
                "seed": ticket.seed,
            }
        found["prompt"] = self.prompt
        return {name: value for name, value in found.items() if value is not None}


class Gate:
    """ASGI middleware.

    Args:
        app: behind it.
        options: of the server.
    """

    def __init__(self, app: App, options: Options) -> None:
        self._app, self._options = app, options
        self._key = None if options.api_key is None else options.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {
            name.decode("latin-1").lower(): text.decode("latin-1")
            for name, text in scope["headers"]
        }
        empty = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        body = Body(receive, empty)
        given = headers.get("x-request-id", "")
        trace = Trace(given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}")
        scope = {**scope, TRACE: trace}
        answer = _Answer(send, body, trace)
        try:
            self._check(scope, headers)
            await self._app(scope, body, answer)
        except Gone:
            trace.gone = True
        except Exception as failure:
            # what a client that has hung up causes is of no interest
            if not answer.begun:
                refusal = as_api_error(failure)
                if refusal.code == UNKNOWN:
                    _log.error("%s failed", trace.id, exc_info=failure)
                await answer.refuse(refusal)
        finally:
            if trace.ticket is not None:
                trace.ticket.cancel()  # nobody waits for it any more, if it is not over
            self._write(scope, trace)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Raises ApiError for a request that must not be answered."""
        hosts = self._options.hosts
        if hosts is not None:
            here = scope["server"][0] if scope.get("server") else None
            if problem := hosts.problem(headers, here):
                raise error("forbidden_host", problem)
        if self._key is not None and scope["path"].startswith(_GUARDED):
            sent = headers.get("authorization", "")
            kind, _, key = sent.partition(" ")
            right = hmac.compare_digest(key.strip().encode("utf-8", "replace"), self._key)
            if kind.lower() != "bearer" or not right:
                text = "the API key is wrong" if sent else "an API key is needed"
                raise error("invalid_api_key", f"{text}; send Authorization: Bearer KEY")

    def _write(self, scope: Scope, trace: Trace) -> None:
        ticket = trace.ticket
        if ticket is not None and ticket.future.done():
            failure = ticket.future.exception()
            trace.reason = DONE if failure is None else getattr(failure, "reason", "failed")
        elif ticket is not None:
            trace.reason = CANCELLED
        if not self._options.log_prompts:
            trace.prompt = None
        _log.info("%s", json.dumps(trace.line(scope["method"][:16], scope["path"][:200])))


class _Answer:
    """ASGI's `send`, with the headers that each answer has.

    A refusal may come before all of the body has: the rest is then read, or the client would not
    read its answer, and the connection is closed.
    """

    def __init__(self, send: Send, body: Body, trace: Trace) -> None:
        self._send, self._body, self._trace = send, body, trace
        self.begun = self._closing = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun, self._trace.status = True, message["status"]
            self._closing = message["status"] >= 400 and not self._body.ended
            own = [
                (_FORWARDED, self._trace.id.encode()),
                (b"x-content-type-options", b"nosniff"),
                (b"cache-control", b"no-store"),
                *([(b"connection", b"close")] if self._closing else []),
            ]
            message = {**message, "headers": [*message.get("headers", []), *own]}
        elif self._closing and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._body.drain()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    async def refuse(self, refusal: ApiError) -> None:
        """Answers a refusal unless an answer was begun."""
        if self.begun:
            return
        self._trace.code = refusal.code
        body = json.dumps(refusal.body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *((name.encode(), text.encode()) for name, text in refusal.headers().items()),
        ]
        start = {"type": "http.response.start", "status": refusal.status, "headers": headers}
        await self(start)
        await self({"type": "http.response.body", "body": body})


def allowed_hosts(names: list[str], host: str) -> Hosts:
    """The names that a server which listens at `host` answers to."""
    return Hosts.of([*names, *([] if host in ("0.0.0.0", "::") else [host])])
