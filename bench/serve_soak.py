"""Many requests from many clients on the bundled model's server, a third of them given up.

    python -m bench.serve_soak --requests 2000 --clients 50

Every picture that arrives is compared with the pipeline's own; malformed requests come between.
Afterwards the server must hold what it held before: tensors, threads, files and memory. Exits with
1 and says what is wrong otherwise; the last line is JSON.
"""

from __future__ import annotations

import argparse
import base64
import gc
import http.client
import io
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import uvicorn
from PIL import Image

from omnigen_fast import OmniGenPipeline
from omnigen_fast.server.app import create_app
from omnigen_fast.server.options import Options
from omnigen_fast.serving.metrics import Metrics
from omnigen_fast.serving.scheduler import Scheduler, Settings
from omnigen_fast.web import connections

_WAIT = 300.0  # seconds for an answer
_LEVELS = 1  # of 255: pictures made beside others differ by rounding
_PATH = "/v1/images/generations"
_MALFORMED = (
    b"",
    b"{",
    b"[]",
    b"\xff\xfe\x00",
    b'{"prompt": 1}',
    b'{"prompt": ""}',
    b'{"prompt": "a", "size": "7x7"}',
    b'{"prompt": "a", "nothing": 1}',
    b'{"prompt": "a", "seed": 1e400}',
    b'{"prompt": "' + b"a" * 5_000_000 + b'"}',
    b"[" * 100_000,
)


@contextmanager
def served(app: Any) -> Iterator[int]:
    """A server in a thread; yields its port."""
    opened = connections.listen("127.0.0.1", [0], "no port is free")
    server = _Server(connections.settings(app, 5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    try:
        yield opened.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)
        opened.close()


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def install_signal_handlers(self) -> None: ...


@dataclass
class Outcome:
    """What became of the requests."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        return {
            "counts": dict(self.counts),
            "problems": self.problems[:10],
            "seconds": round(self.seconds, 1),
            "before": self.before,
            "after": self.after,
        }


def soak(
    pipe: OmniGenPipeline,
    prompts: list[str],
    *,
    requests: int,
    clients: int,
    seed: int = 0,
    sides: tuple[int, ...] = (32, 48, 64),
) -> Outcome:
    """Runs the requests; see the module.

    Args:
        pipe: float32, which the server then uses.
        prompts: that the model understands.
        requests: how many, malformed ones not counted.
        clients: how many at a time.
        seed: of everything that is chosen by chance.
        sides: of the pictures, in pixels.
    """
    chance, outcome = random.Random(seed), Outcome()
    kinds = [
        {
            "prompt": chance.choice(prompts),
            "width": chance.choice(sides),
            "height": chance.choice(sides),
            "num_inference_steps": chance.randint(2, 9),
            "seed": number,
        }
        for number in range(24)
    ]
    pictures = [np.asarray(pipe(**kind, progress=False)[0], np.int16) for kind in kinds]
    metrics = Metrics()
    scheduler = Scheduler(pipe, Settings(max_queue=max(8, clients * 3 // 4)), metrics)
    assert scheduler.wait_until_ready(_WAIT)
    with served(create_app(scheduler, Options(model_name="soak"), metrics)) as port:
        for number, kind in enumerate(kinds[:4]):  # what the first requests leave stays
            _Client(port, outcome, chance.random()).finish(kind, pictures[number])
        _Client(port, outcome, chance.random()).malformed()
        outcome.before = _held()
        todo = iter([(i, chance.randrange(len(kinds)), chance.random()) for i in range(requests)])
        lock, start = threading.Lock(), time.monotonic()
        outcome.counts.clear()

        def work() -> None:
            while True:
                with lock:
                    item = next(todo, None)
                if item is None:
                    return
                number, which, own = item
                client = _Client(port, outcome, own)
                try:
                    if number % 3 == 2:
                        client.give_up(kinds[which])
                    else:
                        client.finish(kinds[which], pictures[which])
                    if number % 7 == 3:
                        client.malformed()
                except Exception as error:
                    outcome.problems.append(f"request {number}: {error!r}")

        threads = [threading.Thread(target=work) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        outcome.seconds = time.monotonic() - start
        _settle(scheduler, outcome)
        outcome.after = _held()
        _check(outcome, metrics, scheduler)
    if not scheduler.close(join_seconds=_WAIT):
        outcome.problems.append("the engine thread has not ended")
    return outcome


class _Client:
    """One client's connection after another."""

    def __init__(self, port: int, outcome: Outcome, seed: float) -> None:
        self._port, self._outcome = port, outcome
        self._chance = random.Random(seed)

    def finish(self, kind: dict[str, Any], picture: np.ndarray) -> None:
        """Asks until there is room, and compares what comes."""
        status, end = 429, time.monotonic() + _WAIT
        while status == 429 and time.monotonic() < end:
            status, headers, body = self._ask(json.dumps(kind).encode())
            if status == 429:
                self._outcome.counts["queue full"] += 1
                assert int(headers["retry-after"]) >= 1
                time.sleep(self._chance.random())
        assert status == 200, (status, body[:300])
        (data,) = json.loads(body)["data"]
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))), np.int16)
        if found.shape != picture.shape or np.abs(found - picture).max() > _LEVELS:
            self._outcome.problems.append(f"a wrong picture of {kind}")
        self._outcome.counts["right"] += 1

    def give_up(self, kind: dict[str, Any]) -> None:
        """Hangs up at a random moment, now and then in the middle of the request."""
        body = json.dumps({**kind, "stream": self._chance.random() < 0.5}).encode()
        head = f"POST {_PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        sent = head.encode() + body
        if self._chance.random() < 0.1:
            sent = sent[: self._chance.randrange(len(sent))]
        with socket.create_connection(("127.0.0.1", self._port), _WAIT) as connection:
            connection.sendall(sent)
            connection.settimeout(self._chance.random() ** 2 * 2 + 0.001)
            with suppress(TimeoutError, ConnectionError):
                connection.recv(1 << 16)
        self._outcome.counts["given up"] += 1

    def malformed(self) -> None:
        """What no client should send."""
        status, _, body = self._ask(self._chance.choice(_MALFORMED))
        assert 400 <= status < 500, (status, body[:300])
        json.loads(body)["error"]["message"]
        self._outcome.counts["malformed"] += 1

    def _ask(self, body: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_WAIT)
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # the answer may be there
                connection.request("POST", _PATH, body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()


def _settle(scheduler: Scheduler, outcome: Outcome) -> None:
    """Waits until nothing runs: those who hung up are noticed at the next step."""
    end = time.monotonic() + 30

    def left() -> bool:
        state = scheduler.state()
        files = len(os.listdir("/proc/self/fd"))
        return bool(state.running or state.waiting) or files > outcome.before["files"]

    while left():
        if time.monotonic() > end:
            outcome.problems.append(f"still there after 30 s: {scheduler.state()}")
            return
        time.sleep(0.05)


def _held() -> dict[str, float]:
    """What the process holds."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "tensors": len(tensors),
        "threads": sum(one.name.startswith("omnigen") for one in threading.enumerate()),
        "files": len(os.listdir("/proc/self/fd")),
        "resident_mb": round(resident / 1e6),
    }


def _check(outcome: Outcome, metrics: Metrics, scheduler: Scheduler) -> None:
    before, after = outcome.before, outcome.after
    # kept crops of the position table, conditions' counters: a few that come with new sizes
    if after["tensors"] > before["tensors"] + 40:
        outcome.problems.append(f"tensors: {before['tensors']} before, {after['tensors']} after")
    for name in ("threads", "files"):
        if after[name] > before[name]:
            outcome.problems.append(f"{name}: {before[name]} before, {after[name]} after")
    if after["resident_mb"] > before["resident_mb"] * 1.25 + 50:
        outcome.problems.append(f"memory: {before} before, {after} after")
    lines = metrics.text().decode().splitlines()
    done = sum(
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if line.startswith('omnigen_requests_finished_total{reason="done"}')
    )
    outcome.counts["done at the server"] = round(done)
    # those who hung up may have been served to the end, and the first four count too
    if (
        not outcome.counts["right"] + 4
        <= done
        <= outcome.counts["right"] + 4 + outcome.counts["given up"]
    ):
        outcome.problems.append(f"{done} done at the server, {outcome.counts['right']} arrived")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="shapes")
    given = parser.parse_args()
    pipe = OmniGenPipeline.from_pretrained(given.model, dtype="float32", device="cpu")
    prompts = ["a red circle", "a blue square", "a large green triangle", "a small yellow star"]
    outcome = soak(pipe, prompts, requests=given.requests, clients=given.clients, seed=given.seed)
    print(json.dumps(outcome.summary()))
    raise SystemExit(1 if outcome.problems else 0)


if __name__ == "__main__":
    main()
