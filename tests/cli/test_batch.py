"""A batch makes the pictures of its lines, like ones together where that pays."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from batch_cases import (
    CALL,
    CAT,
    EDIT,
    MODEL,
    by_id,
    defaults,
    entries,
    made,
    pictures,
    pixels,
    prompts,
    write,
)
from click.testing import CliRunner
from golden_cases import relative_error
from PIL import Image
from safetensors.torch import load_file, save_file

from omnigen_fast import OmniGenPipeline
from omnigen_fast.batch import run as batch_run
from omnigen_fast.batch.lines import KEYS, REFUSED_KEYS, BadLine, Job, Source
from omnigen_fast.batch.results import Results
from omnigen_fast.cli.main import main
from omnigen_fast.errors import MemoryBudgetError, OmniGenError
from omnigen_fast.page.record import Record, read_record

pytestmark = [pytest.mark.early, pytest.mark.usefixtures("folder")]


class TestPictures:
    def test_are_those_of_calls_of_their_own(self, pipe):
        Path("images").mkdir()
        Path("images/cat.png").write_bytes(CAT.read_bytes())
        write(
            {"prompt": "A cat.", "seed": 1},
            {"id": "edit", "prompt": EDIT, "input_images": ["images/cat.png"], "seed": 2},
            {"id": "wide", "prompt": "A cat.", "width": 64, "guidance_scale": 2, "seed": 1},
            {"id": 7, "prompt": "A dog.", "negative_prompt": "blurry", "seed": 1},
            {"id": "own", "prompt": EDIT, "input_images": "images/cat.png", "seed": 2}
            | {"use_input_image_size_as_output": True},
            {"id": "猫", "prompt": "A cat.", "num_images_per_prompt": 2, "seed": 5},
        )
        assert made() == "6 done: out/results.jsonl"
        expected = {
            "1.png": pipe("A cat.", **CALL, seed=1),
            "edit.png": pipe(EDIT, [CAT], **CALL, seed=2),
            "wide.png": pipe("A cat.", **CALL | {"width": 64}, guidance_scale=2, seed=1),
            "7.png": pipe("A dog.", negative_prompt="blurry", **CALL, seed=1),
            "own.png": pipe(EDIT, [CAT], **CALL, seed=2, use_input_image_size_as_output=True),
        }
        twins = pipe("A cat.", **CALL, num_images_per_prompt=2, seed=5)
        expected |= {"猫-1.png": twins[:1], "猫-2.png": twins[1:]}
        assert pictures() == sorted(expected)
        for name, (image,) in expected.items():
            near = np.array(image, dtype=int) - pixels(f"out/{name}")
            assert np.abs(near).max() <= 1, name  # lines that ran together differ by rounding

    def test_carry_a_request_that_makes_them_again(self):
        Path("cat.png").write_bytes(CAT.read_bytes())
        write({"prompt": EDIT, "input_images": ["cat.png"], "negative_prompt": "blurry"})
        made()
        record = read_record("out/1.png")
        assert record.prompts == (EDIT,)
        assert record.negative_prompts == ("blurry",)
        assert record.input_images[0][0].path == "../cat.png"
        assert record.arguments["seed"] == entries()[0]["seed"]  # drawn
        again = ["generate", *MODEL, "--from", "out/1.png", "--recorded-images", "--quiet"]
        Path("other").mkdir()  # the record names the image from there
        result = CliRunner().invoke(main, [*again, "--out", "other/a.png"])
        assert result.exit_code == 0, result.output
        assert Path("other/a.png").read_bytes() == Path("out/1.png").read_bytes()

    def test_options_are_defaults_of_all_lines(self, pipe, folder):
        Path("here").mkdir()
        write({"seed": 3}, {"prompt": "A dog.", "input_images": [], "seed": None})
        options = ["--prompt", EDIT, "--image", str(CAT), "--seed", "4", "--steps", "2"]
        assert made(*options, "--negative-prompt", "ugly") == "2 done: out/results.jsonl"
        assert [entry["seed"] for entry in entries()] == [3, 4]
        call = CALL | {"num_inference_steps": 2, "negative_prompt": "ugly"}
        for name, (image,) in {
            "1.png": pipe(EDIT, [CAT], **call, seed=3),
            "2.png": pipe("A dog.", **call, seed=4),
        }.items():
            assert np.abs(np.array(image, dtype=int) - pixels(f"out/{name}")).max() <= 1

    def test_masks_and_less_work(self, pipe):
        Image.linear_gradient("L").resize((32, 32)).save("photo.png")
        Image.linear_gradient("L").resize((32, 32)).save("mask.png")
        options = {"solver": "ab2", "guidance_interval": [0, 0.5], "num_inference_steps": 3}
        masked = {"mask_image": "mask.png", "mask_blur": 2, "strength": 0.7}
        edit = {"prompt": EDIT, "input_images": ["photo.png"], "width": 32, "seed": 1}
        lines = [{**edit, **masked}, {**edit, **masked, "mask_image": "photo.png"}]
        write(*lines, {**edit, **options}, {**edit, "prompt": "A cat.", "mask_image": "../x.png"})
        assert made(code=1).startswith("3 done, 1 failed")
        for number, one in enumerate((*lines, {**edit, **options}), 1):
            (image,) = pipe(**CALL | one)
            assert np.abs(np.array(image, dtype=int) - pixels(f"out/{number}.png")).max() <= 1
        record = read_record("out/1.png")
        assert record.mask_image.path == "../mask.png"
        assert read_record("out/3.png").arguments["solver"] == "ab2"
        assert "outside the folder" in by_id()["4"]["error"]

    def test_a_lines_quality_decides_over_options(self, pipe):
        edit = {"prompt": "A cat.", "width": 32, "seed": 1, "num_inference_steps": 4}
        write({**edit, "quality": "fast"}, {**edit, "quality": "fast", "reuse": 0}, edit)
        assert made("--solver", "heun", "--quality", "high").startswith("3 done")
        for number, own in enumerate(
            (
                {"quality": "fast"},
                {"quality": "fast", "reuse": 0},
                {"quality": "high", "solver": "heun"},
            ),
            1,
        ):
            (image,) = pipe(**CALL | edit | own)
            assert np.abs(np.array(image, dtype=int) - pixels(f"out/{number}.png")).max() <= 1
            assert read_record(f"out/{number}.png").arguments["quality"] == own["quality"]

    def test_every_argument_of_a_call_is_a_key(self):
        arguments = set(inspect.signature(OmniGenPipeline.__call__).parameters) - {"self"}
        assert arguments - set(KEYS) == set(REFUSED_KEYS)

    def test_every_option_of_generate_is_one(self):
        names = {
            command: {one.name for one in main.commands[command].params}
            for command in ("generate", "batch")
        }
        alone = {"picture", "trusts_images", "prompt_file", "opens"}
        assert names["generate"] - names["batch"] == alone

    def test_other_output_types_and_latents(self, pipe):
        save_file({"x": torch.ones(1, 4, 4, 6)}, "noise.safetensors")
        write(
            {"prompt": "A cat.", "output_type": "np", "latents": "noise.safetensors"},
            {"prompt": "A cat.", "output_type": "pt", "seed": 1},
            {"prompt": "A cat.", "output_type": "latent", "seed": 1},
        )
        made()
        assert pictures() == ["1.npy", "2.safetensors", "3.safetensors"]
        noise = torch.ones(1, 4, 4, 6)
        expected = pipe("A cat.", **CALL, latents=noise, output_type="np")
        np.testing.assert_array_equal(np.load("out/1.npy"), expected)
        expected = pipe("A cat.", **CALL, seed=1, output_type="pt")
        assert torch.equal(load_file("out/2.safetensors")["images"], expected)

    def test_the_originals_training_data_is_read(self, pipe):
        Path("images").mkdir()
        Path("images/source.png").write_bytes(CAT.read_bytes())
        kind = {"task_type": "image_edit", "output_image": "target.png"}
        write(
            kind | {"instruction": EDIT, "input_images": ["source.png"]},
            kind | {"instruction": "A cat.", "input_images": []},
        )
        assert made("--image-folder", "images", "--seed", "1") == "2 done: out/results.jsonl"
        for name, (image,) in {
            "1.png": pipe(EDIT, [CAT], **CALL, seed=1),
            "2.png": pipe("A cat.", **CALL, seed=1),
        }.items():
            assert np.abs(np.array(image, dtype=int) - pixels(f"out/{name}")).max() <= 1


class TestTogether:
    LINES = (
        {"prompt": "A cat.", "seed": 1},
        {"prompt": EDIT, "input_images": ["cat.png"], "seed": 2},
        {"prompt": "A large dog on a mat.", "negative_prompt": "ugly", "seed": 1},
        {"prompt": "A cat.", "seed": -3},
    )
    LATENT = ("--output-type", "latent", "--steps", "3")

    @pytest.fixture(autouse=True)
    def image(self, folder):
        Path("cat.png").write_bytes(CAT.read_bytes())

    def test_equal_each_alone(self, calls, pipe):
        write(*self.LINES)
        made(*self.LATENT)
        assert calls == [[line["prompt"] for line in self.LINES]]
        call = CALL | {"num_inference_steps": 3, "output_type": "latent"}
        for i, line in enumerate(self.LINES, 1):
            alone = pipe(**line | call)
            together = load_file(f"out/{i}.safetensors")["latents"]
            assert relative_error(together, alone) < 1e-5

    def test_several_pictures_of_each(self, calls, pipe):
        write(*self.LINES)
        made(*self.LATENT, "--num-images-per-prompt", "2")
        assert len(calls) == 1
        call = CALL | {"num_inference_steps": 3, "output_type": "latent"}
        for i, line in enumerate(self.LINES, 1):
            alone = pipe(**line | call, num_images_per_prompt=2)
            together = load_file(f"out/{i}.safetensors")["latents"]
            assert relative_error(together, alone) < 1e-5

    def test_only_like_lines(self, calls):
        write(
            {"prompt": "a", "width": 64},
            {"prompt": "b", "num_inference_steps": 2},
            {"prompt": "c", "width": 64},
            {"prompt": "d", "guidance_scale": 2},
            {"prompt": "e", "width": 64.0, "guidance_scale": 3},
            {"prompt": EDIT, "input_images": ["cat.png"], "use_input_image_size_as_output": True},
        )
        made()
        assert calls == [["a", "c", "e"], ["b"], ["d"], [EDIT]]

    def test_only_where_the_planner_says_that_it_pays(self, calls, monkeypatch):
        """Not if four take longer than four times one, but if two take less than twice one."""
        plan = OmniGenPipeline.plan

        class Seconds:
            def __init__(self, decision, seconds):
                self.estimate, self.cost, self.seconds = decision.estimate, self, seconds

        def planned(self, prompt, **call):
            seconds = {1: 1.0, 2: 1.9, 4: 4.0}[len(prompt)]
            return Seconds(plan(self, prompt, **call), seconds)

        monkeypatch.setattr(OmniGenPipeline, "plan", planned)
        write(*prompts(4))
        made()
        assert calls == [["Cat 0.", "Cat 1."], ["Cat 2.", "Cat 3."]]

    def test_only_if_they_fit(self, calls, monkeypatch):
        plan = OmniGenPipeline.plan

        def planned(self, prompt, **call):
            if len(prompt) > 1:
                raise MemoryBudgetError("too large", 2, 1)
            return plan(self, prompt, **call)

        monkeypatch.setattr(OmniGenPipeline, "plan", planned)
        write(*prompts(2))
        made()
        assert calls == [["Cat 0."], ["Cat 1."]]

    def test_lines_that_fail_together_run_alone(self, monkeypatch, calls):
        counted = OmniGenPipeline.__call__

        @functools.wraps(OmniGenPipeline.__call__)
        def failing(self, prompt, **call):
            if "Cat 1." in prompt:
                calls.append(prompt)
                raise OmniGenError("out of memory")
            return counted(self, prompt, **call)

        monkeypatch.setattr(OmniGenPipeline, "__call__", failing)
        write(*prompts(3))
        assert made(code=1) == "2 done, 1 failed: out/results.jsonl"
        assert calls == [["Cat 0.", "Cat 1.", "Cat 2."], ["Cat 0."], ["Cat 1."], ["Cat 2."]]
        assert by_id()["2"]["error"] == "out of memory"

    def test_only_a_window_is_read_ahead(self, calls, pipe, monkeypatch):
        monkeypatch.setattr(batch_run, "WINDOW", 3)
        write(*prompts(10))
        read, seen = [], []

        def counted() -> Iterator[Job | BadLine]:
            source = Source(Path(), Path("out"), Record("m", (), (), None, {}), defaults())
            with open("in.jsonl", "rb") as file:
                for line in source.lines(file):
                    read.append(line)
                    yield line

        def save(job, result, record):
            seen.append((job.number, len(read)))
            return [Path("out", job.id)]

        Path("out").mkdir()
        with Results(Path("out")) as results:
            batch_run.run(lambda: pipe, counted(), results, save)
        assert [number for number, _ in seen] == list(range(1, 11))
        assert max(ahead - number for number, ahead in seen) < 3
