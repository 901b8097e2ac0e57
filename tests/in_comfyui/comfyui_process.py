"""ComfyUI as a process, with folders of its own, and a client of its HTTP API and its socket."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A node folder of the test: tells what the memory manager and the pipelines hold.
_SPY = """
import gc

from aiohttp import web
from comfy import model_management
from comfy_execution.progress import get_progress_state
from server import PromptServer

NODE_CLASS_MAPPINGS = {}


@PromptServer.instance.routes.get("/spy")
async def spy(_request):
    from omnigen_fast.comfyui.memory import Patcher

    progress = get_progress_state().nodes.values()
    held = [one for one in gc.get_objects() if isinstance(one, Patcher)]
    return web.json_response({
        "steps": max((one["value"] for one in progress), default=0),
        "managed": len(model_management.current_loaded_models),
        "loaded": [one._pipe.engine._model is not None for one in held],
    })
"""


class ComfyUI:
    """A running ComfyUI."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder, port

    def ask(self, path: str, body: Any = None) -> Any:
        """The answer to a request, as JSON, or a dictionary with `error`."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            text = error.read()
        return json.loads(text) if text else None

    def queue(self, prompt: dict[str, Any], client: str | None = None) -> str:
        answer = self.ask("/prompt", {"prompt": prompt, "client_id": client})
        assert "prompt_id" in answer, answer
        return answer["prompt_id"]

    def finished(self, prompt_id: str, seconds: float = 300) -> dict[str, Any]:
        """The history of a prompt, once it is over."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := self.ask(f"/history/{prompt_id}"):
                return found[prompt_id]
            time.sleep(0.1)
        raise AssertionError("the prompt does not end")

    def pictures(self, history: dict[str, Any], node: str) -> list[Path]:
        """Files that a node has saved."""
        assert history["status"]["status_str"] == "success", history["status"]
        return [
            self.folder / "output" / one["filename"] for one in history["outputs"][node]["images"]
        ]

    @contextlib.contextmanager
    def events(self, client: str) -> Iterator[Iterator[tuple[str, Any]]]:
        """What the server tells a page: (type, data) of texts, ("preview", bytes) of pictures."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=300) as line:
            key = base64.b64encode(uuid.uuid4().bytes).decode()
            line.sendall(
                f"GET /ws?clientId={client} HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
                f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
                "Sec-WebSocket-Version: 13\r\n\r\n".encode()
            )
            file = line.makefile("rb")
            while file.readline().strip():  # the answer's head
                pass
            yield _frames(file)


def _frames(file: Any) -> Iterator[tuple[str, Any]]:
    """Messages of a WebSocket (RFC 6455): the server masks none and, being small, splits none."""
    while len(head := file.read(2)) == 2:
        code, size = head[0] & 15, head[1] & 127
        if size > 125:
            size = struct.unpack(">H" if size == 126 else ">Q", file.read(2 if size == 126 else 8))[
                0
            ]
        data = file.read(size)
        if code == 1:
            message = json.loads(data)
            yield message["type"], message["data"]
        elif code == 2:
            yield "preview", data[data.index(b"\xff\xd8") :]


@contextlib.contextmanager
def running(program: Path, python: str, folder: Path) -> Iterator[ComfyUI]:
    """Starts ComfyUI on the CPU with `folder` for its data, and ends it."""
    spy = folder / "custom_nodes/spy"
    spy.mkdir(parents=True)
    (spy / "__init__.py").write_text(_SPY)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [python, "main.py", "--cpu", "--port", str(port), "--base-directory", str(folder)]
    command += ["--disable-auto-launch", "--database-url", f"sqlite:///{folder}/data.db"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=program, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    comfyui = ComfyUI(folder, port)
    try:
        end = time.monotonic() + 180
        while True:
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            with contextlib.suppress(OSError):
                comfyui.ask("/system_stats")
                break
            time.sleep(0.5)
        yield comfyui
    finally:
        process.terminate()
        process.wait(60)
