"""A batch goes on wherever it stopped, does nothing twice, and no line stops another."""

from __future__ import annotations

import errno
import functools
import inspect
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden_cases import GOLDEN, TINY, relative_error
from PIL import Image
from safetensors.torch import load_file, save_file

from omnigen_fast import OmniGenPipeline
from omnigen_fast.batch import run as batch_run
from omnigen_fast.batch.lines import KEYS, MAX_LINE_BYTES, REFUSED_KEYS, BadLine, Job, Source
from omnigen_fast.batch.results import Entry, Results
from omnigen_fast.cli.files import UserPath
from omnigen_fast.cli.main import main
from omnigen_fast.errors import MAX_MESSAGE, MemoryBudgetError, OmniGenError
from omnigen_fast.page.record import Record, read_record

pytestmark = pytest.mark.slow

CAT = GOLDEN / "images/cat.png"
EDIT = "<img><|image_1|></img> at night"
MODEL = ["--model", str(TINY), "--device", "cpu", "--dtype", "float32"]
SMALL = [*MODEL, "--height", "32", "--width", "48", "--steps", "1"]
SMALL += ["--max-input-image-size", "32", "--quiet"]
CALL = {
    "height": 32,
    "width": 48,
    "num_inference_steps": 1,
    "max_input_image_size": 32,
    "progress": False,
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def calls(monkeypatch, pipe) -> list[list[str]]:
    """The prompts of each call that was made, all on the shared pipeline."""
    made: list[list[str]] = []
    call = OmniGenPipeline.__call__

    @functools.wraps(call)  # whose signature `plan` reads
    def counted(self, prompt, *arguments, **named):
        made.append(prompt)
        return call(self, prompt, *arguments, **named)

    monkeypatch.setattr(OmniGenPipeline, "__call__", counted)
    monkeypatch.setattr(OmniGenPipeline, "from_pretrained", lambda *_, **__: pipe)
    return made


def write(*lines: Any, name: str = "in.jsonl") -> str:
    """A batch file; what is no bytes is written as JSON."""
    texts = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in lines]
    Path(name).write_bytes(b"\n".join(texts) + b"\n")
    return name


def run(*options: str, name: str = "in.jsonl", out: str = "out"):
    return CliRunner().invoke(main, ["batch", name, out, *SMALL, *options])


def made(*options: str, code: int = 0) -> str:
    """Runs the batch; returns its one line."""
    result = run(*options)
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert result.exit_code == code, result.output
    (line,) = result.output.splitlines()
    return line


def entries(out: str = "out") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(out, "results.jsonl").read_text().splitlines()]


def by_id(out: str = "out") -> dict[str, dict[str, Any]]:
    return {entry["id"]: entry for entry in entries(out)}


def pictures(out: str = "out") -> list[str]:
    return sorted(name for name in os.listdir(out) if name != "results.jsonl")


def pixels(path: str) -> np.ndarray:
    return np.array(Image.open(path))


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Cat {i}.", "seed": i} for i in range(count)]


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

    def test_every_argument_of_a_call_is_a_key(self):
        arguments = set(inspect.signature(OmniGenPipeline.__call__).parameters) - {"self"}
        assert arguments - set(KEYS) == set(REFUSED_KEYS)

    def test_every_option_of_generate_is_one(self):
        names = {
            command: {one.name for one in main.commands[command].params}
            for command in ("generate", "batch")
        }
        assert names["generate"] - names["batch"] == {"picture", "trusts_images"}

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


def defaults(**changes: Any) -> dict[str, Any]:
    """What the command's options give to `Source`."""
    values: dict[str, Any] = dict.fromkeys(("prompt", "negative_prompt", "latents", "seed"))
    values |= dict.fromkeys(("use_kv_cache", "offload_kv_cache"))
    values |= dict.fromkeys(("offload_model", "separate_cfg_infer"))
    values |= dict.fromkeys(("guidance_interval", "image_guidance_interval", "timesteps"))
    values |= {"mask_image": None, "mask_blur": 0, "strength": 1.0}
    values |= {"solver": "euler", "time_shift": 1.0}
    values |= {
        "input_images": (),
        "height": 32,
        "width": 48,
        "num_inference_steps": 1,
        "guidance_scale": 3.0,
        "use_img_guidance": True,
        "img_guidance_scale": 1.6,
        "max_input_image_size": 32,
        "use_input_image_size_as_output": False,
        "num_images_per_prompt": 1,
        "dtype": "float32",
        "output_type": "pil",
        "memory": "auto",
    }
    return values | changes


PROGRAM = """
import functools, os, sys, time
from omnigen_fast import OmniGenPipeline
from omnigen_fast.batch import run
from omnigen_fast.cli.main import main

call = OmniGenPipeline.__call__
@functools.wraps(call)
def logged(self, prompt, **named):
    with open("calls", "a") as log:
        log.write("\\n".join(prompt) + "\\n")
    {slow}
    return call(self, prompt, **named)
OmniGenPipeline.__call__ = logged
run.MAX_TOGETHER = {together}
{more}
main()
"""


def program(more: str = "", slow: str = "", together: int = 1) -> list[str]:
    """The command line in a process of its own, which writes the prompts of its calls to a file."""
    code = PROGRAM.format(more=more, slow=slow, together=together)
    return [sys.executable, "-c", code, "batch", "in.jsonl", "out", *SMALL]


def logged_calls() -> list[str]:
    return Path("calls").read_text().splitlines()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class TestInterrupted:
    @pytest.mark.parametrize(
        ("number", "status"),
        [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, 130)],
        ids=["kill", "terminate", "interrupt"],
    )
    def test_goes_on_where_it_was_killed(self, number, status, calls):
        write(*prompts(6))
        process = subprocess.Popen(
            program(slow="time.sleep(0.3)"), stderr=subprocess.PIPE, text=True
        )
        results = Path("out/results.jsonl")
        wait_for(lambda: results.exists() and results.read_bytes().count(b"\n") >= 2)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == status, said
        assert said == ("" if status < 0 else "interrupted; the same command goes on from here\n")
        finished = [f"Cat {entry['line'] - 1}." for entry in entries()]
        assert 2 <= len(finished) < 6
        assert logged_calls()[: len(finished)] == finished
        assert made() == f"6 done ({len(finished)} of them before): out/results.jsonl"
        again = [prompt for prompts in calls for prompt in prompts]
        assert sorted(finished + again) == [f"Cat {i}." for i in range(6)]
        assert pictures() == [f"{i + 1}.png" for i in range(6)]
        assert len(entries()) == 6

    @pytest.mark.parametrize(
        ("more", "finished"),
        [
            # each ends the process as kill -9 does, at the third time
            ("os.replace = at_third(os.replace)", 2),  # the picture has its temporary name
            ("os.replace = at_third(os.replace, after=True)", 2),  # a picture without its entry
            ("os.write = at_third(os.write)", 2),
            ("os.write = at_third(lambda file, data: write(file, data[:50]), after=True)", 2),
            ("os.write = at_third(os.write, after=True)", 3),
        ],
        ids=["picture", "picture-whole", "entry", "entry-half", "entry-whole"],
    )
    def test_goes_on_after_a_kill_at_any_moment(self, more, finished, calls):
        write(*prompts(4))
        hook = f"""
write, times = os.write, 0
def at_third(function, after=False):
    whole = getattr(os, function.__name__, write)
    def counted(*arguments):
        global times
        times += 1
        if times < 3:
            return whole(*arguments)
        if after:
            function(*arguments)
        os._exit(9)
    return counted
{more}
"""
        done = subprocess.run(program(hook), capture_output=True, text=True, timeout=120)
        assert done.returncode == 9, done.stderr
        assert made() == f"4 done ({finished} of them before): out/results.jsonl"
        assert calls == [[f"Cat {i}." for i in range(finished, 4)]]
        assert pictures() == ["1.png", "2.png", "3.png", "4.png"]
        assert [entry["line"] for entry in entries()] == [1, 2, 3, 4]


class TestGoesOn:
    def test_nothing_is_done_twice(self, calls, monkeypatch):
        write(*prompts(3))
        assert made() == "3 done: out/results.jsonl"
        before = Path("out/results.jsonl").read_bytes()

        def load(*_, **__):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr(OmniGenPipeline, "from_pretrained", load)
        assert made() == "3 done (3 of them before): out/results.jsonl"
        assert Path("out/results.jsonl").read_bytes() == before
        assert len(calls) == 1

    @pytest.mark.parametrize("cut", [1, 2, 100, "whole"])
    def test_a_last_line_that_was_cut_off_is_mended(self, calls, cut):
        write(*prompts(2))
        made()
        path = Path("out/results.jsonl")
        first, second = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(first + second[: -cut if cut != "whole" else None])
        # without its newline only, the entry is whole
        assert made() == f"2 done ({2 if cut in (1, 'whole') else 1} of them before): {path}"
        assert path.read_bytes().count(b"\n") == 2
        assert [entry["line"] for entry in entries()] == [1, 2]

    @pytest.mark.parametrize(
        "junk",
        [b"\0" * 500, b"{}", b"[1]\n", b'{"line": 1}\n', b"\xff\n\n", b"x" * 200_000, b"[" * 9999],
        ids=lambda junk: repr(junk[:6]),
    )
    def test_what_is_no_entry_is_passed_over(self, calls, junk):
        write(*prompts(1))
        made()
        with open("out/results.jsonl", "ab") as file:
            file.write(junk)
        write(*prompts(2))
        assert made() == "2 done (1 of them before): out/results.jsonl"
        made()
        assert calls == [["Cat 0."], ["Cat 1."]]

    @pytest.mark.parametrize("lost", ["entry", "picture", "one of two"])
    def test_a_picture_and_its_entry_need_each_other(self, calls, lost):
        write({"prompt": "A cat.", "num_images_per_prompt": 2, "seed": 1}, *prompts(1))
        made()
        if lost == "entry":
            path = Path("out/results.jsonl")
            path.write_bytes(path.read_bytes().splitlines(keepends=True)[1])
        else:
            os.remove("out/1-1.png")
        if lost == "picture":
            os.remove("out/1-2.png")
        assert made() == "2 done (1 of them before): out/results.jsonl"
        assert calls == [["A cat."], ["Cat 0."], ["A cat."]]
        assert pictures() == ["1-1.png", "1-2.png", "2.png"]

    @pytest.mark.parametrize(
        "change",
        [
            {"prompt": "A dog."},
            {"seed": 2},
            {"negative_prompt": ""},
            {"guidance_scale": 2.5},
            {"num_images_per_prompt": 2},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_a_line_that_has_changed_is_done_again(self, calls, change):
        line = {"id": "a", "prompt": "A cat.", "seed": 1}
        write(line)
        made()
        write(line | change)
        assert made() == "1 done: out/results.jsonl"
        assert len(calls) == 2
        assert made() == "1 done (1 of them before): out/results.jsonl"

    def test_a_file_that_has_changed_is_a_change(self, calls):
        Path("a.png").write_bytes(CAT.read_bytes())
        write({"prompt": EDIT, "input_images": ["a.png"], "seed": 1})
        made()
        Image.new("RGB", (32, 32)).save("a.png")
        assert made() == "1 done: out/results.jsonl"
        os.rename("a.png", "b.png")  # the same content
        write({"prompt": EDIT, "input_images": ["b.png"], "seed": 1})
        assert made() == "1 done (1 of them before): out/results.jsonl"

    def test_a_file_that_changes_meanwhile_is_not_used(self, calls, monkeypatch):
        Path("a.png").write_bytes(CAT.read_bytes())
        plan = OmniGenPipeline.plan

        def planned(self, *arguments, **call):
            Image.new("RGB", (32, 32)).save("a.png")
            return plan(self, *arguments, **call)

        monkeypatch.setattr(OmniGenPipeline, "plan", planned)
        write({"prompt": EDIT, "input_images": ["a.png"], "seed": 1})
        made(code=1)
        assert "a.png has changed since its line was read" in entries()[0]["error"]
        assert calls == []
        assert made() == "1 done: out/results.jsonl"

    @pytest.mark.parametrize(
        "again",
        [
            b'{"seed": 1.0, "prompt": "A cat.", "id": "a", "height": null}',
            b'\xef\xbb\xbf{"prompt": "A cat.", "id": "a", "seed": 1, "guidance_scale": 3}\r',
            b'{"prompt": "A cat.", "id": "a", "seed": 1, "input_images": [null], "memory": "8GiB"}',
            b'{"instruction": "A c\\u0061t.", "id": "a", "seed": 1, "use_kv_cache": false}',
        ],
        ids=["order", "encoding", "speed", "instruction"],
    )
    def test_another_spelling_is_no_change(self, calls, again):
        write({"id": "a", "prompt": "A cat.", "seed": 1})
        made()
        write(again)
        assert made() == "1 done (1 of them before): out/results.jsonl"

    def test_a_line_that_failed_is_tried_again_on_request(self, calls, monkeypatch):
        counted = OmniGenPipeline.__call__

        @functools.wraps(OmniGenPipeline.__call__)
        def failing(self, prompt, **call):
            raise OmniGenError("out of memory")

        monkeypatch.setattr(OmniGenPipeline, "__call__", failing)
        write(*prompts(1))
        assert made(code=1) == "0 done, 1 failed: out/results.jsonl"
        monkeypatch.setattr(OmniGenPipeline, "__call__", counted)
        assert made(code=1) == "0 done, 1 failed: out/results.jsonl"
        assert calls == []
        assert made("--retry-failed") == "1 done: out/results.jsonl"
        assert [entry["status"] for entry in entries()] == ["failed", "done"]

    def test_a_line_whose_image_appears_is_tried_again(self):
        write({"prompt": EDIT, "input_images": ["a.png"], "seed": 1})
        made(code=1)
        Path("a.png").write_bytes(CAT.read_bytes())
        assert made() == "1 done: out/results.jsonl"

    def test_an_error_that_is_not_ours_is_an_entry(self, calls, monkeypatch):
        @functools.wraps(OmniGenPipeline.__call__)
        def failing(self, prompt, **call):
            raise RuntimeError("something\nbroke")

        monkeypatch.setattr(OmniGenPipeline, "__call__", failing)
        write(*prompts(1))
        made(code=1)
        assert entries()[0]["error"] == "RuntimeError: something"

    def test_two_processes(self):
        write(*prompts(1))
        Path("out").mkdir()
        with Results(Path("out")):
            line = made(code=1)
        assert line.startswith("Error: another batch is writing to out; wait for its end")
        assert pictures() == []
        assert made() == "1 done: out/results.jsonl"


DEEP = b'{"prompt": ' + b"[" * 100_000
LONG = b'{"prompt": "' + b"x" * MAX_LINE_BYTES + b'"}'
BAD = {
    "broken": (b'{"prompt": "A cat."', "the line is not JSON: Expecting ',' delimiter"),
    "empty list": (b"[]", "the line must be a JSON object"),
    "null": (b"null", "the line must be a JSON object"),
    "latin": ('{"prompt": "größer"}'.encode("latin-1"), "the line is not JSON: 'utf-8' codec"),
    "deep": (DEEP, "the line is not JSON: maximum recursion depth"),
    "long": (LONG, "the line has more than 4,194,304 bytes"),
    "digits": (b'{"seed": ' + b"9" * 9999 + b"}", "the line is not JSON: Exceeds the limit"),
    "infinity": (b'{"prompt": "a", "guidance_scale": Infinity}', "Infinity is not a number"),
    "overflow": (b'{"prompt": "a", "guidance_scale": 1e999}', "must be a finite number, got inf"),
    "twice": (b'{"prompt": "a", "prompt": "b"}', "a key stands in it twice"),
    "unknown": ({"prompt": "a", "widht": 64}, "unknown key 'widht'; did you mean width?"),
    "control": ({"prompt": "a", "\x1b[2J\n": 1}, "unknown key '\\x1b[2J\\n'"),
    "long key": ({"prompt": "a", "x" * 100_000: 1}, "unknown key 'xxx"),
    "model": ({"prompt": "a", "model": "m"}, "unknown key 'model'"),
    "callback": ({"prompt": "a", "callback_on_step_end": "f"}, "callbacks are for Python"),
    "generator": ({"prompt": "a", "generator": 1}, "give a seed"),
    "no prompt": ({"seed": 1}, "the line has no prompt"),
    "two prompts": ({"prompt": "a", "instruction": "b"}, "give one of them"),
    "list of prompts": ({"prompt": ["a", "b"]}, "prompt must be a string, got a list"),
    "blank prompt": ({"prompt": " "}, "prompt is empty"),
    "surrogate": (b'{"prompt": "\\ud800"}', "which is not a character"),
    "long prompt": ({"prompt": "x" * (1 << 20)}, "a picture carries at most"),
    "too many tokens": ({"prompt": "cat " * 200_000}, "prompt"),
    "type": ({"prompt": "a", "height": "64"}, "height must be an integer, got '64'"),
    "boolean": ({"prompt": "a", "seed": True}, "seed must be an integer, got a boolean"),
    "fraction": ({"prompt": "a", "seed": 1.5}, "seed must be an integer, got 1.5"),
    "switch": ({"prompt": "a", "use_kv_cache": 1}, "use_kv_cache must be true or false, got 1"),
    "size": ({"prompt": "a", "height": 100}, "height must be a multiple of 16, got 100"),
    "steps": ({"prompt": "a", "num_inference_steps": 10**9}, "must be from 1 to 1000"),
    "seed": ({"prompt": "a", "seed": 10**100}, "seed must be from"),
    "dtype": ({"prompt": "a", "dtype": "float16"}, "float16 overflows"),
    "attribute": ({"prompt": "a", "dtype": "__class__"}, "must be bfloat16 or float32"),
    "output type": ({"prompt": "a", "output_type": "gif"}, "output_type must be one of"),
    "memory": ({"prompt": "a", "memory": "lots"}, "lots"),
    "no room": ({"prompt": "a", "memory": "1MiB"}, "this request needs at least"),
    "no image": ({"prompt": EDIT}, "prompt names image 1 but input_images has none"),
    "unnamed image": ({"prompt": "a", "input_images": ["cat.png"]}, "names 0 of them"),
    "missing": ({"prompt": EDIT, "input_images": ["no.png"]}, "no.png does not exist"),
    "folder": ({"prompt": EDIT, "input_images": ["."]}, "is a folder"),
    "pipe": ({"prompt": EDIT, "input_images": ["pipe"]}, "is not a regular file"),
    "no path": ({"prompt": EDIT, "input_images": [7]}, "must be a path or a list of paths"),
    "empty path": ({"prompt": EDIT, "input_images": [""]}, "must be a path or a list of paths"),
    "nul": (b'{"prompt": "a", "input_images": ["a\\u0000b"]}', "is no path"),
    "odd path": (b'{"prompt": "a", "input_images": ["\\ud800"]}', "is no path"),
    "address": ({"prompt": EDIT, "input_images": ["https://example.org/a.png"]}, "web address"),
    "data": ({"prompt": EDIT, "input_images": ["data:image/png;base64,xx"]}, "web address or"),
    "above": ({"prompt": EDIT, "input_images": ["../secret.png"]}, "is outside the folder"),
    "absolute": ({"prompt": EDIT, "input_images": ["/etc/passwd"]}, "is outside the folder"),
    "home": ({"prompt": EDIT, "input_images": ["~/a.png"]}, "is outside the folder"),
    "link": ({"prompt": EDIT, "input_images": ["link/secret.png"]}, "is outside the folder"),
    "loop": ({"prompt": EDIT, "input_images": ["loop"]}, "loop"),
    "own output": ({"prompt": EDIT, "input_images": ["out/7.png"]}, "might replace it"),
    "link to output": ({"prompt": EDIT, "input_images": ["linked.png"]}, "might replace it"),
    "many": ({"prompt": EDIT, "input_images": ["cat.png"] * 2000}, "names at most 1024"),
    "crafted": ({"prompt": EDIT, "input_images": ["bomb.png"]}, "input_images[0]"),
    "not an image": ({"prompt": EDIT, "input_images": ["in.jsonl"]}, "input_images[0]"),
    "latents": ({"prompt": "a", "latents": "cat.png"}, "not a readable safetensors file"),
    "latents outside": ({"prompt": "a", "latents": "../x"}, "latents: ../x is outside"),
    "shape": ({"prompt": "a", "latents": "noise.safetensors"}, "latents must have shape"),
}
BAD_IDS = [
    ("", "1 to 120 bytes"),
    ("a/b", "can't name a file"),
    ("..", "may not begin with a dot"),
    (".hidden", "may not begin with a dot"),
    ("a\\b", "can't name a file"),
    ("a\0b", "can't name a file"),
    ("a\nb", "can't name a file"),
    ("x" * 300, "1 to 120 bytes in UTF-8, since it names a file, got 300"),
    ("猫" * 41, "got 123"),
    ("NUL", "device on Windows"),
    ("com1.x", "device on Windows"),
    ("LPT¹", "device on Windows"),
    ("a:b", "can't name a file"),
    ("a*", "can't name a file"),
    ("-rf", "may not begin"),
    ("~", "may not begin"),
    ("a ", "nor end"),
    ("a.", "nor end"),
    ("\ud800", "not a character"),
    ("\u202egnp.a", "can't name a file"),
    (1.5, "id must be a string or an integer, got 1.5"),
    (True, "id must be a string or an integer, got a boolean"),
    (["x"], "id must be a string or an integer, got a list"),
    (10**4000, "got 4001"),
]


class TestBadLines:
    def test_stop_nobody_else(self, folder, calls):
        """All of them in one file, each between two good ones."""
        os.mkfifo("pipe")
        (folder.parent / "secret.png").write_bytes(CAT.read_bytes())
        os.symlink("..", "link")
        os.symlink("loop", "loop")
        os.symlink("out/7.png", "linked.png")
        Path("cat.png").write_bytes(CAT.read_bytes())
        Path("bomb.png").write_bytes(CAT.read_bytes()[:100])
        save_file({"x": torch.ones(1, 4, 9, 9)}, "noise.safetensors")
        good = {"prompt": "A cat.", "seed": 1}
        write(good, *(part for line, _ in BAD.values() for part in (line, good)))
        assert made(code=1) == f"{len(BAD) + 1} done, {len(BAD)} failed: out/results.jsonl"
        found = {entry["line"]: entry for entry in entries()}
        for i, (name, (_, message)) in enumerate(BAD.items()):
            entry = found.pop(2 * i + 2)
            assert entry["status"] == "failed", name
            assert message in entry["error"], name
            assert entry["error"].isprintable() and len(entry["error"]) <= MAX_MESSAGE, name
        assert {entry["status"] for entry in found.values()} == {"done"}
        before, count = Path("out/results.jsonl").read_bytes(), len(calls)
        made(code=1)  # a second run finds nothing new
        assert Path("out/results.jsonl").read_bytes() == before
        assert len(calls) == count

    @pytest.mark.parametrize(("name", "message"), BAD_IDS, ids=lambda one: ascii(one)[:20])
    def test_ids_that_name_no_file(self, name, message):
        (line,) = lines(json.dumps({"id": name, "prompt": "a"}).encode())
        assert isinstance(line, BadLine) and line.id is None
        assert message in line.error
        assert line.error.isprintable() and len(line.error) <= MAX_MESSAGE

    @pytest.mark.parametrize("name", ["a", "A cat, 1", "größer 猫", "x" * 120, "a-b_c.d", 0, 12])
    def test_ids_that_do(self, name):
        (line,) = lines(json.dumps({"id": name, "prompt": "a"}).encode())
        assert isinstance(line, Job) and line.id == str(name)

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ({"id": "a"}, {"id": "a"}),
            ({"id": "a"}, {"id": "A"}),
            ({"id": "straße"}, {"id": "STRASSE"}),
            ({"id": "\u00e9"}, {"id": "e\u0301"}),
            ({"id": "2"}, {}),
            ({"id": 2}, {}),
            ({"id": "a", "num_images_per_prompt": 3}, {"id": "a-3"}),
            ({"id": "a-3"}, {"id": "a", "num_images_per_prompt": 3}),
        ],
        ids=str,
    )
    def test_ids_of_the_same_file(self, first, second):
        one, other = lines(
            *(json.dumps(line | {"prompt": "a"}).encode() for line in (first, second))
        )
        assert isinstance(one, Job)
        assert isinstance(other, BadLine)
        assert "names the files of an earlier line" in other.error

    def test_pictures_that_an_option_asks_for_are_counted(self):
        write({"id": "a", "prompt": "A cat."}, {"id": "a-2", "prompt": "A dog."})
        assert made("--num-images-per-prompt", "2", code=1).startswith("1 done, 1 failed")
        assert pictures() == ["a-1.png", "a-2.png"]

    @pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no file that can't be read")
    def test_files_that_can_not_be_read(self):
        odd = "/proc/self/mem"
        write({"prompt": "a", "latents": odd}, {"prompt": EDIT, "input_images": [odd]}, *prompts(1))
        assert made("--any-path", code=1) == "1 done, 2 failed: out/results.jsonl"
        assert [entry["line"] for entry in entries() if entry["error"]] == [1, 2]

    def test_numbers_of_pictures_that_do_not_meet(self):
        found = lines(
            b'{"id": "a", "num_images_per_prompt": 3, "prompt": "a"}',
            b'{"id": "a-4", "prompt": "a"}',
            b'{"id": "a-03", "prompt": "a"}',
            b'{"id": "b", "prompt": "a"}',
            b'{"id": "b-1", "prompt": "a"}',
        )
        assert all(isinstance(line, Job) for line in found)

    def test_a_line_with_an_error_keeps_its_id(self):
        found = lines(b'{"id": "a", "prompt": 1}', b'{"id": "b", "foo": 1}')
        assert [line.id for line in found] == ["a", "b"]

    def test_a_second_line_of_an_id_leaves_the_first_alone(self, calls):
        write(*({"id": "a", "prompt": prompt, "seed": 1} for prompt in ("A cat.", "A dog.")))
        assert made(code=1) == "1 done, 1 failed: out/results.jsonl"
        assert made(code=1) == "1 done (1 of them before), 1 failed: out/results.jsonl"
        assert calls == [["A cat."]]

    def test_a_huge_line_takes_little_memory(self):
        huge = b'{"prompt": "' + b"x" * (64 << 20) + b'"}\n'
        tracemalloc.start()
        bad, good = lines(huge, b'{"prompt": "a"}')
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert isinstance(bad, BadLine) and isinstance(good, Job)
        assert peak < len(huge) * 2 + (16 << 20)  # the test's own copies, and little more

    def test_blank_lines_are_counted_and_passed_over(self):
        (line,) = lines(b"", b"  \r", b'{"prompt": "a"}', b"")
        assert line.number == 3

    def test_a_file_of_too_many_lines_ends_in_a_bad_one(self, monkeypatch):
        monkeypatch.setattr("omnigen_fast.batch.lines.MAX_LINES", 2)
        found = lines(*[b'{"prompt": "a"}'] * 5)
        assert [type(line) for line in found] == [Job, Job, BadLine]
        assert "at most 2 lines" in found[-1].error


def lines(*texts: bytes) -> list[Job | BadLine]:
    source = Source(Path(), Path("out"), Record("m", (), (), None, {}), defaults())
    return list(source.lines(BytesIO(b"\n".join(texts))))


class TestPaths:
    def test_outside_files_are_read_on_request(self, calls, folder, monkeypatch):
        monkeypatch.setenv("HOME", str(folder / "home"))
        for path in ("home/a.png", "a.png", "in/b.png"):
            Path(path).parent.mkdir(exist_ok=True)
            Path(path).write_bytes(CAT.read_bytes())
        images = ("~/a.png", str(folder / "a.png"), "../a.png", "b.png", "../in/b.png")
        write(*({"prompt": EDIT, "input_images": [one]} for one in images), name="in/in.jsonl")
        assert run(name="in/in.jsonl").exit_code == 1
        status = {entry["line"]: entry["status"] for entry in entries()}
        assert status == {1: "failed", 2: "failed", 3: "failed", 4: "done", 5: "done"}
        assert run("--any-path", name="in/in.jsonl").exit_code == 0

    def test_home_on_the_command_line(self, folder, monkeypatch):
        """Also where no shell replaces it."""
        monkeypatch.setenv("HOME", str(folder / "home"))
        Path("home").mkdir()
        os.symlink(TINY, "home/model")
        Path("home/cat.png").write_bytes(CAT.read_bytes())
        save_file({"x": torch.ones(2, 4, 4, 6)}, "home/noise.safetensors")
        generate = ["generate", *SMALL, "--model=~/model", "--prompt", "A cat.", "--prompt", EDIT]
        generate += ["--image=2:~/cat.png", "--latents=~/noise.safetensors", "--out=~/a.png"]
        result = CliRunner().invoke(main, generate)
        assert result.exit_code == 0, result.output
        assert result.output == f"{folder}/home/a-1.png\n{folder}/home/a-2.png\n"
        assert CliRunner().invoke(main, ["show", "~/a-1.png"]).exit_code == 0
        again = ["generate", *SMALL, "--model=~/model", "--from=~/a-1.png", "--recorded-images"]
        again += ["--latents=~/noise.safetensors", "--out=~/b.png"]
        assert CliRunner().invoke(main, again).exit_code == 0
        write({"prompt": EDIT}, name="home/in.jsonl")
        result = run("--model=~/model", "--image=~/cat.png", name="~/in.jsonl", out="~/out")
        assert result.exit_code == 0, result.output
        assert pictures("home/out") == ["1.png"]

    def test_every_path_of_every_command_is_expanded(self):
        for command in main.commands.values():
            for option in command.params:
                if isinstance(option.type, click.Path):
                    assert isinstance(option.type, UserPath), (command.name, option.name)
                words = f"{getattr(option, 'help', '')}".lower()
                if option.type is click.STRING and not option.name.endswith("lora"):
                    assert not words.startswith(("file", "folder")), (command.name, option.name)

    @pytest.mark.parametrize(
        ("name", "out", "code", "message"),
        [
            ("none.jsonl", "out", 2, "none.jsonl does not exist"),
            (".", "out", 2, "is not a regular file"),
            ("pipe", "out", 2, "pipe is not a regular file"),
            ("in.jsonl", "in.jsonl", 1, "a file of that name exists"),
            ("in.jsonl", "odd", 1, "results.jsonl can't be opened"),
            ("in.jsonl", "piped", 1, "is not a regular file"),
            ("out/results.jsonl", "out", 2, "is where the results go"),
        ],
    )
    def test_files_that_can_not_be_used(self, name, out, code, message):
        write(*prompts(1))
        os.mkfifo("pipe")
        for path in ("odd/results.jsonl", "piped", "out"):
            Path(path).mkdir(parents=True)
        os.mkfifo("piped/results.jsonl")
        Path("out/results.jsonl").touch()
        result = run(name=name, out=out)
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.exit_code == code
        (line,) = result.output.splitlines()
        assert line.startswith("Error: ") and message in line

    def test_prompts_for_all_lines_are_one(self):
        write({})
        result = run("--prompt", "a", "--prompt", "b")
        assert result.exit_code == 2
        assert "--prompt is for all lines; give it once" in result.output

    def test_progress_is_shown_unless_quiet(self, calls):
        write(*prompts(3))
        options = [option for option in SMALL if option != "--quiet"]
        result = CliRunner().invoke(main, ["batch", "in.jsonl", "out", *options])
        assert result.stdout == "3 done: out/results.jsonl\n"
        assert "3/3" in result.stderr
        assert run(name="in.jsonl").stderr == ""

    def test_an_empty_file(self):
        write()
        assert made() == "0 done: out/results.jsonl"


class TestWriting:
    @pytest.mark.parametrize("what", ["PIL.Image.Image.save", "os.write", "os.fsync"])
    def test_a_full_disk_ends_the_run_in_one_line(self, monkeypatch, calls, what):
        write(*prompts(2))
        with monkeypatch.context() as patch:

            def full(*arguments, **named):
                raise OSError(errno.ENOSPC, "No space left on device")

            patch.setattr(what, full)
            line = made(code=1)
        assert line.startswith("Error: out/") and "No space left on device" in line
        assert entries() == []
        assert all(name.endswith(".png") and name[0] != "." for name in pictures())
        assert made() == "2 done: out/results.jsonl"

    def test_an_entry_that_is_half_written_is_taken_back(self, monkeypatch):
        write = os.write

        def short(file, data):
            if len(data) < 50:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(file, data[:-40])

        Path("out").mkdir()
        with Results(Path("out")) as results:
            results.append(Entry(1, None, "failed", "x"))
            with monkeypatch.context() as patch:
                patch.setattr("os.write", short)
                with pytest.raises(OSError, match=r"results\.jsonl can't be written: No space"):
                    results.append(Entry(2, None, "failed", "x"))
            results.append(Entry(3, None, "failed", "x"))
        assert [entry["line"] for entry in entries()] == [1, 3]

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full device")
    @pytest.mark.parametrize(
        ("place", "message"),
        [
            (">/dev/full", "standard output can't be written: No space left on device"),
            (">&-", "standard output is closed; redirect it"),
        ],
    )
    def test_standard_output_that_takes_nothing(self, place, message):
        write()
        done = subprocess.run(
            f"{sys.executable} -m omnigen_fast.cli batch --quiet in.jsonl out {place}",
            shell=True,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert line.startswith("Error: ") and message in line
