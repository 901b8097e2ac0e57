"""The page's server against those who wish it ill: a process of its own, raw requests."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from golden_cases import GOLDEN, TINY
from page_fields import page_fields
from PIL import Image

from omnigen_fast.page.bodies import MAX_CALL_BYTES, MAX_UPLOAD_BYTES
from omnigen_fast.page.embedded import saving
from omnigen_fast.page.record import Record, read_record, recorded_arguments

pytest.importorskip("gradio")
pytestmark = [pytest.mark.early, pytest.mark.slow]

CAT = GOLDEN / "images/cat.png"
GENERATE, EXAMPLE, STOP, PLANS, LOAD = 0, 1, 3, 4, 7  # Gradio's numbers of the page's actions
WAIT = 120  # seconds; a busy machine is slow, not wrong
# The request that a picture carries.
RECORD = Record(
    model="tiny",
    prompts=("A cat.",),
    input_images=((),),
    negative_prompts=None,
    arguments=recorded_arguments(
        {
            "height": 32,
            "width": 32,
            "num_inference_steps": 2,
            "guidance_scale": 2.5,
            "use_img_guidance": True,
            "img_guidance_scale": 1.6,
            "max_input_image_size": 32,
            "use_input_image_size_as_output": False,
            "num_images_per_prompt": 1,
            "seed": 0,
            "dtype": "float32",
        }
    ),
).text()
# Shorter times than in use, so that the tests need not wait for those.
START = """
import sys
from omnigen_fast.web import bodies, connections
connections.REQUEST_SECONDS, connections.STALLED_SECONDS, bodies._FIRST_SECONDS = 2.0, 2.0, 2.0
{more}
from omnigen_fast.cli import main
main(["app", *sys.argv[1:]], prog_name="omnigen-fast")
"""
# A picture that takes a second to write.
SLOW_SAVE = """
import time
from PIL import Image
save = Image.Image.save
def slow(self, path, *arguments, **options):
    if str(path).endswith(".png"):
        open(path, "wb").write(b"half a picture")
        print("writing", flush=True)
        time.sleep(1)
    save(self, path, *arguments, **options)
Image.Image.save = slow
"""


@dataclass
class Server:
    """The page's process, and how to talk to it."""

    process: subprocess.Popen
    port: int
    folder: Path
    temporary: Path

    def ask(self, method: str, path: str, body=None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if isinstance(body, dict | list):
            body, given["Content-Type"] = json.dumps(body), "application/json"
        try:
            with suppress(BrokenPipeError, ConnectionResetError):  # the answer may be there
                connection.request(method, path, body, given)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def join(self, session: str, call: int = 0, **changes) -> Answer:
        body = {"data": data(**changes), "fn_index": call, "session_hash": session}
        return self.ask("POST", "/gradio_api/queue/join", body)

    def load(self, session: str, file) -> Answer:
        """Asks for the settings that a picture carries."""
        body = {"data": [file], "fn_index": LOAD, "session_hash": session}
        return self.ask("POST", "/gradio_api/queue/join", body)

    def events(self, session: str, path: str = "/gradio_api/queue/data") -> str:
        """All events of a session, until its calls have ended."""
        return self.ask("GET", f"{path}?session_hash={session}").body.decode()

    def upload(self, body: bytes, name: str = "cat.png", form: str = "files") -> Answer:
        return self.ask(
            "POST",
            "/gradio_api/upload",
            part(name, body, form) + b"--edge--\r\n",
            Content_Type="multipart/form-data; boundary=edge",
        )

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=WAIT)

    def resident(self) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) << 10

    def pictures(self) -> set[str]:
        return set(os.listdir(self.folder)) if self.folder.exists() else set()


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def refused(self, *statuses: int) -> str:
        """The sentence of a refusal."""
        assert self.status in (statuses or range(400, 500)), (self.status, self.body[:300])
        sentence = json.loads(self.body)["detail"]
        assert 10 < len(sentence) <= 300 and sentence.isprintable()
        assert "Traceback" not in sentence
        return sentence


def part(name: str, body: bytes, form: str = "files") -> bytes:
    header = f'Content-Disposition: form-data; name="{form}"; filename="{name}"'
    return b"--edge\r\n" + header.encode() + b"\r\n\r\n" + body + b"\r\n"


def watch(session: str) -> bytes:
    path = f"/gradio_api/queue/data?session_hash={session}"
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def data(**changes) -> list:
    return page_fields(**{"negative_prompt": "ugly", **changes})


@contextmanager
def started(folder: Path, *options: str, more: str = "", **environment: str) -> Iterator[Server]:
    """A server in a folder of its own."""
    temporary = folder / "temporary"
    temporary.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", START.format(more=more), "--model", str(TINY)]
    command += ["--device", "cpu", "--dtype", "float32", "--local-files-only"]
    own = {"OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(temporary)}
    with open(folder / "errors", "w") as errors:
        process = subprocess.Popen(
            [*command, f"--port={port}", *options],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | own | environment,
        )
    try:
        line = process.stdout.readline()
        assert line.startswith("The page is at "), (folder / "errors").read_text()
        yield Server(process, port, folder / "omnigen-pictures", temporary)
    finally:
        process.kill()
        process.communicate()
    said = (folder / "errors").read_text()
    assert "Traceback" not in said, said


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with started(tmp_path_factory.mktemp("page")) as one:
        yield one


class TestHosts:
    @pytest.mark.parametrize(
        "host", ["127.0.0.1", "localhost", "LOCALHOST:{port}", "[::1]:{port}", "127.0.0.1:{port}"]
    )
    def test_known(self, server, host):
        assert server.ask("GET", "/", Host=host.format(port=server.port)).status == 200

    @pytest.mark.parametrize(
        "host",
        ["evil.example", "127.0.0.1.evil.example", "evil.example:{port}", "", "localhost@evil"]
        + ["169.254.169.254", "[::2]", "127.0.0.1 evil", "x" * 5000, "\xff"],
    )
    @pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/queue/join"])
    def test_unknown(self, server, host, path):
        method = "POST" if path.endswith("join") else "GET"
        answer = server.ask(method, path, Host=host.format(port=server.port))
        answer.refused(403)
        assert "set-cookie" not in answer.headers

    def test_missing(self, server):
        with server.raw() as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 403")

    @pytest.mark.parametrize("name", ["X-Forwarded-Host", "X-Gradio-Server", "Forwarded"])
    def test_a_client_chooses_no_root(self, server, name):
        answer = server.ask("GET", "/", **{name: "evil.example"})
        assert answer.status == 200 and b"evil.example" not in answer.body

    @pytest.mark.parametrize(
        "origin", ["http://evil.example", "null", "http://localhost:1", "file://", "https://[", ""]
    )
    @pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
    def test_other_origins(self, server, origin, method):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answer = server.ask(method, "/gradio_api/queue/join", **headers)
        answer.refused(403)
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]

    @pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
    def test_the_page_itself(self, server, name):
        origin = f"http://{name}:{server.port}"
        answer = server.ask("GET", "/", Origin=origin)
        assert answer.status == 200
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]

    @pytest.mark.parametrize("mode", ["no-cors", "cors", "websocket"])
    def test_requests_of_other_pages(self, server, mode):
        headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": mode}
        server.ask("GET", "/", **headers).refused(403)

    def test_shown_in_another_page(self, server):
        headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        server.ask("GET", "/", **headers, Sec_Fetch_Dest="iframe").refused(403)
        answer = server.ask("GET", "/", **headers, Sec_Fetch_Dest="document")  # a link
        assert answer.status == 200
        assert "frame-ancestors 'self'" in answer.headers["content-security-policy"]

    def test_allowed(self, tmp_path):
        with started(tmp_path, "--allowed-host", "page.example", "--host", "127.0.0.2") as one:
            connection = http.client.HTTPConnection("127.0.0.2", one.port, timeout=WAIT)
            for host, status in {
                "page.example": 200,
                "127.0.0.2": 200,
                "localhost": 200,
                "evil.example": 403,
            }.items():
                connection.request("GET", "/", headers={"Host": host})
                answer = connection.getresponse()
                answer.read()
                assert answer.status == status, host
            connection.request(
                "GET",
                "/",
                headers={"X-Forwarded-Host": "page.example", "X-Forwarded-Proto": "https"},
            )
            assert b'"https://page.example"' in connection.getresponse().read()


class TestUsers:
    @pytest.fixture(scope="class")
    def guarded(self, tmp_path_factory) -> Iterator[Server]:
        folder = tmp_path_factory.mktemp("guarded")
        (folder / "users").write_text("ann:a secret\nbob:pass:word\n")
        quick = "from omnigen_fast.page import gate; gate._WRONG_SECONDS = 0.2"
        with started(folder, "--auth", "users", more=quick) as one:
            yield one

    def login(self, text: str) -> dict[str, str]:
        return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}

    @pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/file=/x", "/nothing"])
    def test_without_a_password_there_is_nothing(self, guarded, path):
        answer = guarded.ask("GET", path)
        answer.refused(401)
        assert answer.headers["www-authenticate"].startswith("Basic realm=")
        assert "set-cookie" not in answer.headers

    @pytest.mark.parametrize("user", ["ann:a secret", "bob:pass:word"])
    def test_with_one_there_is_the_page(self, guarded, user):
        assert guarded.ask("GET", "/", **self.login(user)).status == 200

    @pytest.mark.parametrize(
        "user", ["ann:pass:word", "ann:", ":", "", "ann", "eve:a secret", "ann:a secret "]
    )
    def test_wrong_ones_wait_and_are_refused(self, guarded, user):
        start = time.monotonic()
        guarded.ask("GET", "/", **self.login(user)).refused(401)
        assert time.monotonic() - start >= 0.2

    @pytest.mark.parametrize(
        "header", ["Basic", "Basic !!!", "Basic /w==", "Bearer x", "Basic " + "A" * 20_000, "\xff"]
    )
    def test_what_is_no_login(self, guarded, header):
        guarded.ask("GET", "/", Authorization=header).refused(401)

    def test_uploads_and_calls_need_one_too(self, guarded):
        body = {"data": data(), "fn_index": GENERATE, "session_hash": "a"}
        guarded.ask("POST", "/gradio_api/queue/join", body).refused(401)
        guarded.upload(b"x").refused(401)
        user = self.login("ann:a secret")
        assert guarded.ask("POST", "/gradio_api/queue/join", body, **user).status == 200

    def test_from_the_environment(self, tmp_path):
        with started(tmp_path, OMNIGEN_PAGE_AUTH="eve:x") as one:
            one.ask("GET", "/").refused(401)
            assert one.ask("GET", "/", **self.login("eve:x")).status == 200

    @pytest.mark.slow
    def test_open_to_others_without_a_password_is_one_line(self, tmp_path):
        with started(tmp_path, "--host", "127.0.0.1") as one:
            pass
        assert (tmp_path / "errors").read_text() == ""
        other = tmp_path / "other"
        other.mkdir()
        with started(other, "--host", "0.0.0.0") as one:
            assert one.ask("GET", "/").status == 200
        (line,) = (other / "errors").read_text().splitlines()
        assert line.startswith("Warning: with --host 0.0.0.0, whoever reaches this machine")
        assert "--auth FILE or OMNIGEN_PAGE_AUTH" in line


@pytest.mark.parametrize(
    "proxies",
    [
        dict.fromkeys(("http_proxy", "HTTPS_PROXY", "all_proxy"), "http://127.0.0.1:9"),
        {"ALL_PROXY": "socks5://127.0.0.1:9", "http_proxy": "no address", "NO_PROXY": "*,,["},
    ],
    ids=["dead", "odd"],
)
def test_its_own_address_goes_through_no_proxy(tmp_path, proxies):
    with started(tmp_path, **proxies) as one:
        assert one.ask("GET", "/").status == 200
        assert one.join("a").status == 200
        assert "Done: 2 steps" in one.events("a")


class TestBodies:
    @pytest.mark.parametrize("chunked", [False, True])
    def test_a_huge_prompt(self, server, chunked):
        before = server.resident()
        body = json.dumps({"data": data(prompt="a" * (150 << 20)), "fn_index": 0}).encode()
        sent = iter([body[i : i + 65536] for i in range(0, len(body), 65536)]) if chunked else body
        answer = server.ask("POST", "/gradio_api/queue/join", sent)
        assert f"{MAX_CALL_BYTES:,} bytes" in answer.refused(413)
        assert server.resident() - before < 40 << 20

    def test_a_huge_upload(self, server):
        before, block = server.resident(), bytes(1 << 20)
        head = b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1073741824"
        head += b"\r\nContent-Type: multipart/form-data; boundary=edge\r\n\r\n"
        with server.raw() as connection:
            connection.sendall(head)
            with suppress(BrokenPipeError, ConnectionResetError):
                for _ in range(1024):
                    connection.sendall(block)
            assert connection.recv(100).startswith(b"HTTP/1.1 413")
        assert server.resident() - before < 40 << 20

    def test_a_huge_upload_of_unknown_length(self, server):
        before = server.resident()
        blocks = iter([part("a.png", b""), *[bytes(1 << 20)] * 200])
        answer = server.ask(
            "POST",
            "/gradio_api/upload",
            blocks,
            Content_Type="multipart/form-data; boundary=edge",
        )
        assert f"{MAX_UPLOAD_BYTES:,} bytes" in answer.refused(413)
        assert server.resident() - before < 40 << 20
        assert not list(server.temporary.rglob("tmp*"))

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"[]",
            b"null",
            b"\xff\xfe",
            b"[" * 100_000,
            b'{"data": [' + b"[" * 100_000,
            b'{"data": NaN}',
            b'{"fn_index": 1' + b"0" * 5000 + b"}",
        ],
        ids=lambda body: body[:12],
    )
    @pytest.mark.parametrize("path", ["queue/join", "run/predict"])
    def test_what_is_no_call(self, server, body, path):
        server.ask("POST", f"/gradio_api/{path}", body).refused(400)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"fn_index": 99}, "fn_index 99 is no action"),
            ({"fn_index": -1}, "is no action"),
            ({"fn_index": "0"}, "is no action"),
            ({"fn_index": True}, "is no action"),
            ({"fn_index": None}, "is no action"),
            ({"fn_index": 10**300}, "is no action"),
            ({"fn_index": 3}, "is no action"),  # stop, which is not queued
            ({"data": []}, "list of 22 fields"),
            ({"data": None}, "list of 22 fields"),
            ({"data": {"prompt": "x"}}, "list of 22 fields"),
            ({"data": [*data(), None]}, "list of 22 fields"),
            ({"session_hash": None}, "session_hash"),
            ({"session_hash": 7}, "session_hash"),
            ({"session_hash": ""}, "session_hash"),
            ({"session_hash": "../../x"}, "session_hash"),
            ({"session_hash": "x" * 100_000}, "session_hash"),
            *(
                ({"data": data(**{field: value})}, "must be")
                for field, values in {
                    "prompt": (7, ["a"], {"a": 1}, True),
                    "image_1": ("/etc/passwd", [], 7, {}, {"path": 7}, [{"path": "x"}]),
                    "height": ("32", [32], {}, True, 10**400, 1e308),
                    "guidance_scale": ("nan", "x" * 10_000),
                    "randomize": ("yes", 1, None or []),
                    "memory": ({}, [], 8),
                    "mask": ("/etc/passwd", [], 7, {"path": 7}),
                    "mask_blur": ("3", {}, True),
                    "pictures": ("3", [], True, 10**400),
                    "seeds": (7, [1, 2], {}),
                    "lora": (7, ["style"], {"path": "x"}),
                    "lora_strength": ("1", [], True),
                }.items()
                for value in values
            ),
            ({"data": data(image_1={"path": "http://127.0.0.1/a.png"})}, "must be uploaded"),
            ({"data": data(image_1={"path": "a\0.png"})}, "must be uploaded"),
            ({"data": data(image_1={"path": "\ud800"})}, "must be uploaded"),
            ({"data": data(image_1={"path": "x" * 100_000})}, "must be uploaded"),
            ({"data": data(mask={"path": "http://127.0.0.1/a.png"})}, "must be uploaded"),
        ],
        ids=lambda value: None if isinstance(value, str) else str(value)[:48],
    )
    def test_wrong_calls(self, server, change, words):
        body = {"data": data(), "fn_index": 0, "session_hash": "wrong"} | change
        assert words in server.ask("POST", "/gradio_api/queue/join", body).refused(400, 404)

    @pytest.mark.parametrize("index", [-1, 999, "0", None, 1.5, True])
    def test_examples_that_are_none(self, server, index):
        body = {"data": [index], "fn_index": 1, "session_hash": "example"}
        server.ask("POST", "/gradio_api/run/predict", body).refused(400)

    def test_unknown_fields_are_of_no_use(self, server):
        body = {"data": data(), "fn_index": 0, "session_hash": "fields", "batched": True}
        body |= {"simple_format": True, "event_data": {"a": 1}, "trigger_id": "x", "event_id": []}
        assert server.ask("POST", "/gradio_api/queue/join", body).status == 200
        assert "Done: 2 steps" in server.events("fields")

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"height": 1e9}, "height must be"),
            ({"height": None}, "height must be"),
            ({"steps": 10**9}, "num_inference_steps must be"),
            ({"seed": 1e30}, "seed must be"),
            ({"prompt": "a" * 1_200_000}, "prompt"),
            ({"prompt": "\ud800"}, "prompt holds"),
            ({"memory": "9" * 5000 + "GiB"}, "memory"),
            ({"memory": "\ud800"}, "memory"),
            ({"negative_prompt": "\ud800"}, "negative_prompt"),
            ({"pictures": 1e9}, "pictures must be"),
            ({"pictures": 1.5}, "pictures must be"),
            ({"seeds": "1," * 100_000}, "at most 16 seeds"),
            ({"seeds": "9" * 5000}, "seeds must be integers"),
            ({"seeds": "\ud800"}, "seeds must be integers"),
        ],
        ids=lambda value: None if isinstance(value, str) else str(value)[:32],
    )
    def test_wrong_values_get_the_sentences_of_python(self, server, change, words):
        for call in (0, 4):
            session = f"value{call}"
            assert server.join(session, call, **change).status == 200
            events = server.events(session)
            assert 'role=\\"alert' in events and words in events
            assert "it failed (" not in events

    @pytest.mark.parametrize("field", ["image_1", "mask"])
    def test_a_picture_that_costs_too_much_is_refused_in_time(self, server, field):
        """A mask of 1 x 65,000 pixels, and one of 100 megapixels in 100 KB."""
        (cat,) = json.loads(server.upload(CAT.read_bytes()).body)
        for size in ((1, 65_000), (20_000, 20_000)):
            written = io.BytesIO()
            Image.new("1", size, 1).save(written, "png")
            (path,) = json.loads(server.upload(written.getvalue(), "m.png").body)
            files = {"image_1": {"path": cat}} | {field: {"path": path}}
            start, session = time.monotonic(), f"dear{field}{size[0]}"
            prompt = "<img><|image_1|></img> Make it black."
            assert server.join(session, prompt=prompt, **files).status == 200
            events = server.events(session)
            assert 'role=\\"alert' in events and "it failed (" not in events
            assert time.monotonic() - start < WAIT

    @pytest.mark.parametrize(
        "content",
        [b"", b"x", CAT.read_bytes(), b"\x89PNG\r\n\x1a\n" + b"\xff" * 100, bytes(1 << 20)],
        ids=["empty", "text", "plain", "damaged", "zeros"],
    )
    def test_settings_from_what_carries_none(self, server, content):
        (path,) = json.loads(server.upload(content, "a.png").body)
        session = f"load{len(content)}"
        assert server.load(session, {"path": path}).status == 200
        events = server.events(session)
        assert 'role=\\"alert' in events and "it failed (" not in events
        assert str(server.temporary) not in events

    @pytest.mark.parametrize("change", [{"height": 10**400}, {"seed": 10**300}, {"steps": 1e999}])
    def test_settings_that_no_browser_can_hold(self, server, change):
        fields = json.loads(RECORD) | {
            {"steps": "num_inference_steps"}.get(name, name): one for name, one in change.items()
        }
        written = io.BytesIO()
        Image.new("RGB", (8, 8)).save(written, "png", **saving(json.dumps(fields), ".png"))
        (path,) = json.loads(server.upload(written.getvalue(), "a.png").body)
        session = f"hold{min(change)}"
        assert server.load(session, {"path": path}).status == 200
        events = server.events(session)
        assert "it failed (" not in events
        assert ("no page can use" in events or "damaged" in events) == ("seed" not in change)

    @pytest.mark.parametrize("lora", ["../style", "/etc/passwd", str(GOLDEN / "lora"), "x" * 9999])
    def test_no_lora_by_its_path(self, server, lora):
        session = f"lora{len(lora)}"
        assert server.join(session, lora=lora).status == 200
        assert "the LoRA must be one of none" in server.events(session)

    @pytest.mark.parametrize("quality", ["best", "x" * 9999])
    def test_no_quality_beside_the_list(self, server, quality):
        session = f"quality{len(quality)}"
        assert server.join(session, quality=quality).status == 200
        events = server.events(session)
        assert "quality must be" in events and "x" * 300 not in events

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (b"", "one file with a name"),
            (b"--edge\r\n\r\nx\r\n--edge--\r\n", "one file with a name"),
            (part("a.png", b"x") + part("b.png", b"x") + b"--edge--\r\n", "one file at a time"),
            (part("", b"x") + b"--edge--\r\n", "one file with a name"),
            (part("..", b"x") + b"--edge--\r\n", "one file with a name"),
            (part("a\0b.png", b"x") + b"--edge--\r\n", "one file with a name"),
            (part("a" * 100_000, b"x") + b"--edge--\r\n", "shorter name"),
            (part("a.png", b"x"), "cut short"),
            (b"--edge\r\nContent-Disposition: form-data; name=a\r\n\r\nx\r\n--edge--\r\n", "name"),
            (b"preamble" + part("a.png", b"x") + b"--edge--\r\n", "one file with a name"),
        ],
        ids=range(10),
    )
    def test_wrong_uploads(self, server, body, words):
        kind = "multipart/form-data; boundary=edge"
        answer = server.ask("POST", "/gradio_api/upload", body, Content_Type=kind)
        assert words in answer.refused(400) or not body

    @pytest.mark.parametrize(
        "kind", ["", "text/plain", "multipart/form-data", "\xff;boundary=\xff"]
    )
    def test_uploads_of_no_form(self, server, kind):
        server.ask("POST", "/gradio_api/upload", b"x", Content_Type=kind).refused(400)

    @pytest.mark.parametrize(
        "name", ["../../evil.png", "/etc/evil.png", "a" * 300 + ".png", "é.png"]
    )
    def test_names_of_uploads_lead_nowhere_else(self, server, name):
        answer = server.upload(b"x", name)
        assert answer.status == 200
        (path,) = json.loads(answer.body)
        assert Path(path).read_bytes() == b"x"
        assert server.temporary in Path(os.path.realpath(path)).parents

    def test_what_a_client_leaves_unfinished_leaves_nothing(self, server):
        before = set(server.temporary.rglob("*"))
        for _ in range(5):
            with server.raw() as connection:
                connection.sendall(
                    b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999"
                    b"\r\nContent-Type: multipart/form-data; boundary=edge\r\n\r\n"
                    + part("a.png", bytes(200_000))
                )
        assert server.ask("GET", "/").status == 200
        assert set(server.temporary.rglob("*")) == before


class TestPaths:
    @pytest.mark.parametrize(
        "path",
        [
            "/gradio_api/file=/etc/passwd",
            "/gradio_api/file=../../../../etc/passwd",
            "/gradio_api/file=%2e%2e/%2e%2e/etc/passwd",
            "/gradio_api/file=//etc/passwd",
            "/gradio_api/file=%00",
            "/gradio_api/file=",
            "/gradio_api/file=.",
            "/gradio_api/file=http://127.0.0.1:1/a.png",
            "/gradio_api/file=file:///etc/passwd",
            "/gradio_api/file=" + "a" * 5000,
            "/gradio_api/file={temporary}",
            "/gradio_api/file={temporary}/../errors",
            "/gradio_api/file={tiny}/config.json",
            "/gradio_api/proxy=http://127.0.0.1:1/",
            "/gradio_api/file/etc/passwd",
            "/assets/../../../../etc/passwd",
            "/assets/..%2f..%2f..%2fetc/passwd",
            "/static/%2e%2e/%2e%2e/x",
            "/static/%00",
            "/assets/nothing.js",
            "/gradio_api/component_server",
            "/gradio_api/custom_component/a/client/b/c",
            "/gradio_api/dev/reload",
            "/gradio_api/startup-events",
            "/gradio_api/info?all_endpoints=true",
            "/gradio_api/call/generate/1",
            "/gradio_api/stream/a/b/1/playlist.m3u8",
            "/gradio_api/monitoring",
            "/monitoring/x",
            "/login",
            "/docs",
            "/openapi.json",
            "/x" * 2000,
            "/%ff%00",
        ],
        ids=lambda path: path[:40],
    )
    @pytest.mark.parametrize("method", ["GET", "POST", "PUT", "BREW"])
    def test_nothing_there(self, server, path, method):
        path = path.format(temporary=server.temporary, tiny=TINY)
        status = server.ask(method, path).status
        assert status in (403, 404, 405), status

    def test_links_in_the_folder(self, server):
        (path,) = json.loads(server.upload(b"x").body)
        link = Path(path).with_name("link.png")
        link.symlink_to(CAT)
        server.ask("GET", f"/gradio_api/file={link}").refused(403)
        assert server.ask("GET", f"/gradio_api/file={path}").body == b"x"

    @pytest.mark.parametrize(
        "value", ["bytes=0-5-9", "bytes=9-1", "bytes=-", "bytes=" + "1-2," * 999]
    )
    def test_odd_ranges(self, server, value):
        (path,) = json.loads(server.upload(b"0123456789").body)
        answer = server.ask("GET", f"/gradio_api/file={path}", Range=value)
        assert (answer.status, answer.body) == (200, b"0123456789")

    @pytest.mark.parametrize(
        "query", ["page=x", "deep_link=../../x", "a=1&" * 999, "%ff=%00", "page[]=", "__theme=dark"]
    )
    @pytest.mark.parametrize("path", ["/", "/config", "/gradio_api/queue/data"])
    def test_odd_parameters(self, server, path, query):
        assert server.ask("GET", f"{path}?{query}").status in (200, 400, 404)

    def test_no_file_field_is_fetched(self, server):
        """Neither an address nor a file of this machine."""
        with socket.create_server(("127.0.0.1", 0)) as bait:
            bait.settimeout(1)
            address = f"http://127.0.0.1:{bait.getsockname()[1]}/a.png"
            meta = {"meta": {"_type": "gradio.FileData"}}
            for i, file in enumerate(
                [
                    {"path": str(CAT), "url": address, **meta},
                    {"path": "", "url": address, **meta},
                    {"path": str(CAT), **meta},
                    {"path": str(server.temporary / "../errors"), **meta},
                    {"path": "/proc/self/environ", "orig_name": "a.png", **meta},
                ]
            ):
                for call in (0, 4):
                    for field in ("image_1", "mask"):
                        session = f"file{i}{call}{field}"
                        assert server.join(session, call, **{field: file}).status == 200
                        assert '"success":false' in server.events(session)
                assert server.load(f"load{i}", file).status == 200
                assert '"success":false' in server.events(f"load{i}")
            with pytest.raises(TimeoutError):
                bait.accept()
        assert not list(server.temporary.rglob(CAT.name + "*environ*"))


class TestSessions:
    def test_of_others(self, server):
        cookies = [server.ask("GET", "/").headers["set-cookie"] for _ in range(2)]
        assert all("HttpOnly" in one and "SameSite=Strict" in one for one in cookies)
        mine, theirs = (one.split(";")[0] for one in cookies)
        assert mine != theirs
        body = {"data": data(steps=1000), "fn_index": 0, "session_hash": "mine"}
        join = "/gradio_api/queue/join"
        assert server.ask("POST", join, body, Cookie=mine).status == 200
        stop = {"data": [], "fn_index": 3, "session_hash": "mine"}
        for cookie in (theirs, "", "omnigen_fast=x"):
            given = {"Cookie": cookie} if cookie else {}
            server.ask("POST", join, body, **given).refused(403)
            server.ask("POST", "/gradio_api/run/predict", stop, **given).refused(403)
            server.ask("GET", "/gradio_api/heartbeat/mine", **given).refused(403)
            data_path = "/gradio_api/queue/data?session_hash=mine"
            server.ask("GET", data_path, **given).refused(403)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
        connection.request("GET", data_path, headers={"Cookie": mine})
        with connection.getresponse() as events:
            while b"Step " not in events.readline():
                pass  # what has not begun can't be stopped
            predict = "/gradio_api/run/predict"
            assert server.ask("POST", predict, stop, Cookie=mine).status == 200
            assert b"Stopped" in events.read()
        connection.close()

    def test_files_of_others(self, server):
        """Who knows the path of an upload or a picture of another browser gets neither."""
        mine, theirs = (
            server.ask("GET", "/").headers["set-cookie"].split(";")[0] for _ in range(2)
        )
        kind = "multipart/form-data; boundary=edge"
        form = part("a.png", CAT.read_bytes() + b" mine") + b"--edge--\r\n"
        answer = server.ask("POST", "/gradio_api/upload", form, Content_Type=kind, Cookie=mine)
        (upload,) = json.loads(answer.body)
        body = {"data": data(seed=41), "fn_index": GENERATE, "session_hash": "owner"}
        join = "/gradio_api/queue/join"
        assert server.ask("POST", join, body, Cookie=mine).status == 200
        events = server.ask("GET", "/gradio_api/queue/data?session_hash=owner", Cookie=mine).body
        (picture,) = set(re.findall(rb'"path":"([^"]+-41[^"/]*\.png)"', events))
        for path in (upload, picture.decode()):
            file = f"/gradio_api/file={path}"
            assert server.ask("GET", file, Cookie=mine).status == 200
            for cookie in (theirs, "a=b"):
                assert "another page's" in server.ask("GET", file, Cookie=cookie).refused(403)
                for field in ("image_1", "mask"):
                    body = {"data": data(**{field: {"path": path}}), "fn_index": GENERATE}
                    body["session_hash"] = f"thief{len(cookie)}"
                    answer = server.ask("POST", join, body, Cookie=cookie)
                    assert "another page's" in answer.refused(403)
                body = {"data": [{"path": path}], "fn_index": LOAD}
                body["session_hash"] = f"thief{len(cookie)}"
                answer = server.ask("POST", join, body, Cookie=cookie)
                assert "another page's" in answer.refused(403)

    def test_stopping_a_job_of_another_one(self, server):
        assert server.join("worker", steps=30).status == 200
        events = []
        watching = threading.Thread(target=lambda: events.append(server.events("worker")))
        watching.start()
        stop = {"data": [], "fn_index": 3, "session_hash": "other"}
        for _ in range(20):
            assert server.ask("POST", "/gradio_api/run/predict", stop).status == 200
        cancel = {"session_hash": "worker", "fn_index": 0, "event_id": "x"}
        server.ask("POST", "/gradio_api/cancel", cancel).refused(404)
        watching.join(WAIT)
        assert "Done: 30 steps" in events[0]

    def test_sessions_that_are_none(self, server):
        assert server.ask("GET", "/gradio_api/queue/data").status == 404
        assert server.ask("GET", "/gradio_api/queue/data?session_hash=nobody").status == 404
        assert server.ask("GET", "/gradio_api/heartbeat/" + "x" * 65).status == 404

    def test_many_of_one_session(self, server):
        """Two may run or wait; others get a sentence, and the rest of the line is free."""
        for _ in range(6):
            assert server.join("greedy", steps=1000).status == 200
        events = []
        watching = threading.Thread(target=lambda: events.append(server.events("greedy")))
        watching.start()
        time.sleep(1)
        stop = {"data": [], "fn_index": 3, "session_hash": "greedy"}
        assert server.ask("POST", "/gradio_api/run/predict", stop).status == 200
        watching.join(WAIT)
        assert events[0].count("2 requests of this page run or wait already") >= 4

    def test_a_line_that_nobody_watches(self, server):
        """150 requests of as many sessions: soon a page that is watched has its turn."""
        for i in range(150):
            assert server.join(f"ghost{i}", steps=1000).status in (200, 503)
        end = time.monotonic() + WAIT
        events = ""
        while "Done: 2 steps" not in events:
            assert time.monotonic() < end, events[-500:]
            if server.join("guest").status == 200:
                events = server.events("guest")

    def test_a_job_that_nobody_watches_any_more_ends(self, server):
        before = server.pictures()
        with server.raw() as connection:
            assert server.join("leaver", steps=1000, height=64).status == 200
            connection.sendall(watch("leaver"))
            while b"Step " not in connection.recv(1 << 16):
                pass
        assert server.join("next").status == 200
        assert "Done: 2 steps" in server.events("next")
        (made,) = server.pictures() - before
        assert read_record(server.folder / made).arguments["height"] == 32


class TestConnections:
    def test_half_open(self, server):
        """More connections than there may be, which say nothing, or half of a request."""
        opened = []
        try:
            for i in range(400):
                opened.append(server.raw())
                with suppress(OSError):
                    opened[-1].sendall([b"", b"GET / HTTP/1.1\r\nHost: loc", b"POST /"][i % 3])
            for _ in range(3):
                assert server.ask("GET", "/").status == 200
        finally:
            for one in opened:
                one.close()

    @pytest.mark.parametrize(
        "head",
        [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 999],
    )
    def test_a_slow_head(self, server, head):
        with server.raw() as connection:
            connection.sendall(head)
            start = time.monotonic()
            with suppress(OSError):
                while time.monotonic() - start < 60:
                    connection.settimeout(0.5)
                    try:
                        if not connection.recv(1000):
                            break
                    except TimeoutError:
                        connection.sendall(b"X" if head else b"")
            assert time.monotonic() - start < 20

    @pytest.mark.parametrize("path", ["queue/join", "upload"])
    def test_a_slow_body(self, server, path):
        head = f"POST /gradio_api/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n"
        head += "Content-Type: multipart/form-data; boundary=edge\r\n\r\n"
        with server.raw() as connection:
            connection.sendall(head.encode())
            start, answer = time.monotonic(), b""
            connection.settimeout(0.3)
            while not answer and time.monotonic() - start < 60:
                connection.sendall(b"-")
                with suppress(TimeoutError):
                    answer = connection.recv(1000)
            assert answer.startswith(b"HTTP/1.1 408")
            assert time.monotonic() - start < 20

    def test_a_slow_reader(self, server):
        (path,) = json.loads(server.upload(bytes(32 << 20)).body)
        with server.raw() as connection:
            connection.sendall(
                f"GET /gradio_api/file={path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
            )
            time.sleep(6)
            read = 0
            with suppress(OSError):
                while part := connection.recv(1 << 20):
                    read += len(part)
            assert read < 32 << 20

    @pytest.mark.parametrize(
        "request_",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 1_000_000 + b"\r\n\r\n",
            b"POST /gradio_api/upload HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n"
            b"Content-Length: 6\r\n\r\nabcdef",
            b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        ],
        ids=range(8),
    )
    def test_what_is_no_request(self, server, request_):
        with server.raw() as connection, suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request_)
            assert connection.recv(100).startswith(b"HTTP/1.1 4")

    def test_a_websocket(self, server):
        answer = server.ask("GET", "/x", Connection="Upgrade", Upgrade="websocket")
        assert answer.status == 404


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
class TestEnd:
    def ends(self, one: Server, number: int) -> None:
        start = time.monotonic()
        one.process.send_signal(number)
        one.process.wait(30)
        assert time.monotonic() - start < 15
        # the second is what a shell makes of the first: of a server that does not end by itself
        assert one.process.returncode in (-number, 128 + number)
        assert not list(one.temporary.glob("omnigen-fast-*"))

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    def test_while_a_picture_is_made_and_others_wait(self, tmp_path, number):
        with started(tmp_path) as one:
            for i in range(4):
                # of 32 pixels, the first would end within seconds, on a busy machine too soon
                changes = {"steps": 1000, "height": 256, "width": 256}
                assert one.join(f"s{i}", **changes).status == 200
            with one.raw() as connection:
                connection.sendall(watch("s0"))
                while b"Step " not in connection.recv(1 << 16):
                    pass
                self.ends(one, number)
            assert one.pictures() == set()

    def test_while_a_picture_is_written(self, tmp_path):
        with started(tmp_path, more=SLOW_SAVE) as one:
            assert one.join("a").status == 200
            assert one.process.stdout.readline() == "writing\n"
            assert [name for name in one.pictures() if not name.startswith(".")] == []
            self.ends(one, signal.SIGTERM)
            for name in one.pictures():  # whole, if it is there
                assert read_record(one.folder / name).prompts == ("A cat.",)

    def test_idle(self, tmp_path):
        with started(tmp_path) as one:
            self.ends(one, signal.SIGTERM)


class TestStart:
    def run(self, *options: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "omnigen_fast", "app", "--model", str(TINY), *options],
            capture_output=True,
            text=True,
            timeout=WAIT,
            env=os.environ | environment,
        )

    def test_a_busy_port(self, server):
        done = self.run(f"--port={server.port}")
        assert done.returncode == 1
        assert done.stderr == (
            f"Error: port {server.port} is in use; give another --port, or none for a free one\n"
        )

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--host", "no.such.host.invalid"], "is no address of this machine"),
            (["--host", "192.0.2.1"], "can't listen"),
            (["--allowed-host", "a b"], "a host must be a name"),
            (["--allowed-host", "a:80"], "a host must be a name"),
            (["--model", "none/such/x"], "none/such/x"),
            (["--auth", "none"], "--auth none does not exist"),
            (["--memory", "12"], 'for 12 GiB write "12GiB"'),
            (["--lora", "none.safetensors"], "none.safetensors"),
            (["--lora", "a:heavy"], "is not a weight"),
        ],
    )
    def test_options(self, options, words):
        done = self.run(*options)
        assert done.returncode in (1, 2)
        (line,) = done.stderr.splitlines()
        assert line.startswith("Error: ") and words in line

    def test_nothing_is_left_in_the_temporary_folder(self, tmp_path):
        done = self.run("--model", "none/such", GRADIO_TEMP_DIR=str(tmp_path), TMPDIR=str(tmp_path))
        assert done.returncode == 1
        assert not list(tmp_path.glob("omnigen-fast-*"))
