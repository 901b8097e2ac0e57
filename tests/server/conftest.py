"""A live server on 127.0.0.1, in a thread, on the golden checkpoint."""

from __future__ import annotations

import http.client
import json
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest

WAIT = 120  # seconds; a busy machine is slow, not wrong
KEY = "sk-right"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def refused(self, status: int, code: str) -> str:
        """The sentence of an error."""
        assert self.status == status, (self.status, self.body[:300])
        error = json.loads(self.body)["error"]
        assert error["code"] == code and set(error) == {"message", "type", "param", "code"}
        sentence = error["message"]
        assert 10 < len(sentence) <= 300 and sentence.isprintable()
        assert "Traceback" not in sentence
        return sentence


@dataclass(frozen=True)
class Live:
    """A server, and how to talk to it without a client's help."""

    port: int
    scheduler: Any = None
    pipe: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        given = {"Authorization": f"Bearer {KEY}"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, dict):
            body, given["Content-Type"] = json.dumps(body), "application/json"
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # the answer may be there
                connection.request(method, path, body, given)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def generate(self, **body: Any) -> Answer:
        return self.ask("POST", "/v1/images/generations", body)


@pytest.fixture(scope="session")
def serve(load_pipe):
    """Serves a pipeline of its own: `with serve(settings, options) as live`."""
    from bench.serve_soak import served
    from omnigen_fast.server.app import create_app
    from omnigen_fast.server.gate import allowed_hosts
    from omnigen_fast.server.options import Options
    from omnigen_fast.serving.metrics import Metrics
    from omnigen_fast.serving.scheduler import Scheduler, Settings

    @contextmanager
    def started(pipe: Any = None, settings: Any = None, **options: Any):
        pipe, metrics = pipe or load_pipe(), Metrics()
        scheduler = Scheduler(pipe, settings or Settings(), metrics)
        given = {"model_name": "tiny", "api_key": KEY, "steps": 4, "max_pixels": 128 * 128}
        given["hosts"] = allowed_hosts(["pictures.example"], "127.0.0.1")
        try:
            assert scheduler.wait_until_ready(WAIT)
            app = create_app(scheduler, Options(**{**given, **options}), metrics)
            with served(app) as port:
                yield Live(port, scheduler, pipe)
        finally:
            assert scheduler.close(join_seconds=WAIT)

    return started


@pytest.fixture(scope="module")
def live(serve):
    with serve() as one:
        yield one


@pytest.fixture(scope="module")
def client(live):
    """The openai client."""
    import openai

    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0, timeout=WAIT)
