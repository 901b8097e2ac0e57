"""GGUF files: what is read of them, and that no file takes long or gives more than one line."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_cases import TINY
from safetensors.torch import load_file

from omnigen_fast import CheckpointError, conversion
from omnigen_fast.errors import OmniGenError
from omnigen_fast.weights.checkpoint import Checkpoint
from omnigen_fast.weights.foreign import open_foreign
from omnigen_fast.weights.gguf_files import list_gguf

WEIGHTS = load_file(TINY / "model.safetensors")
LAYER = "llm.layers.0.mlp.down_proj.weight"
F32, F16, BF16, Q4_0, Q8_0, Q4_K = 0, 1, 30, 2, 8, 12
PLAIN = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def gguf_file(
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]],
    fields: tuple[bytes, ...] = (),
    magic: bytes = b"GGUF",
    version: int = 3,
) -> bytes:
    """A file of tensors, each with axes (as NumPy has them), type and data."""
    head = magic + struct.pack("<IQQ", version, len(tensors), len(fields)) + b"".join(fields)
    data = b""
    for name, (axes, kind, values) in tensors.items():
        data += b"\0" * (-len(data) % 32)
        head += text(name) + struct.pack(f"<I{len(axes)}Q", len(axes), *axes[::-1])
        head += struct.pack("<IQ", kind, len(data))
        data += values
    return head + b"\0" * (-len(head) % 32) + data


def plain(value: torch.Tensor, kind: int) -> tuple[tuple[int, ...], int, bytes]:
    stored = value.to(PLAIN[kind])
    return tuple(value.shape), kind, stored.contiguous().view(torch.uint8).numpy().tobytes()


def model(**changes: tuple[tuple[int, ...], int, bytes]) -> bytes:
    """The golden checkpoint; its matrices in float16."""
    tensors = {
        name: plain(value, F16 if value.ndim == 2 else F32) for name, value in WEIGHTS.items()
    }
    return gguf_file(tensors | changes)


def quantised(value: torch.Tensor, kind: int) -> tuple[tuple[int, ...], int, bytes]:
    gguf = pytest.importorskip("gguf")
    stored = gguf.quantize(value.numpy(), gguf.GGMLQuantizationType(kind))
    return tuple(value.shape), kind, stored.tobytes()


def test_a_model_is_converted(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(model(**{LAYER: plain(WEIGHTS[LAYER], BF16)}))
    out = tmp_path / "out"
    conversion.convert(str(path), str(out), torch.float32, base=str(TINY))
    found = load_file(out / "model.safetensors")
    assert found.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        stored = torch.bfloat16 if name == LAYER else PLAIN[F16 if value.ndim == 2 else F32]
        assert torch.equal(found[name], value.to(stored).float()), name


@pytest.mark.parametrize(("kind", "error"), [(Q8_0, 0.01), (Q4_0, 0.15)])
def test_quantised_types_are_expanded(tmp_path, kind, error):
    path = tmp_path / "model.gguf"
    path.write_bytes(model(**{LAYER: quantised(WEIGHTS[LAYER], kind)}))
    with open_foreign(str(path)).opened() as read:
        found = read(LAYER)
    away = (found - WEIGHTS[LAYER]).norm() / WEIGHTS[LAYER].norm()
    assert 0 < away < error


def test_into_another_form(tmp_path):
    path, out = tmp_path / "model.gguf", tmp_path / "out"
    path.write_bytes(model())
    conversion.convert(str(path), str(out), torch.float32, weights="int8", base=str(TINY))
    assert Checkpoint.open(out).form == "int8"


def test_a_shape_that_the_file_keeps_elsewhere(tmp_path):
    """As ComfyUI's converters store what quantised rows can't hold."""
    path = tmp_path / "one.gguf"
    shape = struct.pack("<IQ3i", 5, 3, 1, 2304, 192)
    fields = (field("comfy.gguf.orig_shape.pos_embed", 9, shape),)
    path.write_bytes(gguf_file({"pos_embed": plain(WEIGHTS["pos_embed"][0], F32)}, fields))
    foreign = open_foreign(str(path))
    assert foreign.shapes == {"pos_embed": (1, 2304, 192)}
    with foreign.opened() as read:
        assert torch.equal(read("pos_embed"), WEIGHTS["pos_embed"])


ONE = {"x": plain(torch.ones(2, 32), F32)}
LONG = struct.pack("<Q", 1 << 62)
BAD = {
    "empty": b"",
    "magic": gguf_file(ONE, magic=b"GGML"),
    "version": gguf_file(ONE, version=9),
    "counts": b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60),
    "many fields": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 16) + b"\0" * (1 << 16),
    "long name": b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + LONG,
    "long string": gguf_file(ONE, (field("a", 8, LONG),)),
    "long array": gguf_file(ONE, (field("a", 9, struct.pack("<I", 0) + LONG),)),
    "long array of strings": gguf_file(ONE, (field("a", 9, struct.pack("<I", 8) + LONG),)),
    "nested arrays": gguf_file(ONE, (field("a", 9, struct.pack("<IQI", 9, 1, 9)),)),
    "type of a field": gguf_file(ONE, (field("a", 77, b""),)),
    "alignment": gguf_file(ONE, (field("general.alignment", 4, struct.pack("<I", 0)),)),
    "axes": gguf_file({"x": ((1,) * 9, F32, b"\0" * 4)}),
    "no axes": gguf_file({"x": ((), F32, b"\0" * 4)}),
    "huge axes": gguf_file({"x": ((1 << 62, 1 << 62), F32, b"")}),
    "zero": gguf_file({"x": ((3, 0), F32, b"")}),
    "type": gguf_file({"x": ((2, 32), 999, b"\0" * 256)}),
    "cut off": gguf_file(ONE)[:-1],
    "not finite": gguf_file({"x": plain(torch.full((2, 32), torch.nan), F32)}),
    "name\n" * 80: gguf_file({"x\n" * 999: ((2, 32), F32, b"")}),
    "shape": gguf_file(
        ONE, (field("comfy.gguf.orig_shape.x", 9, struct.pack("<IQ2i", 5, 2, -8, -8)),)
    ),
}


@pytest.mark.parametrize("damage", BAD, ids=lambda name: name.split("\n")[0])
def test_damaged_files_are_one_line(tmp_path, damage):
    path = tmp_path / "model.gguf"
    path.write_bytes(BAD[damage])
    began = time.process_time()
    with pytest.raises(OmniGenError) as caught:
        conversion.convert(str(path), str(tmp_path / "out"), base=str(TINY))
    assert time.process_time() - began < 2
    message = str(caught.value)
    assert message.isprintable() and len(message) <= 300
    assert not (tmp_path / "out").exists()


def test_mutated_files_are_one_line(tmp_path):
    """Bytes of the header changed, and files cut off anywhere."""
    rng, path = random.Random(0), tmp_path / "model.gguf"
    names = (field("a", 8, text("b")), field("general.alignment", 4, struct.pack("<I", 32)))
    whole = gguf_file(ONE | {"y": plain(torch.ones(3), F16)}, names)
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice((0, 1, 2))):
            data[rng.randrange(150)] = rng.choice((0, 1, 8, 9, 127, 255))
        path.write_bytes(data[: rng.choice((len(data), rng.randrange(len(data) + 1)))])
        try:
            found = list_gguf(str(path))
        except OmniGenError as error:
            assert str(error).isprintable() and len(str(error)) <= 300
        else:
            assert all(np.prod(one.shape) >= 0 for one in found.values())


def test_a_file_that_needs_the_package_says_so(tmp_path, monkeypatch):
    import sys

    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_file({"x": ((2, 32), Q8_0, b"\0" * 68)}))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(OmniGenError, match=r"pip install 'omnigen_fast\[gguf\]'"):
        list_gguf(str(path))


def test_a_folder_with_one(tmp_path):
    (tmp_path / "model.gguf").write_bytes(model())
    assert Path(open_foreign(str(tmp_path)).where).name == "model.gguf"
    with pytest.raises(CheckpointError):
        open_foreign(str(tmp_path / "none.gguf"))
