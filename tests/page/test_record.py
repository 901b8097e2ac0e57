"""The request in a PNG file: all of it comes back, and nothing else does any harm."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from golden_cases import GOLDEN, TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omnigen_fast.cli.main import main
from omnigen_fast.errors import RequestError
from omnigen_fast.fewer_steps import preset
from omnigen_fast.page.record import (
    MAX_BYTES,
    Record,
    RecordedFile,
    find_images,
    png_info,
    read_record,
)

CAT = GOLDEN / "images/cat.png"
ARGUMENTS = {
    "height": 32,
    "width": 48,
    "num_inference_steps": 1,
    "guidance_scale": 2.5,
    "use_img_guidance": True,
    "img_guidance_scale": 1.6,
    "max_input_image_size": 32,
    "use_input_image_size_as_output": False,
    "num_images_per_prompt": 1,
    "seed": 3,
    "dtype": "float32",
}
RECORD = Record(
    model="some/model",
    prompts=("A cat, größer 猫\n\x1b[2J", "<img><|image_1|></img> at night"),
    input_images=((), (RecordedFile("in/cat.png", "0" * 64),)),
    negative_prompts=("blurry",),
    arguments=ARGUMENTS,
    loras=("style:0.5",),
    latents=RecordedFile("noise.safetensors", None),
    index=1,
    vae_path="some/vae",
    revision="v1",
)
MODEL = ["--model", str(TINY), "--device", "cpu", "--quiet"]
SMALL = [*MODEL, "--dtype", "float32", "--height", "32", "--width", "48", "--steps", "1"]
SMALL += ["--max-input-image-size", "32"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return len(data).to_bytes(4, "big") + kind + data + checksum.to_bytes(4, "big")


def png(*chunks: bytes) -> str:
    """A file that says it is PNG; nobody looks at its pixels."""
    Path("x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    return "x.png"


def with_text(text: str | bytes) -> str:
    text = text if isinstance(text, bytes) else text.encode()
    return png(chunk(b"IHDR", b"\0" * 13), chunk(b"tEXt", b"omnigen_fast\0" + text))


def fields(**changes: Any) -> dict[str, Any]:
    return json.loads(RECORD.text()) | changes


def without(name: str) -> dict[str, Any]:
    return {other: value for other, value in fields().items() if other != name}


def run(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def made(*arguments: str, out: str = "a.png") -> str:
    result = run("generate", *arguments, "--out", out)
    assert result.exit_code == 0, result.output
    return out


class TestRoundTrip:
    def test_all_comes_back(self):
        Image.new("RGB", (8, 8)).save("a.png", pnginfo=png_info(RECORD))
        assert read_record("a.png") == RECORD

    def test_options_come_back_where_they_are_used(self):
        options = {"guidance_interval": [0.0, 0.5], "image_guidance_interval": [0.25, 1.0]}
        options |= {"solver": "ab2", "time_shift": 2.0, "timesteps": [0.0, 0.5]}
        options |= {"mask_blur": 3, "strength": 0.5, "reuse": 0.01, "quality": "high"}
        used = replace(RECORD, arguments=ARGUMENTS | options)
        Image.new("RGB", (8, 8)).save("a.png", pnginfo=png_info(used))
        assert read_record("a.png") == used
        assert not fields().keys() & options.keys()

    @pytest.mark.parametrize("value", [None, True, [0.1], {}], ids=str)
    def test_a_reuse_of_another_type_is_refused(self, value):
        with pytest.raises(RequestError, match="reuse must be a name or a number"):
            read_record(with_text(json.dumps(fields(reuse=value))))

    @pytest.mark.parametrize("value", [None, "01", [True, 1], [None], {}], ids=str)
    def test_options_of_another_type_are_refused(self, value):
        with pytest.raises(RequestError, match="guidance_interval must be a list of numbers"):
            read_record(with_text(json.dumps(fields(guidance_interval=value))))

    def test_options_are_taken_from_a_picture(self):
        given = ["--guidance-interval", "0", "0.5", "--image-guidance-interval", "0.25", "1"]
        given += ["--solver", "heun", "--timesteps", "0,0.25"]
        made(*SMALL, "--prompt", "A cat.", "--seed", "3", *given)
        assert made(*MODEL, "--model", str(TINY), "--from", "a.png", out="b.png")
        assert read_record("b.png") == read_record("a.png")
        found = read_record("a.png").arguments
        assert found["guidance_interval"] == [0.0, 0.5] and found["timesteps"] == [0.0, 0.25]
        assert found["solver"] == "heun" and "time_shift" not in found

    def test_a_quality_is_recorded_with_what_it_stands_for(self):
        again = [*MODEL, "--model", str(TINY), "--from", "a.png"]
        made(*SMALL, "--prompt", "A cat.", "--seed", "3", "--quality", "high", "--solver", "heun")
        found = read_record("a.png").arguments
        assert found["quality"] == "high" and found["reuse"] == preset("high")["reuse"]
        assert found["solver"] == "heun" and found["num_inference_steps"] == 1  # as was given
        made(*again, out="b.png")
        assert read_record("b.png") == read_record("a.png")
        # a quality given anew decides about all that it stands for
        made(*again, "--quality", "exact", "--steps", "2", out="b.png")
        found = read_record("b.png").arguments
        assert found["num_inference_steps"] == 2
        assert not found.keys() & {"quality", "solver", "reuse"}

    def test_a_mask_comes_back_and_is_opened_only_if_asked(self):
        Image.new("L", (32, 32), 255).save("mask.png")
        Image.linear_gradient("L").resize((32, 32)).save("in.png")
        image = ["--prompt", "<img><|image_1|></img> x", "--image", "in.png"]
        given = [*image, "--mask-image", "mask.png", "--mask-blur", "2", "--strength", "0.5"]
        made(*SMALL, *given, "--width", "32", "--seed", "3", "--steps", "2")
        record = read_record("a.png")
        assert record.mask_image == RecordedFile("mask.png", record.mask_image.sha256)
        assert (record.arguments["mask_blur"], record.arguments["strength"]) == (2, 0.5)
        assert "mask.png" in run("show", "a.png").output
        refused = run("generate", *MODEL, "--from", "a.png", "--image", "in.png", "--out", "b.png")
        assert refused.exit_code == 2 and "--mask-image mask.png" in refused.output
        made(*MODEL, "--from", "a.png", "--recorded-images", out="b.png")
        assert Path("b.png").read_bytes() == Path("a.png").read_bytes()
        Image.new("L", (32, 32), 254).save("mask.png")
        changed = run("generate", *MODEL, "--from", "a.png", "--recorded-images", "--out", "c.png")
        assert changed.exit_code == 2 and "mask.png, which has changed since" in changed.output

    def test_survives_among_other_chunks(self):
        Image.new("RGB", (8, 8)).save("a.png", pnginfo=png_info(RECORD))
        data = Path("a.png").read_bytes()
        other = chunk(b"tEXt", b"Comment\0hello") + chunk(b"tEXt", b"x") + chunk(b"tEXt", b"")
        Path("b.png").write_bytes(data[:33] + other + data[33:])  # behind IHDR
        Image.open("b.png").load()
        assert read_record("b.png") == RECORD

    def test_show_has_no_control_characters(self):
        Image.new("RGB", (8, 8)).save("a.png", pnginfo=png_info(RECORD))
        result = run("show", "a.png")
        assert result.exit_code == 0
        assert "größer 猫\\n\\x1b[2J" in result.output
        assert "\x1b" not in result.output
        assert len(result.output.splitlines()) == len(list(RECORD.lines()))
        for value in (
            "some/model",
            "style:0.5",
            "blurry",
            "in/cat.png",
            "noise.safetensors",
            "some/vae",
            "v1",
        ):
            assert value in result.output

    def test_a_request_too_long_to_be_read_is_not_written(self):
        record = Record("m", ("x" * MAX_BYTES,), ((),), None, ARGUMENTS)
        with pytest.raises(RequestError, match="carries at most 1,048,576 bytes"):
            png_info(record)


class TestRerun:
    def test_same_bytes(self):
        options = ["--negative-prompt", "blurry", "--guidance-scale", "2"]
        made(*SMALL, "--prompt", "A cat.", *options)  # a seed is drawn
        made(*MODEL, "--from", "a.png", out="b.png")
        assert Path("a.png").read_bytes() == Path("b.png").read_bytes()

    def test_same_bytes_with_images(self):
        made(*SMALL, "--prompt", "<img><|image_1|></img> at night", "--image", str(CAT))
        made(*MODEL, "--from", "a.png", "--recorded-images", out="b.png")
        made(*MODEL, "--from", "a.png", "--image", str(CAT), out="c.png")
        assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
        assert Path("a.png").read_bytes() == Path("c.png").read_bytes()

    def test_what_is_given_counts(self):
        made(*SMALL, "--prompt", "A cat.", "--seed", "5")
        made(*MODEL, "--from", "a.png", "--seed", "6", "--prompt", "A dog.", out="b.png")
        record = read_record("b.png")
        assert record.prompts == ("A dog.",)
        assert record.arguments == read_record("a.png").arguments | {"seed": 6}

    def test_a_file_opens_nothing_by_itself(self):
        made(*SMALL, "--prompt", "<img><|image_1|></img> at night", "--image", str(CAT))
        result = run("generate", "--from", "a.png", "--out", "b.png")
        assert result.exit_code == 2
        assert f"--model {TINY}" in result.output and "--image " in result.output
        assert "a picture opens nothing by itself" in result.output
        assert not Path("b.png").exists()

    def test_all_that_decides_the_picture_is_asked_for(self):
        plain = {"prompt": ["A cat."], "input_images": [[]], "index": 0}
        with_text(json.dumps(fields(**plain)))
        rest = "--vae-path some/vae --revision v1 --lora style:0.5 --latents noise.safetensors"
        for options, asked in (
            ([], f"--model some/model {rest};"),
            (["--model", "some/model"], f"was made with {rest};"),
            (["--model", str(TINY), "--lora", "other"], "was made with --latents"),
        ):
            result = run("generate", "--from", "x.png", *options, "--out", "b.png")
            assert result.exit_code == 2
            assert asked in result.output

    @pytest.mark.parametrize(
        ("change", "message"),
        [(os.remove, "is not there"), (lambda path: Path(path).write_bytes(b""), "has changed")],
        ids=["gone", "changed"],
    )
    def test_images_are_those_of_then(self, change, message):
        Path("cat.png").write_bytes(CAT.read_bytes())
        made(*SMALL, "--prompt", "<img><|image_1|></img> at night", "--image", "cat.png")
        change("cat.png")
        result = run(
            *("generate", *MODEL, "--from", "a.png", "--recorded-images", "--out", "b.png")
        )
        assert result.exit_code == 2
        assert message in result.output and "give the images with --image" in result.output

    @pytest.mark.parametrize("path", ["/etc/passwd", "/dev/zero", "../../x", "pipe", "."])
    def test_hostile_paths_are_not_read(self, path):
        os.mkfifo("pipe")
        with_text(json.dumps(fields(input_images=[[], [{"path": path, "sha256": "0" * 64}]])))
        with pytest.raises(RequestError, match=r"is not there|has changed since"):
            find_images(read_record("x.png"), "x.png")


MALFORMED = {
    "no json": "{",
    "no text": b"\xff\xfe\xfd",
    "no object": "[]",
    "null": "null",
    "deep": "[" * 100_000,
    "long number": json.dumps(without("seed"))[:-1] + f', "seed": {"9" * 9999}}}',
    "not a number": json.dumps(fields(guidance_scale=float("nan"))),
    "unknown": json.dumps(fields(callback="os.system")),
    "control": json.dumps(fields(**{"\x1b[2J": 1})),
    "bool for int": json.dumps(fields(seed=True)),
    "text for int": json.dumps(fields(height="32")),
    "no prompts": json.dumps(fields(prompt=[], input_images=[])),
    "too few images": json.dumps(fields(input_images=[[]])),
    "prompt of lists": json.dumps(fields(prompt=[["x"], "y"])),
    "nul in path": json.dumps(fields(latents={"path": "a\0b", "sha256": None})),
    "digest": json.dumps(fields(latents={"path": "a", "sha256": "0" * 63})),
    "file with more": json.dumps(fields(latents={"path": "a", "sha256": None, "x": 1})),
    "index": json.dumps(fields(index=-1)),
    "long index": json.dumps(fields(index=0))[:-1] + f', "index": {"9" * 4300}}}',
    **{f"without {name}": json.dumps(without(name)) for name in fields()},
}


class TestHostile:
    @pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED)
    def test_malformed_text(self, text):
        with_text(text)
        result = run("show", "x.png")
        assert result.exit_code == 2, result.exception
        (line,) = result.output.splitlines()
        assert line.startswith("Error: x.png: the request in it is damaged (")
        assert line.isprintable()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"height": 10**4000}, "height must be from"),
            ({"seed": 10**100}, "seed must be from"),
            ({"guidance_scale": 1e308 * 10}, None),  # JSON knows no infinity
            ({"num_inference_steps": 10**9}, "num_inference_steps must be from 1 to 1000"),
            ({"num_images_per_prompt": 10**9}, "num_images_per_prompt must be from 1 to"),
            ({"dtype": "float16"}, "float16 overflows"),
            ({"dtype": "__class__"}, "dtype must be bfloat16 or float32"),
            ({"prompt": ["\ud800"]}, "which is not a character"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_values_are_checked_as_those_of_a_call(self, change, message):
        plain = {"prompt": ["A cat."], "input_images": [[]], "loras": [], "latents": None}
        with_text(json.dumps(fields(**plain | {"index": 0} | change)))
        result = run("generate", *MODEL, "--from", "x.png", "--out", "b.png")
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == 2
        assert (message or "damaged") in result.output
        assert not Path("b.png").exists()

    def test_infinity_by_overflow(self):
        plain = fields(prompt=["A cat."], input_images=[[]], loras=[], latents=None, index=0)
        with_text(json.dumps(plain).replace('"guidance_scale": 2.5', '"guidance_scale": 1e999'))
        result = run("generate", *MODEL, "--from", "x.png", "--out", "b.png")
        assert result.exit_code == 2
        assert "guidance_scale must be a finite number, got inf" in result.output

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (b"", "is not a PNG file"),
            (CAT.read_bytes(), "carries no request"),
            (CAT.read_bytes()[:50], "carries no request"),
            (b"\x89PNG\r\n\x1a\n\xff\xff\xff\xfftEXtomnigen_fast\0", "at most 1,048,576 are read"),
            (b"\x89PNG\r\n\x1a\n\x00\x00\x00\x20tEXtomnigen_fast\0{}", "checksum"),
            (b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIDAT", "carries no request"),
        ],
    )
    def test_files_that_are_not_ours(self, data, message):
        Path("x.png").write_bytes(data)
        with pytest.raises(RequestError, match=message):
            read_record("x.png")

    def test_wrong_checksum(self):
        text = b"omnigen_fast\0" + RECORD.text().encode()
        png(chunk(b"tEXt", text, checksum=1))
        with pytest.raises(RequestError, match="checksum"):
            read_record("x.png")

    @pytest.mark.parametrize("path", ["absent.png", "."])
    def test_no_file(self, path):
        with pytest.raises(RequestError, match=r"give a PNG file that omnigen-fast wrote"):
            read_record(path)

    def test_compressed_text_is_not_opened(self):
        """A zTXt chunk could be a bomb; we never write one."""
        png(chunk(b"zTXt", b"omnigen_fast\0\0" + zlib.compress(b"0" * 10_000_000)))
        with pytest.raises(RequestError, match="carries no request"):
            read_record("x.png")

    @settings(max_examples=150, deadline=None)
    @given(
        name=st.sampled_from(sorted(fields())),
        value=st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=5,
        ),
    )
    def test_any_value_is_taken_as_it_is_or_refused(self, name, value):
        with_text(json.dumps(fields(**{name: value})))
        try:
            record = read_record("x.png")
        except RequestError as error:
            assert str(error).isprintable()
        else:
            assert json.loads(record.text()) == fields(**{name: value})
            assert all(line.isprintable() for line in record.lines())


def test_it_is_not_sought_among_more_parts_than_a_picture_has():
    ours = chunk(b"tEXt", b"omnigen_fast\0" + RECORD.text().encode())
    few, many = (png(*[chunk(b"IDAT", b"")] * number, ours) for number in (1000, 100_000))
    with pytest.raises(RequestError, match="carries no request"):
        read_record(many)
    png(*[chunk(b"IDAT", b"")] * 1000, ours)
    assert read_record(few) == RECORD


def test_an_input_image_of_any_size_is_not_read(tmp_path):
    huge = tmp_path / "huge.png"
    with open(huge, "wb") as file:
        file.truncate((1 << 30) + 1)  # a hole, which takes no space
    record = Record(**{**vars(RECORD), "input_images": ((RecordedFile("huge.png", "0" * 64),),)})
    with pytest.raises(RequestError, match="too large to be one"):
        find_images(record, tmp_path / "x.png")
