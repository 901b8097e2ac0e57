"""The API with the real openai client, and what no client should send."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time

import numpy as np
import openai
import pytest
from golden_cases import GOLDEN
from PIL import Image

from omnigen_fast.serving.scheduler import Settings

from .conftest import KEY, WAIT

PROMPT = "A cat on a mat."
CAT, COFFEE = (GOLDEN / "images" / name for name in ("cat.png", "coffee.png"))
SIZE = {"height": 64, "width": 48, "num_inference_steps": 4}
EXTRA = {"num_inference_steps": 4, "seed": 7}


def pictures(answer) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(one.b64_json))) for one in answer.data]


@pytest.fixture(scope="module")
def own(load_pipe):
    """The pipeline's own pictures."""
    pipe = load_pipe()

    def run(**request):
        return pipe(**{"seed": 7, "num_inference_steps": 4, **request}, progress=False)

    return run


def same(found, expected) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def file(path, side=64, mode="RGB") -> tuple[str, bytes]:
    kept = io.BytesIO()
    Image.open(path).convert(mode).resize((side, side)).save(kept, "PNG")
    return path.name, kept.getvalue()


def mask(side=64) -> tuple[str, bytes]:
    kept = io.BytesIO()
    alpha = Image.new("L", (side, side), 255)
    alpha.paste(0, (16, 16, 48, 48))
    image = Image.new("RGB", (side, side))
    image.putalpha(alpha)
    image.save(kept, "PNG")
    return "mask.png", kept.getvalue()


class TestGenerations:
    def test_a_picture(self, client, own):
        answer = client.images.generate(
            model="tiny", prompt=PROMPT, size="48x64", extra_body={**EXTRA, "guidance_scale": 2}
        )
        same(pictures(answer), own(prompt=PROMPT, height=64, width=48, guidance_scale=2))
        assert (answer.size, answer.quality, answer.background) == ("48x64", "auto", "opaque")
        assert answer.output_format == "png" and abs(answer.created - time.time()) < WAIT
        use = answer.usage
        assert use.output_tokens == 12 and use.input_tokens_details.image_tokens == 0
        assert use.total_tokens == use.input_tokens + 12 > 12
        assert answer.seed == 7

    def test_several_of_a_seed_that_is_told(self, client, own):
        answer = client.images.generate(prompt=PROMPT, n=2, size="32x32", quality="low")
        request = {"height": 32, "width": 32, "num_images_per_prompt": 2, "seed": answer.seed}
        same(pictures(answer), own(prompt=PROMPT, num_inference_steps=1, **request))

    @pytest.mark.parametrize(
        ("quality", "preset"), [("hd", "exact"), ("high", "exact"), ("medium", "high")]
    )
    def test_quality_is_a_preset(self, client, own, quality, preset):
        answer = client.images.generate(
            prompt=PROMPT, size="32x32", quality=quality, extra_body={"seed": 7}
        )
        request = {"prompt": PROMPT, "height": 32, "width": 32}  # and the server's --steps
        same(pictures(answer), own(**request, quality=preset))
        if preset != "exact":
            (one,), (other,) = pictures(answer), own(**request)
            assert not np.array_equal(np.asarray(one), np.asarray(other))

    @pytest.mark.parametrize("kind", ["jpeg", "webp"])
    def test_other_files(self, client, own, kind):
        (found,) = pictures(
            client.images.generate(
                prompt=PROMPT,
                size="64x64",
                output_format=kind,
                output_compression=90,
                extra_body=EXTRA,
            )
        )
        (expected,) = own(prompt=PROMPT, height=64, width=64)
        assert found.format == kind.upper()
        difference = np.abs(np.asarray(found, int) - np.asarray(expected, int))
        assert difference.mean() < 20

    def test_every_extension_reaches_the_call(self, client, own):
        more = {
            "negative_prompt": "ugly",
            "guidance_interval": [0, 0.6],
            "time_shift": 2.0,
            "solver": "ab2",
            "separate_cfg_infer": True,
            "use_kv_cache": False,
        }
        answer = client.images.generate(
            prompt=PROMPT, extra_body={**EXTRA, **more, "height": 48, "width": 64}
        )
        more["guidance_interval"] = (0, 0.6)
        same(pictures(answer), own(prompt=PROMPT, height=48, width=64, **more))

    def test_the_default_size(self, client):
        (found,) = pictures(client.images.generate(prompt=PROMPT, extra_body=EXTRA))
        assert found.size == (128, 128)  # of the server's bound

    def test_a_stream(self, client, own):
        events = list(
            client.images.generate(
                prompt=PROMPT, size="64x64", stream=True, partial_images=2, extra_body=EXTRA
            )
        )
        kinds = [one.type.removeprefix("image_generation.") for one in events]
        assert kinds == ["partial_image", "partial_image", "completed"]
        assert [one.partial_image_index for one in events[:2]] == [0, 1]
        for one in events:
            image = Image.open(io.BytesIO(base64.b64decode(one.b64_json)))
            assert image.size == (64, 64) and one.size == "64x64" and one.created_at
        same([image], own(prompt=PROMPT, height=64, width=64))
        assert events[-1].usage.output_tokens == 16


class TestEdits:
    def test_two_images(self, client, own):
        """Which the prompt does not name: they come first, in their order."""
        answer = client.images.edit(
            model="tiny",
            image=[file(CAT), file(COFFEE)],
            prompt="put them together",
            size="64x48",
            extra_body={**EXTRA, "guidance_interval": [0, 0.5], "use_img_guidance": False},
        )
        expected = own(
            prompt="<img><|image_1|></img><img><|image_2|></img> put them together",
            input_images=[file(CAT)[1], file(COFFEE)[1]],
            height=48,
            width=64,
            max_input_image_size=128,
            guidance_interval=(0, 0.5),
            use_img_guidance=False,
        )
        same(pictures(answer), expected)
        assert answer.usage.input_tokens_details.image_tokens == 32

    def test_a_mask(self, client, own):
        prompt = "make <img><|image_1|></img> green"
        answer = client.images.edit(
            image=file(CAT), mask=mask(), prompt=prompt, extra_body={**EXTRA, "mask_blur": 2}
        )
        expected = own(
            prompt=prompt,
            input_images=[file(CAT)[1]],
            mask_image=mask()[1],
            mask_blur=2,
            use_input_image_size_as_output=True,
            max_input_image_size=128,
        )
        same(pictures(answer), expected)
        kept = np.asarray(Image.open(io.BytesIO(file(CAT)[1])))[:8]
        assert np.array_equal(np.asarray(pictures(answer)[0])[:8], kept)

    def test_a_stream(self, client):
        events = list(
            client.images.edit(
                image=file(CAT), prompt="at night", stream=True, partial_images=1, extra_body=EXTRA
            )
        )
        assert [one.type for one in events] == [
            "image_edit.partial_image",
            "image_edit.completed",
        ]
        assert events[-1].usage.input_tokens_details.image_tokens == 16


def head(address: str, length: int, kind: str) -> bytes:
    """Of a raw request."""
    lines = [
        f"POST /v1/images/{address} HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {KEY}",
        f"Content-Type: {kind}",
        f"Content-Length: {length}",
    ]
    return "\r\n".join([*lines, "", ""]).encode()


BAD_REQUESTS = {
    "no prompt": ({}, "invalid_value", "prompt is missing"),
    "empty prompt": ({"prompt": " "}, "invalid_value", "prompt is empty"),
    "type": ({"prompt": 5}, "invalid_value", "prompt must be a valid string, got 5"),
    "null": ({"prompt": None}, "invalid_value", "prompt must be"),
    "a word for a number": (
        {"prompt": "a", "n": "2"},
        "invalid_value",
        "n must be a valid integer, got '2'",
    ),
    "n": ({"prompt": "a", "n": 5}, "invalid_value", "n must be at most 4 on this server"),
    "huge n": ({"prompt": "a", "n": 10**400}, "invalid_value", "n must be"),
    "size": ({"prompt": "a", "size": "65x64"}, "invalid_value", "must be a multiple of 16"),
    "no size": ({"prompt": "a", "size": "large"}, "invalid_value", "size must match"),
    "pixels": ({"prompt": "a", "size": "256x128"}, "invalid_value", "at most 16,384 pixels"),
    "half a size": ({"prompt": "a", "width": 64}, "invalid_value", "give width and height"),
    "two sizes": (
        {"prompt": "a", "width": 64, "height": 64, "size": "64x64"},
        "invalid_value",
        "not both",
    ),
    "steps": (
        {"prompt": "a", "num_inference_steps": 101},
        "invalid_value",
        "num_inference_steps must be at most 100",
    ),
    "timesteps": (
        {"prompt": "a", "timesteps": [i / 200 for i in range(200)]},
        "invalid_value",
        "timesteps must be at most 100",
    ),
    "no steps": (
        {"prompt": "a", "num_inference_steps": 0},
        "invalid_value",
        "num_inference_steps must be from 1",
    ),
    "input size": (
        {"prompt": "a", "max_input_image_size": 4096},
        "invalid_value",
        "max_input_image_size must be at most 128",
    ),
    "unknown": ({"prompt": "a", "colour": 1}, "unknown_parameter", "no parameter 'colour'"),
    "dtype": ({"prompt": "a", "dtype": "bfloat16"}, "unknown_parameter", "'dtype'"),
    "callback": ({"prompt": "a", "latents": []}, "unknown_parameter", "'latents'"),
    "url": ({"prompt": "a", "response_format": "url"}, "invalid_value", "must be b64_json"),
    "background": (
        {"prompt": "a", "background": "transparent"},
        "invalid_value",
        "can't be transparent",
    ),
    "an image": (
        {"prompt": "a <|image_1|>"},
        "invalid_value",
        "names image 1 but input_images has none",
    ),
    "stream of two": ({"prompt": "a", "n": 2, "stream": True}, "invalid_value", "n must be 1"),
    "solver": ({"prompt": "a", "solver": "rk9"}, "invalid_value", "solver must be one of"),
    "interval": (
        {"prompt": "a", "guidance_interval": [1, 0]},
        "invalid_value",
        "guidance_interval must be two times",
    ),
}


@pytest.mark.parametrize(("body", "code", "sentence"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_refused(live, body, code, sentence):
    assert sentence in live.generate(**body).refused(400, code)


@pytest.mark.parametrize(
    ("body", "code", "status"),
    [
        (b"", "invalid_body", 400),
        (b"{", "invalid_body", 400),
        (b"[]", "invalid_body", 400),
        (b"[" * 100_000, "invalid_body", 400),
        (b'{"prompt": "\xff"}', "invalid_body", 400),
        (b'{"prompt": "a", "seed": NaN}', "invalid_value", 400),
        (b'{"prompt": "a", "guidance_scale": 1e999}', "invalid_value", 400),
        (b'{"prompt": "\\ud800"}', "invalid_body", 400),
        (b'{"prompt": "' + b"a" * (4 << 20) + b'"}', "too_large", 413),
    ],
    ids=["empty", "half", "list", "deep", "bytes", "nan", "inf", "surrogate", "large"],
)
def test_bodies_that_are_none(live, body, code, status):
    live.ask("POST", "/v1/images/generations", body).refused(status, code)


def form(*parts: tuple[str, bytes], end: bytes = b"--edge--\r\n") -> bytes:
    return (
        b"".join(
            b"--edge\r\nContent-Disposition: form-data; "
            + head.encode()
            + b"\r\n\r\n"
            + body
            + b"\r\n"
            for head, body in parts
        )
        + end
    )


IMAGE = ('name="image"; filename="a.png"', file(CAT)[1])
TEXT = ('name="prompt"', b"at night")
BAD_FORMS = {
    "no image": (form(TEXT), 400, "invalid_value", "image is missing"),
    "no prompt": (form(IMAGE), 400, "invalid_value", "prompt is missing"),
    "a web address": (
        form(TEXT, ('name="image"', b"https://example.com/a.png")),
        400,
        "invalid_value",
        "nothing is fetched for callers",
    ),
    "no picture": (
        form(TEXT, ('name="image"; filename="a"', b"not a picture")),
        400,
        "invalid_value",
        "input_images[0]",
    ),
    "17 images": (form(TEXT, *[IMAGE] * 17), 400, "invalid_value", "at most 16 images"),
    "two masks": (
        form(TEXT, IMAGE, *[('name="mask"; filename="m"', b"")] * 2),
        400,
        "unknown_parameter",
        "one mask",
    ),
    "a mask of two": (
        form(TEXT, IMAGE, IMAGE, ('name="mask"; filename="m"', mask()[1])),
        400,
        "invalid_value",
        "mask_image needs one prompt with one input image",
    ),
    "another file": (
        form(TEXT, IMAGE, ('name="x"; filename="x"', b"")),
        400,
        "unknown_parameter",
        "not 'x'",
    ),
    "twice": (form(TEXT, TEXT, IMAGE), 400, "invalid_value", "'prompt' is given twice"),
    "no number": (form(TEXT, IMAGE, ('name="n"', b"many")), 400, "invalid_value", "n must be"),
    "a list": (
        form(TEXT, IMAGE, ('name="timesteps"', b"[[[0")),
        400,
        "invalid_value",
        "timesteps must be",
    ),
    "cut short": (form(TEXT, IMAGE, end=b""), 400, "invalid_body", "cut short"),
    "garbage": (b"x" * 1000, 400, "invalid_body", "can't be read"),
    "no name": (form(("filename=x", b"")), 400, "invalid_body", "has no name"),
    "a long header": (form((f'name="{"n" * 3000}"', b"")), 413, "too_large", "header"),
    "many parts": (form(*[(f'name="f{i}"', b"") for i in range(99)]), 413, "too_large", "fields"),
    "much text": (form(("name=prompt", b"a" * (5 << 20))), 413, "too_large", "texts of a form"),
}


@pytest.mark.parametrize(("body", "status", "code", "sentence"), BAD_FORMS.values(), ids=BAD_FORMS)
def test_refused_forms(live, body, status, code, sentence):
    kind = "multipart/form-data; boundary=edge"
    answer = live.ask("POST", "/v1/images/edits", body, Content_Type=kind)
    assert sentence in answer.refused(status, code)


def test_an_edit_must_be_a_form(live):
    answer = live.ask("POST", "/v1/images/edits", {"prompt": "a", "images": []})
    assert "multipart/form-data" in answer.refused(400, "invalid_body")


def test_an_upload_that_is_announced_too_large(live):
    with socket.create_connection(("127.0.0.1", live.port), WAIT) as one:
        one.sendall(head("edits", 10**12, "multipart/form-data; boundary=edge"))
        assert b" 413 " in one.recv(100)


class TestDoor:
    """Who may ask."""

    @pytest.mark.parametrize("given", ["", "Bearer", "Bearer sk-wrong", f"Basic {KEY}", "Bearer é"])
    def test_a_wrong_key(self, live, given):
        answer = live.ask("GET", "/v1/models", Authorization=given.encode().decode("latin-1"))
        assert "key" in answer.refused(401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"

    @pytest.mark.parametrize(
        "headers",
        [
            {"Host": "evil.example"},
            {"Host": ""},
            {"Host": "127.0.0.1", "Origin": "http://evil.example"},
            {"Host": "127.0.0.1", "Sec-Fetch-Site": "cross-site"},
        ],
    )
    def test_another_host(self, live, headers):
        for path in ("/v1/models", "/health", "/docs"):
            live.ask("GET", path, **headers).refused(403, "forbidden_host")

    def test_a_known_host(self, live):
        assert live.ask("GET", "/v1/models", Host="pictures.example").status == 200

    def test_what_needs_no_key(self, live):
        for path in ("/health", "/ready", "/metrics", "/docs", "/openapi.json"):
            assert live.ask("GET", path, Authorization="").status == 200

    def test_other_addresses(self, live):
        live.ask("GET", "/v1/images").refused(404, "not_found")
        live.ask("GET", "/v1/images/generations").refused(405, "method_not_allowed")
        live.ask("POST", "/v1/images/variations", b"x").refused(404, "not_found")


class TestClientErrors:
    """As the openai client raises them."""

    def test_kinds(self, client, live):
        with pytest.raises(openai.BadRequestError) as raised:
            client.images.generate(prompt="")
        assert raised.value.param == "prompt" and raised.value.code == "invalid_value"
        assert raised.value.request_id.startswith("req_")
        with pytest.raises(openai.NotFoundError, match="its name is 'tiny'"):
            client.images.generate(prompt="a", model="gpt-image-1")
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="sk-wrong").models.list()
        with pytest.raises(openai.BadRequestError, match="input_images"):
            client.images.edit(image=b"no picture", prompt="a")

    def test_a_full_queue_and_a_stream_that_fails(self, serve):
        with serve(settings=Settings(max_queue=1, timeout_seconds=None)) as live:
            client = openai.OpenAI(base_url=f"{live.url}/v1", api_key=KEY, max_retries=0)
            going = threading.Event()
            begun = live.scheduler.submit(
                {"prompt": PROMPT, **SIZE}, on_step=lambda _: going.wait(WAIT)
            )
            try:
                with pytest.raises(openai.RateLimitError, match="try again in") as raised:
                    client.images.generate(prompt="a")
                assert int(raised.value.response.headers["retry-after"]) >= 1
            finally:
                going.set()
            begun.result(WAIT)

            def fails(*_):
                raise ValueError("secret")

            live.pipe.engine.step, right = fails, live.pipe.engine.step
            with pytest.raises(openai.APIError, match="its log has the details"):
                list(client.images.generate(prompt=PROMPT, stream=True, size="32x32"))
            with pytest.raises(openai.InternalServerError, match="its log has the details"):
                client.images.generate(prompt=PROMPT, size="32x32")
            live.pipe.engine.step = right
            assert client.images.generate(prompt=PROMPT, size="32x32").data


class TestOperations:
    def test_models(self, client):
        (model,) = client.models.list().data
        assert model.id == "tiny"

    def test_ready_and_draining(self, serve):
        with serve() as live:
            assert live.ask("GET", "/ready").status == 200
            live.scheduler.stop_accepting()
            live.ask("GET", "/ready").refused(503, "shutting_down")
            answer = live.generate(prompt="a")
            answer.refused(503, "shutting_down")
            assert live.ask("GET", "/health").status == 200

    def test_not_ready(self, serve):
        from bench.serve_soak import served
        from omnigen_fast.server.app import create_app
        from omnigen_fast.serving.scheduler import Scheduler

        from .conftest import Live

        go = threading.Event()

        def load():
            go.wait(WAIT)
            raise OSError("gone")

        scheduler = Scheduler(load)
        with served(create_app(scheduler)) as port:
            live = Live(port)
            live.ask("GET", "/ready").refused(503, "not_ready")
            answer = live.generate(prompt="a")
            assert "being loaded" in answer.refused(503, "not_ready")
            assert answer.headers["retry-after"]
            assert live.ask("GET", "/metrics").status == 404
            go.set()
            scheduler.close()
            assert "gone" in live.ask("GET", "/ready").refused(503, "not_ready")

    def test_metrics(self, live):
        def read() -> dict[str, float]:
            lines = live.ask("GET", "/metrics").body.decode().splitlines()
            pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
            return {name: float(value) for name, value in pairs}

        before = read()
        live.generate(prompt=PROMPT, size="32x32", num_inference_steps=3)
        after = read()

        def grown(name: str) -> float:
            return after[name] - before.get(name, 0)

        assert grown('omnigen_requests_finished_total{reason="done"}') == 1
        assert grown("omnigen_steps_total") == 3
        assert grown("omnigen_request_seconds_count") == 1
        assert grown("omnigen_queue_seconds_count") == 1
        hits = grown("omnigen_condition_cache_hits_total")
        assert hits + grown("omnigen_condition_cache_misses_total") == 2
        assert after["omnigen_requests_running"] == after["omnigen_requests_waiting"] == 0
        assert after["omnigen_memory_bytes"] > 1e8 and after["omnigen_steps_per_second"] > 0

    def test_request_ids_and_the_log(self, live, caplog):
        caplog.set_level("INFO", "omnigen_fast.server")
        answer = live.ask("GET", "/health", X_Request_Id="trace-1")
        assert answer.headers["x-request-id"] == "trace-1"
        evil = live.ask("GET", "/health", X_Request_Id="a b\tc")
        assert evil.headers["x-request-id"].startswith("req_")
        answer = live.generate(prompt="A secret cat.", size="32x32", num_inference_steps=2)
        found, before = [], time.monotonic()
        while not found:  # it is written once the answer is on its way
            assert time.monotonic() < before + WAIT
            records = [json.loads(one.getMessage()) for one in list(caplog.records)]
            found = [one for one in records if one["request_id"] == answer.headers["x-request-id"]]
        (line,) = found
        assert line["status"] == 200 and line["reason"] == "done" and line["steps"] == 2
        assert "secret" not in caplog.text

    def test_the_page_of_the_api(self, live):
        text = live.ask("GET", "/docs").body.decode()
        assert "/v1/images/edits" in text and "num_inference_steps" in text
        assert "<script" not in text and "http" not in text.replace("/openapi.json", "")


class TestHangingUp:
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_hangs_up(self, live, stream):
        """Its request ends at the next step; the next one is right."""
        before = time.monotonic()
        body = {"prompt": PROMPT, "size": "128x128", "num_inference_steps": 100, "stream": stream}
        text = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", live.port), WAIT) as one:
            one.sendall(head("generations", len(text), "application/json") + text)
            while not live.scheduler.state().running:
                assert time.monotonic() < before + WAIT
                time.sleep(0.01)
        while live.scheduler.state().running:
            assert time.monotonic() < before + WAIT
            time.sleep(0.01)
        metrics = live.ask("GET", "/metrics").body.decode()
        assert 'omnigen_requests_finished_total{reason="cancelled"}' in metrics


def test_no_room_for_an_upload(live, monkeypatch):
    """A disk that is full, and a file-size limit."""
    import errno

    from omnigen_fast.server import forms

    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(forms.tempfile, "SpooledTemporaryFile", lambda _: Full())
    kind = "multipart/form-data; boundary=edge"
    answer = live.ask("POST", "/v1/images/edits", form(TEXT, IMAGE), Content_Type=kind)
    assert "no room" in answer.refused(503, "disk_full")


def test_memory_that_runs_out(live, monkeypatch):
    import torch

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(live.pipe.engine, "step", fails)
    answer = live.generate(prompt=PROMPT, size="32x32")
    assert "out of memory with every plan" in answer.refused(503, "out_of_memory")
    monkeypatch.undo()
    assert live.generate(prompt=PROMPT, size="32x32").status == 200
