"""Starts the page: its socket, its model, and Gradio behind the gate."""

from __future__ import annotations

import ipaddress
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import OmniGenError
from ..pipeline import OmniGenPipeline
from ..web.hosts import Hosts
from . import ui
from .actions import Actions
from .bodies import MAX_UPLOAD_BYTES
from .components import cached, gr
from .gallery import gallery
from .gate import Gate
from .loras import Loras
from .server import Server, listen
from .users import VARIABLE, Users

_MAX_QUEUE = 64  # calls that Gradio may hold for a moment; the line is ours
_REMOVALS = 100  # tries, a hundredth of a second apart
_IDLE_SECONDS = 60  # after which a session's messages that nobody fetched are dropped


def serve(
    model: str,
    loading: Mapping[str, Any],
    host: str,
    port: int | None,
    allowed_hosts: tuple[str, ...],
    share: bool,
    out_dir: Path,
    loras: Sequence[tuple[str, float]] = (),
    auth: Path | None = None,
) -> int | None:
    """Loads the model and serves the page; returns the signal that ended it.

    Args:
        model: folder or hub id.
        loading: other arguments of `from_pretrained`; its `memory` bounds every picture, too.
        host, port: to listen at; the first free port from 7860 on without one.
        allowed_hosts: names that are answered besides those of this machine.
        share: whether to ask for a public link.
        out_dir: folder for pictures.
        loras: file, folder or hub id, and weight, of those that visitors can choose.
        auth: a file of users, see `Users.read`.

    Raises OmniGenError for options that can't be used.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise OmniGenError(f"--out-dir {out_dir} is a file; give a folder")
    names = [*allowed_hosts, *([] if host in ("0.0.0.0", "::") else [host])]
    Hosts.of(names)
    users = Users.read(auth)
    with listen(host, port) as opened:
        pipe = OmniGenPipeline.from_pretrained(model, **loading)
        hub = {name: loading[name] for name in ("cache_dir", "local_files_only")}
        offered = Loras(pipe, loras, **hub)
        actions = Actions(pipe, model, out_dir, offered, loading["memory"], loading)
        # apart from those of other programs, and gone with this one
        folder = tempfile.mkdtemp(prefix="omnigen-fast-", dir=os.environ.get("GRADIO_TEMP_DIR"))
        os.environ["GRADIO_TEMP_DIR"] = folder

        def end() -> None:
            actions.finish_writing()
            _remove(folder)

        try:
            used = opened.getsockname()[1]
            public = _share(used) if share else None
            if public is not None:
                names.append(str(urlsplit(public).hostname))
            server = _server(actions, Hosts.of(names), Path(folder), used, users)
            if users is None and (public or not _is_local(host)):
                print(_open_to_all("--share" if public else f"--host {host}"), file=sys.stderr)
            shown = f"[{host}]" if ":" in host else host
            print(f"The page is at http://{shown}:{used}/", flush=True)
            if public:
                print(f"and, for anyone who has the link, at {public}", flush=True)
            elif share:
                print("There is no public link: Gradio's server provided none", flush=True)
            return server.serve_until_told(opened, end)
        finally:
            end()
            from gradio.tunneling import CURRENT_TUNNELS

            for tunnel in CURRENT_TUNNELS:
                tunnel.kill()


def _remove(folder: str) -> None:
    """Also where Gradio is still copying the last picture into it."""
    for _ in range(_REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.01)
        if not os.path.exists(folder):
            return


def _server(
    actions: Actions, hosts: Hosts, folder: Path, port: int, users: Users | None = None
) -> Server:
    """The server of the page, with the gate in front of Gradio."""
    from fastapi import FastAPI  # Gradio needs it, so it is there

    blocks = ui.build(actions).queue(max_size=_MAX_QUEUE)
    application = gr.mount_gradio_app(
        FastAPI(openapi_url=None, docs_url=None, redoc_url=None),
        blocks,
        path="/",
        footer_links=[],
        max_file_size=MAX_UPLOAD_BYTES,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        theme=ui.theme(),
        css=ui.CSS,
        head=ui.head(actions),
    )
    blocks.has_launched = True  # else Gradio checks no paths
    for example in gallery(actions.model).examples:
        for path in example.images:
            cached(path)
    calls = ui.calls(blocks, len(gallery(actions.model).examples))
    gate = Gate(application, hosts, calls, actions.line, folder, actions.files, port, users)
    idle: set[str] = set()
    seconds = 0

    def every_second() -> None:
        nonlocal idle, seconds
        actions.line.expire()
        seconds += 1
        if seconds % _IDLE_SECONDS == 0:
            still = idle & gate.idle()
            gate.forget(still)
            _forget(blocks, still)
            idle = gate.idle()

    return Server(gate, actions.line.close, every_second)


def _forget(blocks: gr.Blocks, sessions: set[str]) -> None:
    """Drops messages for sessions that never fetched them; Gradio would keep them."""
    queue = blocks._queue
    for session in sessions:
        for kept in (queue.pending_messages_per_session, queue.pending_event_ids_session):
            kept.pop(session, None)


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _open_to_all(option: str) -> str:
    return (
        f"Warning: with {option}, whoever reaches this machine can make pictures; --auth FILE or "
        f"{VARIABLE} asks for a password"
    )


def _share(port: int) -> str | None:
    """A public address from Gradio's server, or None."""
    from gradio.networking import setup_tunnel

    try:
        return setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
    except Exception:  # of any kind: the page itself works without
        return None
