"""Requests made by chance from the OpenAPI description: none of them gets a 500."""

from __future__ import annotations

import json
import random
import urllib.parse
from typing import Any

import pytest
from golden_cases import GOLDEN

from .test_api import form

CASES = 150
TEXTS = ["", " ", "a cat", "<|image_1|>", "<img>", "\x00", "\u202e", "ä" * 50, "é\n\t", "a" * 3000]
NUMBERS = [0, 1, 2, -1, 10, 64, 10**6, -(10**30), 10**400, 0.5, -0.0, 1e308, 2.0]
OTHERS: list[Any] = [None, True, False, [], {}, [1], {"a": 1}, [[[]]], [0, 1], [0, 0.5, 2]]


@pytest.fixture(scope="module")
def small(serve):
    """With little work in each request."""
    with serve(api_key=None, max_pixels=64 * 64, max_steps=2, steps=1, max_images=2) as live:
        yield live


def fitting(schema: dict[str, Any], chance: random.Random) -> Any:
    """A value that a schema allows, or nearly."""
    if "anyOf" in schema:
        return fitting(chance.choice(schema["anyOf"]), chance)
    if "enum" in schema:
        return chance.choice(schema["enum"])
    kind = schema.get("type")
    if kind == "integer":
        return chance.choice([schema.get("minimum", 1), schema.get("maximum", 2), 1, 2, 64])
    if kind == "number":
        return chance.choice([0.0, 0.5, 1.0, 3.0])
    if kind == "boolean":
        return chance.random() < 0.5
    if kind == "array":
        return sorted(chance.random() for _ in range(chance.randint(1, 3)))
    if kind == "string":
        return chance.choice(["32x32", "64x48", "auto", "a cat", "euler", "heun"])
    return None


def changed(value: Any, chance: random.Random) -> Any:
    return chance.choice([*TEXTS, *NUMBERS, *OTHERS]) if chance.random() < 0.05 else value


def fields(schema: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """Some of the parameters; the sizes are usually small."""
    found = {"prompt": "A cat.", "num_inference_steps": 1}
    for name, one in schema["properties"].items():
        if name not in ("image", "mask", "prompt", "model") and chance.random() < 0.08:
            found[name] = fitting(one, chance)
    found = {name: changed(value, chance) for name, value in found.items()}
    if chance.random() < 0.1:
        found[chance.choice(TEXTS)] = chance.choice(NUMBERS)
    return found


def damaged(body: bytes, chance: random.Random) -> bytes:
    """Now and then cut, or with other bytes."""
    if chance.random() < 0.05:
        place = chance.randrange(len(body) + 1)
        body = body[:place] + bytes(chance.randrange(256) for _ in range(chance.randint(0, 9)))
    return body


def form_of(given: dict[str, Any], chance: random.Random) -> bytes:
    parts = []
    for name, value in given.items():
        text = value if isinstance(value, str) else json.dumps(value)
        head = f'name="{urllib.parse.quote(name)}"'
        parts.append((head, text.encode("utf-8", "replace")))
    images = [GOLDEN / "images" / f"{name}.png" for name in ("cat", "coffee")]
    for _ in range(chance.choice([0, 1, 1, 1, 2])):
        data = damaged(chance.choice(images).read_bytes(), chance)
        parts.append((f'name="{chance.choice(["image", "image[]"])}"; filename="x"', data))
    if chance.random() < 0.2:
        parts.append(('name="mask"; filename="m"', images[0].read_bytes()))
    chance.shuffle(parts)
    return form(*parts)


def generated(small, cases: int, seed: int) -> dict[int, int]:
    """Sends requests; returns how many had each status."""
    chance, found = random.Random(seed), {}
    paths = small.ask("GET", "/openapi.json").body
    paths = json.loads(paths)["paths"]
    for number in range(cases):
        kind = chance.choice(["generations", "edits"])
        path = f"/v1/images/{kind}"
        ((media, content),) = paths[path]["post"]["requestBody"]["content"].items()
        given = fields(content["schema"], chance)
        if kind == "generations":
            body = json.dumps(given).encode()
        else:
            body, media = form_of(given, chance), f"{media}; boundary=edge"
        if chance.random() < 0.05:
            media = chance.choice(["", "text/plain", "multipart/form-data", "a" * 999])
        answer = small.ask("POST", path, damaged(body, chance), Content_Type=media)
        found[answer.status] = found.get(answer.status, 0) + 1
        if answer.status == 200:
            assert b"b64_json" in answer.body or b"event: error" in answer.body
            assert b"internal_error" not in answer.body, (number, given)
        else:
            assert answer.status < 500, (number, given, answer.body)
            error = json.loads(answer.body)["error"]
            assert error["message"].isprintable() and len(error["message"]) <= 300
    return found


def test_no_500(small):
    found = generated(small, CASES, seed=0)
    assert found.get(200, 0) > CASES / 10 and found.get(400, 0) > CASES / 10
