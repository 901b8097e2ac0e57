"""`generate` thinks along: seeds, files of prompts, aspects, the model's defaults, formats."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from golden_cases import TINY
from PIL import Image

from omnigen_fast import OmniGenPipeline
from omnigen_fast.cli.main import main
from omnigen_fast.cli.sizes import sides
from omnigen_fast.errors import CheckpointError, RequestError
from omnigen_fast.model_defaults import defaults_of
from omnigen_fast.page.record import read_record

MODEL = ["--model", str(TINY), "--device", "cpu", "--dtype", "float32"]
SMALL = [*MODEL, "--height", "32", "--width", "48", "--steps", "1", "--quiet"]
CALL = {"height": 32, "width": 48, "num_inference_steps": 1, "progress": False}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, **options):
    return CliRunner().invoke(main, ["generate", *arguments], **options)


def generate(*arguments: str, **options) -> list[str]:
    result = run(*SMALL, *arguments, **options)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def refused(result, *parts: str) -> None:
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    assert line.startswith("Error: ") and all(part in line for part in parts), line


def pixels(path: str) -> np.ndarray:
    return np.array(Image.open(path))


class TestSeveral:
    def test_each_seed_is_a_call_of_its_own(self, pipe):
        names = generate("--prompt", "A cat.", "--seed", "4", "--seed", "9", "--out", "a.png")
        assert names == ["a-1.png", "a-2.png"]
        for name, seed in zip(names, (4, 9)):
            (expected,) = pipe("A cat.", seed=seed, **CALL)
            np.testing.assert_array_equal(pixels(name), np.array(expected))
            assert read_record(name).arguments["seed"] == seed

    def test_count_and_seeds_multiply(self, pipe):
        arguments = ["--prompt", "A cat.", "--seed", "4", "--seed", "9", "--count", "2"]
        names = generate(*arguments, "--out", "a.png")
        assert names == [f"a-{i}.png" for i in (1, 2, 3, 4)]
        pictures = [one for seed in (4, 9) for one in pipe("A cat.", seed=seed, **CALL | TWO)]
        for name, expected in zip(names, pictures):
            np.testing.assert_array_equal(pixels(name), np.array(expected))
        found = [read_record(name) for name in names]
        assert [(one.arguments["seed"], one.index) for one in found] == [
            *((4, 0), (4, 1), (9, 0), (9, 1))
        ]

    def test_arrays_of_several_seeds_are_one(self, pipe):
        arguments = ["--prompt", "x", "--seed", "4", "--seed", "9", "--output-type", "np"]
        assert generate(*arguments, "--out", "a.npy") == ["a.npy"]
        expected = [pipe("x", seed=seed, output_type="np", **CALL) for seed in (4, 9)]
        np.testing.assert_array_equal(np.load("a.npy"), np.concatenate(expected))

    def test_a_file_of_prompts(self, pipe):
        Path("prompts.txt").write_text("\ufeffA cat.\r\n\n  A dog.  \n", encoding="utf-8")
        arguments = ["--prompt-file", "prompts.txt", "--seed", "4", "--seed", "9"]
        names = generate(*arguments, "--out", "a.png")
        assert len(names) == 4
        wanted = [(text, seed) for text in ("A cat.", "A dog.") for seed in (4, 9)]
        for name, (text, seed) in zip(names, wanted):
            (expected,) = pipe(text, seed=seed, **CALL)
            np.testing.assert_array_equal(pixels(name), np.array(expected))
            assert read_record(name).prompts == (text,)

    def test_prompts_from_standard_input(self):
        names = generate("--prompt-file", "-", "--out", "a.png", input="A cat.\nA dog.\n")
        assert [read_record(name).prompts for name in names] == [("A cat.",), ("A dog.",)]

    def test_a_mistake_in_the_last_line_is_found_before_the_first_picture(self):
        Path("prompts.txt").write_text("A cat.\n\n<img><|image_1|></img> at night\n")
        result = run(*SMALL, "--prompt-file", "prompts.txt", "--out", "a.png")
        refused(result, "prompts.txt, line 3: prompt names image 1")
        assert os.listdir() == ["prompts.txt"]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            (b"\n \n", "is empty; write one prompt a line"),
            (b"\xff\xfe", "is not UTF-8"),
            (b'{"prompt": "x"}\n', "omnigen-fast batch prompts.txt FOLDER"),
            (b"x" * ((16 << 20) + 1), "more than 16 MiB"),
            (None, "can't be read: No such file"),
        ],
        ids=["empty", "bytes", "json", "huge", "absent"],
    )
    def test_files_that_hold_no_prompts(self, monkeypatch, text, said):
        monkeypatch.setattr(OmniGenPipeline, "from_pretrained", None)
        if text is not None:
            Path("prompts.txt").write_bytes(text)
        refused(run(*SMALL, "--prompt-file", "prompts.txt", "--out", "a.png"), said)

    def test_prompts_come_from_one_place(self):
        Path("p.txt").write_text("x\n")
        arguments = ["--prompt", "x", "--prompt-file", "p.txt", "--out", "a.png"]
        refused(run(*SMALL, *arguments), "give one of them")


TWO = {"num_images_per_prompt": 2}


class TestSizes:
    @pytest.mark.parametrize(
        ("size", "aspect", "expected"),
        [
            (1024, "3:2", (832, 1248)),
            (1024, "2:3", (1248, 832)),
            (1024, "16:9", (768, 1360)),
            (1024, "1:1", (1024, 1024)),
            (512, "4x3", (432, 576)),
            (None, "1.5:1", (96, 144)),
        ],
    )
    def test_aspects(self, size, aspect, expected):
        height, width = sides(size, aspect, None, None, 128)
        assert (height, width) == expected
        assert height % 16 == width % 16 == 0

    @pytest.mark.parametrize(
        ("size", "aspect", "said"),
        [
            (16, "3:2", "32 x 16 comes nearest; give a larger --size"),
            (1024, "0:1", "must be WIDTH:HEIGHT such as 3:2"),
            (1024, "1:0", "must be WIDTH:HEIGHT such as 3:2"),
            (1024, "wide", "got 'wide'"),
            (1000, None, "--size must be a multiple of 16, got 1000; the nearest: 992 and 1008"),
            (7, None, "the nearest: 16"),
            (-16, None, "must be positive"),
            (10**9, "3:2", "must be from 16 to"),
        ],
    )
    def test_impossible_ones(self, size, aspect, said):
        with pytest.raises(RequestError) as caught:
            sides(size, aspect, None, None, 128)
        assert said in str(caught.value)

    def test_the_picture_has_the_size(self):
        (name,) = run(
            *(*MODEL, "--size", "64", "--aspect", "3:2", "--steps", "1", "--quiet"),
            *("--prompt", "x", "--out", "a.png"),
        ).stdout.splitlines()
        assert Image.open(name).size == (80, 48)
        result = run(*SMALL, "--aspect", "3:2", "--prompt", "x", "--out", "b.png")
        refused(result, "--aspect 3:2 can't be had with --height or --width")

    def test_plan_takes_the_same(self):
        found = CliRunner().invoke(main, ["plan", "--device", "a800", "--aspect", "3:2"])
        assert found.exit_code == 0 and "1248 x 832 px" in found.output


class TestDefaultsOfTheModel:
    def test_the_bundled_model_has_its_own(self, monkeypatch):
        seen = {}

        class Pipe:
            def __call__(self, **arguments):
                seen.update(arguments)
                return [Image.new("RGB", (16, 16))]

        monkeypatch.setattr(OmniGenPipeline, "from_pretrained", lambda *_, **__: Pipe())
        start = ["--model", "shapes", "--prompt", "x", "--out", "a.png"]
        assert run(*start).exit_code == 0
        own = dict(defaults_of("shapes").call)
        assert own == {name: seen[name] for name in own}
        assert (own["height"], own["num_inference_steps"], own["guidance_scale"]) == (128, 25, 2.5)
        assert run(*start, "--steps", "7", "--size", "64").exit_code == 0
        assert (seen["num_inference_steps"], seen["height"], seen["width"]) == (7, 64, 64)
        assert run(*start, "--quality", "fast").exit_code == 0
        assert seen["num_inference_steps"] == 14 and seen["height"] == 128
        assert run(*start, "--aspect", "3:2").exit_code == 0
        assert (seen["height"], seen["width"]) == (96, 144)

    def test_in_python(self):
        pipe = OmniGenPipeline.from_pretrained("shapes", device="cpu")
        assert pipe.defaults == defaults_of("shapes").call
        decision = pipe.plan("A red star.", **pipe.defaults)
        assert decision.estimate.workload.height == 128

    def test_they_are_saved_with_the_model(self, tmp_path):
        pipe = OmniGenPipeline.from_pretrained("shapes", device="cpu")
        pipe.save_pretrained(tmp_path / "copy")
        assert defaults_of(str(tmp_path / "copy")) == defaults_of("shapes")

    def test_a_folder_without_them_has_none(self):
        assert not defaults_of(str(TINY)).call and not defaults_of("owner/name").call

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("[]", "must hold a JSON object"),
            ('{"call": {"heigth": 1}}', "got 'heigth'"),
            ('{"call": {"height": "tall"}}', "height must be a number"),
            ('{"call": {"height": true}}', "height must be a number"),
            ('{"call": 1}', "got 1"),
            ('{"vocabulary": 1}', "vocabulary must be a text"),
            ('{"more": 1}', "got 'more'"),
        ],
    )
    def test_malformed_ones(self, tmp_path, text, said):
        (tmp_path / "omnigen_fast.json").write_text(text)
        with pytest.raises(CheckpointError) as caught:
            defaults_of(str(tmp_path))
        assert said in str(caught.value)


class TestFormats:
    @pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".WEBP"])
    def test_a_request_comes_back_from_jpeg_and_webp(self, suffix):
        name = f"a{suffix}"
        generate("--prompt", "größer 猫", "--guidance-scale", "2", "--out", name)
        record = read_record(name)
        assert record.prompts == ("größer 猫",) and record.arguments["guidance_scale"] == 2
        shown = CliRunner().invoke(main, ["show", name])
        assert shown.exit_code == 0 and "größer 猫" in shown.output
        again = run(*MODEL, "--quiet", "--from", name, "--out", f"b{suffix}")
        assert again.exit_code == 0, again.output
        assert Path(name).read_bytes() == Path(f"b{suffix}").read_bytes()

    def test_it_does_not_change_the_picture(self, pipe):
        generate("--prompt", "A cat.", "--seed", "3", "--out", "a.jpg")
        (expected,) = pipe("A cat.", seed=3, **CALL)
        expected.save("plain.jpg")
        np.testing.assert_array_equal(pixels("a.jpg"), pixels("plain.jpg"))

    def test_a_request_too_long_for_jpeg_is_refused_before_the_work(self, monkeypatch):
        monkeypatch.setattr(OmniGenPipeline, "from_pretrained", None)
        arguments = [part for _ in range(120) for part in ("--prompt", "x" * 600)]
        refused(run(*SMALL, *arguments, "--out", "a.jpg"), "a JPG file carries at most 65,000")


class TestOpen:
    @pytest.mark.parametrize("status", [0, 1])
    def test_the_first_picture_is_opened(self, monkeypatch, status):
        opened = []
        monkeypatch.setattr("click.launch", lambda path: opened.append(path) or status)
        result = run(*SMALL, "--prompt", "x", "--count", "2", "--open", "--out", "a.png")
        assert opened == ["a-1.png"] and Path("a-2.png").exists()
        assert result.exit_code == status
        assert ("no program could open it" in result.output) == bool(status)

    def test_arrays_are_no_pictures(self):
        arguments = ["--prompt", "x", "--output-type", "np", "--out", "a.npy", "--open"]
        refused(run(*SMALL, *arguments), "--output-type np makes none")
