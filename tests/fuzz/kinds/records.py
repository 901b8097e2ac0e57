"""The request that a PNG file carries."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from PIL import Image

from omnigen_fast.cli.generate import show
from omnigen_fast.page.embedded import KEY
from omnigen_fast.page.record import (
    RECORDED_ARGUMENTS,
    RECORDED_OPTIONS,
    Record,
    RecordedFile,
    find_images,
    png_info,
    read_record,
)

from .. import mutate
from ..oracle import Refused
from . import Kind

_SHOWN = 20  # every so many inputs are also printed by the command
_NAMES = (
    *RECORDED_ARGUMENTS,
    *RECORDED_OPTIONS,
    "model",
    "prompt",
    "input_images",
    "latents",
    "index",
    "loras",
)
_VALUES = (
    "float32",
    "bfloat16",
    ["a cat"],
    [[]],
    [[{"path": "image.png", "sha256": None}]],
    {"path": "image.png", "sha256": "0" * 64},
    {"path": "/dev/zero", "sha256": "0" * 64},
    {"path": "../" * 500, "sha256": None},
    {"path": "\ud800", "sha256": "0" * 64},
    {"path": "a" * 300, "sha256": "0" * 64},
    {"path": ".", "sha256": "0" * 64},
    16,
    0.5,
    True,
)


class Records(Kind):
    most_bytes = 200_000_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._path = folder / "picture.png"
        image = folder / "image.png"
        Image.new("RGB", (8, 8), (1, 2, 3)).save(image)
        digest = hashlib.sha256(image.read_bytes()).hexdigest()
        record = Record(
            model="shapes",
            prompts=("a cat <img><|image_1|></img>", "two dogs"),
            input_images=((RecordedFile("image.png", digest),), ()),
            negative_prompts=("ugly", "dull"),
            arguments={
                "height": 64,
                "width": 64,
                "num_inference_steps": 2,
                "guidance_scale": 2.5,
                "use_img_guidance": True,
                "img_guidance_scale": 1.6,
                "max_input_image_size": 64,
                "use_input_image_size_as_output": False,
                "num_images_per_prompt": 1,
                "seed": 7,
                "dtype": "float32",
                "guidance_interval": [0.1, 0.9],
                "solver": "heun",
                "timesteps": [0.0, 0.5],
                "reuse": "careful",
                "quality": "high",
                "mask_blur": 2,
                "strength": 0.75,
            },
            loras=("adapter:0.5",),
            latents=RecordedFile("noise.safetensors", None),
            mask_image=RecordedFile("mask.png", None),
        )
        self._fields = json.loads(record.text())
        self._good = folder / "good.png"
        Image.new("RGB", (8, 8)).save(self._good, pnginfo=png_info(record))

    def make(self, rng: random.Random, number: int) -> bytes:
        fields = json.loads(json.dumps(self._fields))
        text = json.dumps(fields).encode()
        if rng.random() < 0.85:
            text = mutate.json_bytes(rng, mutate.tree(rng, fields, _VALUES, _NAMES))
        chunks = [
            (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)),
            (b"tEXt", KEY.encode() + b"\0" + text),
            (b"IDAT", zlib.compress(bytes(8 * 25))),
            (b"IEND", b""),
        ]
        if rng.random() < 0.3:
            _rearrange(rng, chunks)
        data = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
        return mutate.octets(rng, data) if rng.random() < 0.15 else data

    def size(self, case: bytes) -> int:
        return len(case)

    def prepare(self, case: bytes) -> Path:
        self._path.write_bytes(case)
        return self._path

    def run(self, prepared: Path, number: int) -> None:
        if number % _SHOWN == 0:
            _printed(prepared)
        record = read_record(prepared)
        for line in record.lines():
            assert line.isprintable(), f"shows {line[:80]!r}"
        assert read_text(record) == record, "not what it was read as, after being written"
        find_images(record, prepared)

    def good(self) -> bytes:
        record = read_record(self._good)
        return repr((record, find_images(record, self._good))).encode()

    def save(self, case: bytes, folder: Path) -> None:
        (folder / "picture.png").write_bytes(case)


def read_text(record: Record) -> Record:
    from omnigen_fast.page import record as module

    return module._parse(json.loads(record.text()))


def _printed(path: Path) -> None:
    done = CliRunner().invoke(show, [str(path)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    if done.exit_code:
        # click's own prefix, and what a terminal shows of the rest
        raise Refused(done.output.strip().removeprefix("Error: "))


def _rearrange(rng: random.Random, chunks: list[Any]) -> None:
    kind, index = rng.randrange(6), rng.randrange(len(chunks))
    if kind == 0:
        chunks.pop(index)
    elif kind == 1:
        chunks.insert(index, rng.choice(chunks))
    elif kind == 2:
        chunks[index] = chunks[index][0], mutate.octets(rng, chunks[index][1] or b"\0")
    elif kind == 3:
        name = rng.choice((b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"\0\0\0\0"))
        chunks[index] = name, chunks[index][1]
    elif kind == 4:
        chunks[index:index] = [(b"tEXt", b"Title\0" + bytes(100))] * rng.choice((1, 1000))
    else:
        text = KEY.encode() + b"\0" + b" " * rng.choice((1, 1 << 20, (1 << 20) + 1)) + b"{}"
        chunks.insert(index, (b"tEXt", text))
