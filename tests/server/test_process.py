"""`omnigen-fast serve` as a process: signals under load, a full disk, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from click.testing import CliRunner
from golden_cases import TINY

from omnigen_fast.cli.main import main

from .conftest import WAIT, Live
from .test_api import IMAGE, TEXT, form

pytestmark = pytest.mark.early

PROMPT = "A cat on a mat."
FILE_BYTES = 2 << 20  # that a file may have in a server on a small disk


class Process(Live):
    """A server's process."""

    process: subprocess.Popen

    def ready(self) -> None:
        end = time.monotonic() + WAIT
        while self.ask("GET", "/ready").status != 200:
            assert time.monotonic() < end and self.process.poll() is None
            time.sleep(0.05)

    def load(self, count: int, **body) -> list[threading.Thread]:
        """Sends requests and waits until all of them are accepted."""
        self.answers: list = []

        def ask() -> None:
            try:
                self.answers.append(self.generate(prompt=PROMPT, **body))
            except OSError as error:  # the process was killed
                self.answers.append(error)

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + WAIT
        while self._accepted() < count:
            assert time.monotonic() < end
            time.sleep(0.02)
        return threads

    def _accepted(self) -> int:
        lines = self.ask("GET", "/metrics").body.decode().splitlines()
        names = ("omnigen_requests_running ", "omnigen_requests_waiting ")
        return sum(round(float(line.split()[1])) for line in lines if line.startswith(names))


@contextmanager
def started(*options: str, port: int = 0, log=subprocess.DEVNULL, small_disk: bool = False):
    command = [sys.executable, "-m", "omnigen_fast", "serve", "--model", str(TINY)]
    command += ["--device", "cpu", "--dtype", "float32", "--model-name", "tiny"]

    command += [f"--port={port}", *options]
    if small_disk:
        limit = f'ulimit -f {FILE_BYTES >> 10} && exec "$@"'
        command = ["bash", "-c", limit, "serve", *command]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    late = threading.Timer(WAIT, process.kill)
    late.start()
    try:
        line = process.stdout.readline()
        live = Process(int(line.rsplit(":", 1)[1].strip("/\n")))
        object.__setattr__(live, "process", process)
        live.ready()
        late.cancel()
        yield live
    finally:
        late.cancel()
        process.kill()
        process.wait(WAIT)
        process.stdout.close()


@pytest.mark.slow
def test_a_full_disk_then_sigterm_under_load():
    """The log can't be written, nor an upload; then every accepted request is answered."""
    with (
        open("/dev/full", "w") as full,
        started("--max-queue=20", log=full, small_disk=True) as live,
    ):
        large = ('name="image"; filename="a.png"', IMAGE[1] + bytes(FILE_BYTES))
        kind = "multipart/form-data; boundary=edge"
        answer = live.ask("POST", "/v1/images/edits", form(TEXT, large), Content_Type=kind)
        assert "no room" in answer.refused(503, "disk_full")
        small = ('name="num_inference_steps"', b"2")
        answer = live.ask("POST", "/v1/images/edits", form(TEXT, IMAGE, small), Content_Type=kind)
        assert answer.status == 200
        threads = live.load(8, size="128x128", num_inference_steps=10)
        live.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + WAIT
        while (answer := live.ask("GET", "/ready")).status == 200:  # until the signal is handled
            assert time.monotonic() < end
        answer.refused(503, "shutting_down")
        answer = live.generate(prompt=PROMPT)
        answer.refused(503, "shutting_down")
        assert answer.headers["retry-after"]
        for thread in threads:
            thread.join(WAIT)
        assert [one.status for one in live.answers] == [200] * 8
        assert live.process.wait(60) == 0


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    """kill -9 leaves nothing in the way; what can't be drained in time gets a clear answer."""
    with started() as live:
        threads = live.load(4, num_inference_steps=50, size="256x256")
        live.process.kill()
        for thread in threads:
            thread.join(WAIT)
        assert all(isinstance(one, OSError) or one.status != 200 for one in live.answers)
    log = tmp_path / "log"
    options = ["--drain-seconds=0.2"]
    with open(log, "w") as file, started(*options, port=live.port, log=file) as again:
        assert again.generate(prompt=PROMPT, size="32x32", num_inference_steps=2).status == 200
        threads = again.load(4, num_inference_steps=100, size="256x256")
        again.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(WAIT)
        for answer in again.answers:
            assert "the server is ending" in answer.refused(503, "shutting_down")
        assert again.process.wait(60) == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sum(one.get("code") == "shutting_down" for one in lines) == 4
    assert sum(one.get("reason") == "closed" for one in lines) == 4
    assert {"event": "draining", "seconds": 0.2}.items() <= next(
        one for one in lines if one.get("event") == "draining"
    ).items()


@pytest.mark.parametrize(
    ("options", "environment", "sentence"),
    [
        (["--host", "0.0.0.0"], {}, "set an API key in OMNIGEN_API_KEY"),
        (["--host", "::", "--api-key-env", "KEY"], {}, "set an API key in KEY"),
        ([], {"OMNIGEN_API_KEY": ""}, "OMNIGEN_API_KEY is set but empty"),
        ([], {"OMNIGEN_API_KEY": "schlüssel"}, "printable ASCII"),
        (["--memory", "8"], {}, 'write "8GiB"'),
        (["--allowed-host", "a b"], {}, "must be a name or an address"),
        (["--host", "192.0.2.1", "--no-key"], {}, "can't listen at port"),
    ],
)
def test_refused(options, environment, sentence):
    command = ["serve", "--model", str(TINY), "--port", "0", *options]
    result = CliRunner().invoke(main, command, env={"OMNIGEN_API_KEY": None, **environment})
    assert result.exit_code in (1, 2) and sentence in result.output
    assert result.output.startswith("Error: ") and len(result.output.splitlines()) == 1


@pytest.mark.slow
def test_a_port_in_use_and_a_model_that_is_none(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = ["serve", "--model", str(TINY), f"--port={port}"]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1 and f"port {port} is in use" in result.output
    command = [sys.executable, "-m", "omnigen_fast", "serve", "--model", str(tmp_path), "--port=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 1
    assert "Error: the model can't be used" in done.stderr and "Traceback" not in done.stderr
