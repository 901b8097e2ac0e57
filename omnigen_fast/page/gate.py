"""What stands between the network and Gradio: it lets through what the page itself sends.

Gradio serves many addresses that the page never asks for, keeps bodies of any size in memory, and
answers any host. Here a request has a known host, a known address, and a body that was received
and checked before Gradio sees it. All else gets a sentence.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import traceback
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

from ..web.bodies import Body, Gone, Message, Receive, Refusal, receive_body
from ..web.hosts import Hosts
from .bodies import (
    MAX_CALL_BYTES,
    MAX_UPLOAD_BYTES,
    SESSION,
    Call,
    OneFile,
    parse_call,
    replay,
    upload_limit,
)
from .files import Files
from .line import Line
from .users import REALM, Users

Send = Callable[[Message], Awaitable[None]]
Scope = dict[str, Any]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_STORED_BYTES = 2 << 30  # of uploads and shown pictures; the oldest go first
MAX_BUFFERED_BYTES = 64 << 20  # of calls that are being received, all together
MAX_UPLOADS = 8  # at a time
MAX_HEARTBEATS = 64  # connections that only say that a page is open
_MAX_WATCHERS = 2  # connections that follow one session
_API = "/gradio_api"
_PLAIN = re.compile(
    r"/|/config|/theme\.css|/manifest\.json|/favicon\.ico|/robots\.txt|/gradio_api/app_id"
    r"|/gradio_api/theme\.css|/(?:assets|static|svelte)/[A-Za-z0-9_@+./-]{1,300}"
)
_HEARTBEAT = re.compile(rf"{_API}/heartbeat/({SESSION.pattern})")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")
_WRONG_SECONDS = 1.0  # that a wrong password waits for its answer
# Headers that Gradio reads addresses, ranges and tokens from.
_UNTRUSTED = {b"range", b"if-range", b"x-gradio-server", b"x-direct-url", b"forwarded"}
_UNTRUSTED |= {b"authorization"}
_SAFETY = [
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"frame-ancestors 'self'"),
    (b"referrer-policy", b"same-origin"),
]


class Gate:
    """An ASGI application around Gradio's.

    Args:
        app: Gradio's.
        hosts: the names that the page answers to.
        calls: what the page's buttons send, by Gradio's number of the action.
        line: of jobs and sessions.
        folder: of uploads and shown pictures; nothing else is served as a file.
        files: whose each file in it is.
        port: names the cookie, which browsers share among the ports of a host.
        users: who may ask for anything; None for anyone.
    """

    def __init__(
        self,
        app: App,
        hosts: Hosts,
        calls: Mapping[int, Call],
        line: Line,
        folder: Path,
        files: Files,
        port: int,
        users: Users | None = None,
    ) -> None:
        self._users = users
        self._app, self._hosts, self._calls, self._line = app, hosts, calls, line
        self._folder = Path(os.path.realpath(folder))
        self._files = files
        self._kept = set(_files(self._folder))  # the examples' images, for everyone
        self._cookie = f"omnigen_fast_{port}"
        self._joined: set[str] = set()  # sessions that asked for something
        self._heartbeats = self._uploads = self._buffered = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, as ASGI has it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            answer, body = _Answer(send), Body(receive)
            try:
                await self._serve(scope, body, answer)
            except Gone:
                pass
            except Refusal as refusal:
                await answer.refuse(refusal, body)
            except Exception as error:
                # what a client that has hung up causes is of no interest
                if not answer.begun:
                    traceback.print_exception(error)
                    await answer.refuse(_broken(), body)

    async def _serve(self, scope: Scope, receive: Body, answer: _Answer) -> None:
        headers = {
            name.decode("latin-1"): text.decode("latin-1") for name, text in scope["headers"]
        }
        here = scope["server"][0] if scope.get("server") else None
        if problem := self._hosts.problem(headers, here):
            raise Refusal(403, problem)
        if self._users is not None:
            await self._check_user(self._users, headers.get("authorization"), answer)
        scope = {**scope, "headers": self._trusted(scope["headers"])}
        path, method = scope["path"], scope["method"]
        token = _token(headers.get("cookie", ""), self._cookie)
        query = _query(scope)
        scope["query_string"] = b""
        if path == f"{_API}/upload":
            _only(method, "POST")
            await self._upload(scope, headers, token, receive, answer)
        elif path in (f"{_API}/queue/join", f"{_API}/run/predict"):
            _only(method, "POST")
            await self._call(scope, headers, token, receive, answer)
        elif path == f"{_API}/queue/data":
            _only(method, "GET")
            await self._watch(scope, query, token, receive, answer)
        elif path == f"{_API}/upload_progress":
            _only(method, "GET")
            await answer.text(200, b"text/event-stream", b'data: {"msg": "done"}\n\n')
        elif match := _HEARTBEAT.fullmatch(path):
            _only(method, "GET")
            await self._heartbeat(scope, match[1], token, receive, answer)
        elif path.startswith(f"{_API}/file="):
            _only(method, "GET", "HEAD")
            self._check_file(path.removeprefix(f"{_API}/file="), token)
            await self._app(scope, receive, answer)
        elif _PLAIN.fullmatch(path) and ".." not in path:
            _only(method, "GET", *["HEAD"] * (path == "/"))
            if path == "/" and token is None:
                new = f"{self._cookie}={secrets.token_urlsafe(32)}"
                cookie = f"{new}; Path=/; HttpOnly; SameSite=Strict"
                answer.headers.append((b"set-cookie", cookie.encode()))
            await self._app(scope, receive, answer)
        else:
            raise Refusal(404, f"there is nothing at {path}; the page is at /")

    def _trusted(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        kept = []
        for name, value in headers:
            if name in _UNTRUSTED or name.startswith(b"x-forwarded-"):
                host = name == b"x-forwarded-host" and self._hosts.forwarded(
                    value.decode("latin-1")
                )
                if not host and (name, value) != (b"x-forwarded-proto", b"https"):
                    continue
            kept.append((name, value))
        return kept

    async def _check_user(self, users: Users, sent: str | None, answer: _Answer) -> None:
        if sent is not None and users.know(sent):
            return
        if sent is not None:
            await asyncio.sleep(_WRONG_SECONDS)
        answer.headers.append((b"www-authenticate", REALM.encode()))
        raise Refusal(401, "this page asks for a user and a password; reload it to give them")

    def _check_owner(self, session: str, token: str | None) -> None:
        if not self._line.owns(session, token):
            raise Refusal(403, "this session is another page's; reload the page")

    async def _call(
        self,
        scope: Scope,
        headers: Mapping[str, str],
        token: str | None,
        receive: Body,
        answer: _Answer,
    ) -> None:
        queued = scope["path"].endswith("join")
        sent = await self._receive_call(headers.get("content-length"), receive)
        session, body, named = parse_call(sent, self._calls, queued)
        self._check_owner(session, token)
        for path in named:
            if self._is_of_others(Path(os.path.realpath(path)), token):
                raise Refusal(403, "this file is another page's, or was removed; upload it again")
        if queued:
            self._joined.add(session)
        scope["headers"] = [
            *(
                pair
                for pair in scope["headers"]
                if pair[0] not in (b"content-length", b"content-type")
            ),
            (b"content-length", str(len(body)).encode()),
            (b"content-type", b"application/json"),
        ]
        await self._app(scope, replay([body], receive), answer)

    async def _receive_call(self, length: str | None, receive: Receive) -> bytes:
        taken = 0

        def count(part: bytes) -> None:
            nonlocal taken
            taken += len(part)
            self._buffered += len(part)
            if self._buffered > MAX_BUFFERED_BYTES:
                raise Refusal(503, "too many large requests come at once; try again in a minute")

        try:
            with await receive_body(receive, length, MAX_CALL_BYTES, count) as body:
                return body.read()
        finally:
            self._buffered -= taken

    async def _upload(
        self,
        scope: Scope,
        headers: Mapping[str, str],
        token: str | None,
        receive: Body,
        answer: _Answer,
    ) -> None:
        if self._uploads >= MAX_UPLOADS:
            raise Refusal(503, f"{MAX_UPLOADS} files are being uploaded; try again in a minute")
        self._uploads += 1
        try:
            form = OneFile(headers.get("content-type", ""))
            length = headers.get("content-length")
            try:
                body = await receive_body(receive, length, upload_limit(), form)
            except Refusal as refusal:
                if refusal.status != 413:
                    raise
                sentence = (
                    f"an upload may have {MAX_UPLOAD_BYTES:,} bytes at most; shrink the image"
                )
                raise Refusal(413, sentence) from None
            with body:
                form.finish()
                self._make_room()
                written = _Written(answer, lambda path: self._files.give(path, token))
                await self._app(scope, replay(body, receive), written)
        finally:
            self._uploads -= 1

    async def _watch(
        self,
        scope: Scope,
        query: Mapping[str, str],
        token: str | None,
        receive: Body,
        answer: _Answer,
    ) -> None:
        session = query.get("session_hash", "")
        if session not in self._joined:
            raise Refusal(404, "this session waits for nothing; reload the page")
        self._check_owner(session, token)
        if self._line.watchers(session) >= _MAX_WATCHERS:
            raise Refusal(429, "this session is followed already; reload the page")
        scope["query_string"] = urlencode({"session_hash": session}).encode()
        with self._line.watched(session):
            await self._app(scope, receive, answer)

    async def _heartbeat(
        self, scope: Scope, session: str, token: str | None, receive: Body, answer: _Answer
    ) -> None:
        self._check_owner(session, token)
        if self._heartbeats >= MAX_HEARTBEATS:
            raise Refusal(503, f"{MAX_HEARTBEATS} pages are open already; close one")
        self._heartbeats += 1
        try:
            await self._app(scope, receive, answer)
        finally:
            self._heartbeats -= 1

    def _is_of_others(self, real: Path, token: str | None) -> bool:
        """Whether a file in the folder is neither an example's nor this browser's."""
        if self._folder not in real.parents or real in self._kept:
            return False
        return not self._files.is_of(str(real), token)

    def _check_file(self, path: str, token: str | None) -> None:
        try:
            real = Path(os.path.realpath(path))
        except (OSError, ValueError):
            real = Path("/")
        if self._folder not in real.parents or not real.is_file():
            raise Refusal(403, "only uploaded and shown pictures are served as files")
        if self._is_of_others(real, token):
            raise Refusal(403, "this picture is another page's; open it where it was made")

    def _make_room(self) -> None:
        """Removes the oldest files for one more upload; those of the examples stay."""
        files = []
        for path in set(_files(self._folder)) - self._kept:
            with suppress(OSError):
                found = path.stat()
                files.append((found.st_mtime, found.st_size, path))
        room = MAX_STORED_BYTES - sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if room >= MAX_UPLOADS * MAX_UPLOAD_BYTES:
                return
            with suppress(OSError):
                path.unlink()
                room += size

    def forget(self, sessions: set[str]) -> None:
        """Forgets that these sessions asked for something."""
        self._joined -= sessions

    def idle(self) -> set[str]:
        """Sessions that asked for something, but have no job and no watcher."""
        return self._joined - self._line.sessions()


class _Written:
    """ASGI's `send` for an upload, which Gradio answers by a list of paths: tells of them first."""

    def __init__(self, send: Send, tell: Callable[[str], None]) -> None:
        self._send, self._tell, self._body = send, tell, b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                for path in self._paths():
                    self._tell(path)
        await self._send(message)

    def _paths(self) -> list[str]:
        try:
            found = json.loads(self._body)
        except ValueError:
            return []
        return [one for one in found if isinstance(one, str)] if isinstance(found, list) else []


class _Answer:
    """ASGI's `send`, with the headers that each answer has, and without those of other origins."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = self._broken = False
        self.headers: list[tuple[bytes, bytes]] = []

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] == 500:
                self._broken = True
                return
            own = [(name, value) for name, value in message.get("headers", []) if _is_kept(name)]
            message = {**message, "headers": [*own, *_SAFETY, *self.headers]}
            self.begun = True
        elif self._broken:
            if not message.get("more_body", False):
                self._broken = False
                await self.sentence(_broken())
            return
        await self._send(message)

    async def text(self, status: int, kind: bytes, body: bytes) -> None:
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self({"type": "http.response.body", "body": body})

    async def sentence(self, refusal: Refusal, receive: Body | None = None) -> None:
        """Answers a refusal; with `receive`, the connection is closed after what comes yet."""
        body = json.dumps({"detail": str(refusal), "error": str(refusal)}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *([(b"connection", b"close")] * (receive is not None)),
        ]
        start = {"type": "http.response.start", "status": refusal.status}
        self.begun = True
        await self._send({**start, "headers": [*headers, *_SAFETY, *self.headers]})
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        if receive is not None:
            await receive.drain()
        await self._send({"type": "http.response.body", "body": b""})

    async def refuse(self, refusal: Refusal, receive: Body) -> None:
        if not self.begun:
            await self.sentence(refusal, receive)


def _only(method: str, *allowed: str) -> None:
    if method not in allowed:
        raise Refusal(405, f"the method must be {' or '.join(allowed)}, got {method[:20]}")


def _broken() -> Refusal:
    return Refusal(500, "the page failed; the terminal has the details")


def _is_kept(name: bytes) -> bool:
    return not name.lower().startswith(b"access-control-")


def _query(scope: Scope) -> dict[str, str]:
    try:
        fields = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=16)
    except ValueError as error:
        raise Refusal(400, "the address has too many parameters; the page is at /") from error
    return {name: values[0] for name, values in fields.items()}


def _token(cookies: str, name: str) -> str | None:
    for cookie in cookies.split(";"):
        key, _, value = cookie.strip().partition("=")
        if key == name and _TOKEN.fullmatch(value):
            return value
    return None


def _files(folder: Path) -> list[Path]:
    return [Path(base) / name for base, _, names in os.walk(folder) for name in names]
