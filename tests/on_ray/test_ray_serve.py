"""The server on Ray Serve: two replicas, one of which is killed under load."""

from __future__ import annotations

import base64
import io
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from golden_cases import TINY
from PIL import Image

from omnigen_fast.errors import RequestError

SECONDS = 200  # that anything may take
KEY = "a key of this test"
CALL = {"height": 32, "width": 48, "num_inference_steps": 2}
SEEDS = range(4)
RUN = "from ray.serve.scripts import cli; cli()"


class Served:
    """`serve run` as a user starts it, on a Ray of its own."""

    def __init__(self, folder: Path, **arguments: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {
            **os.environ,
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on loopback alone
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "OMNIGEN_API_KEY": KEY,
        }
        application = {"import_path": "omnigen_fast.ray:app", "args": arguments}
        config = folder / "serve.yaml"  # of which JSON is a part
        http = {"host": "127.0.0.1", "port": port}
        config.write_text(json.dumps({"http_options": http, "applications": [application]}))
        self.address = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, "run", str(config)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, Any]:
        """Status and answer; status 0 if there is none."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data)
        request.add_header("Content-Type", "application/json")
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")
        except OSError as error:
            return 0, str(error)

    def replicas(self) -> list[psutil.Process]:
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                is_replica = "ServeReplica" in "".join(child.cmdline())
            except psutil.Error:  # it has just ended
                continue
            if is_replica and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        return found

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + SECONDS
        while not (found := condition()):
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return found

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        finally:
            self.process.kill()


@pytest.fixture
def served(tmp_path) -> Iterator[Served]:
    model = {"model": str(TINY), "model_name": "tiny", "dtype": "float32"}
    served = Served(tmp_path, **model, gpus=0, cpus=0.5, replicas=2, drain_seconds=2)
    try:
        served.wait_for(lambda: served.ask("/ready")[0] == 200)
        served.wait_for(lambda: len(served.replicas()) == 2)
        yield served
    finally:
        served.end()


def pixels(image: Image.Image) -> np.ndarray:
    return np.array(image.convert("RGB"), dtype=int)


def generation(seed: int) -> dict[str, Any]:
    call = {"size": "48x32", "num_inference_steps": 2, "output_format": "png"}
    return {"model": "tiny", "prompt": f"Cat {seed}.", "seed": seed, **call}


def picture(answer: Any) -> np.ndarray:
    return pixels(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))))


def test_answers_while_a_replica_is_killed(served, pipe):
    expected = {seed: pixels(pipe(f"Cat {seed}.", **CALL, seed=seed)[0]) for seed in SEEDS}
    first = served.replicas()
    told = threading.Event()
    done: list[tuple[float, int]] = []  # when each request was answered, and its tries
    wrong: list[Any] = []

    def client(seed: int) -> None:
        while not told.is_set():
            for attempt in range(1, 6):  # the openai client, too, repeats after 5xx
                status, answer = served.ask("/v1/images/generations", generation(seed))
                if status == 200:
                    break
                time.sleep(0.2 * attempt)
            if status != 200 or np.abs(picture(answer) - expected[seed]).max() > 1:
                wrong.append((status, answer))
            done.append((time.monotonic(), attempt))

    clients = [threading.Thread(target=client, args=(seed,), daemon=True) for seed in SEEDS]
    for one in clients:
        one.start()
    served.wait_for(lambda: len(done) >= 8)
    first[0].kill()
    killed = time.monotonic()
    back = served.wait_for(lambda: set(served.replicas()) - set(first))
    appeared = time.monotonic()
    served.wait_for(lambda: sum(when > appeared for when, _ in done) >= 8)
    told.set()
    for one in clients:
        one.join(SECONDS)
        assert not one.is_alive()
    assert back and not wrong
    assert sum(when > killed for when, _ in done) >= 12
    assert sum(attempts > 1 for _, attempts in done) <= 3 * len(SEEDS)  # those on their way then

    status, answer = served.ask("/v1/models")
    assert status == 200 and [one["id"] for one in answer["data"]] == ["tiny"]
    assert served.ask("/v1/models", key=None)[0] == 401
    status, answer = served.ask("/v1/images/generations", {**generation(0), "size": "40x33"})
    assert status == 400 and "multiple of 16" in answer


class TestArguments:
    """What `serve run` does with them before anything is started."""

    @pytest.fixture(autouse=True)
    def key(self, monkeypatch):
        monkeypatch.setenv("OMNIGEN_API_KEY", KEY)

    def build(self, **given: str) -> Any:
        from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

        from omnigen_fast.ray import app

        return call_user_app_builder_with_args_if_necessary(app, given)

    def test_replicas_gpus_and_autoscaling(self):
        deployment = self.build(replicas="2", gpus="0.5", cpus="3")._bound_deployment
        assert deployment.num_replicas == 2
        options = deployment.ray_actor_options
        assert (options["num_gpus"], options["num_cpus"]) == (0.5, 3)
        scaled = self.build(replicas="2", max_replicas="8", target_requests="3")._bound_deployment
        found = scaled._deployment_config.autoscaling_config
        assert (found.min_replicas, found.max_replicas) == (2, 8)
        assert found.target_ongoing_requests == 3

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"modle": "m"}, "modle"),
            ({"replicas": "0"}, "replicas"),
            ({"replicas": "3", "max_replicas": "2"}, "max_replicas must be at least replicas=3"),
            ({"policy": "random"}, "policy must be shortest or fcfs"),
            ({"memory": "lots"}, "lots"),
            ({"api_key_env": "NO_SUCH_VARIABLE"}, "set an API key in NO_SUCH_VARIABLE"),
        ],
        ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
    )
    def test_what_can_not_be_used(self, given, message):
        with pytest.raises(ValueError, match=message):  # pydantic's errors are, too
            self.build(**given)

    def test_without_a_key_only_on_request(self, monkeypatch):
        monkeypatch.delenv("OMNIGEN_API_KEY")
        with pytest.raises(RequestError, match="no_key=true"):
            self.build()
        assert self.build(no_key="true")
