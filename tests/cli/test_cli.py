"""The command line makes what the pipeline makes, and fails in one line, before the work."""

from __future__ import annotations

import errno
import inspect
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from golden_cases import GOLDEN, TINY
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from omnigen_fast import OmniGenPipeline, __version__
from omnigen_fast.cli.main import main

CAT, COFFEE = (str(GOLDEN / "images" / name) for name in ("cat.png", "coffee.png"))
ONE = "<img><|image_1|></img> Remove the cup."
TWO = "The cup <img><|image_1|></img> beside the cat <img><|image_2|></img>"
MODEL = ["--model", str(TINY), "--device", "cpu", "--dtype", "float32"]
SMALL = [*MODEL, "--height", "32", "--width", "48", "--steps", "1", "--seed", "3"]
SMALL += ["--max-input-image-size", "32", "--quiet"]
CALL = {
    "height": 32,
    "width": 48,
    "num_inference_steps": 1,
    "seed": 3,
    "max_input_image_size": 32,
    "progress": False,
}

# Arguments of a call that have no option, and why.
WITHOUT_OPTION = {
    "self",
    "generator",  # an object of Python's; --seed serves
    "callback_on_step_end",  # a function
    "callback_on_step_end_tensor_inputs",
    "return_dict",  # the form of what is returned
    "progress",  # --quiet
}
EVERY_OPTION = """
--model owner/name --vae-path vae --revision v1 --cache-dir cache
--local-files-only --device cuda:1 --dtype float32
--weights int8 --compute int8 --cache fp8 --vae-dtype bfloat16 --compile
--lora one --lora two:0.5
--prompt x --image a --image b --negative-prompt y --height 64 --width 80
--num-inference-steps 7 --guidance-scale 2.5 --no-img-guidance
--img-guidance-scale 1.5 --max-input-image-size 512
--use-input-image-size-as-output --joint-cfg-infer --no-kv-cache
--keep-kv-cache --offload-model --num-images-per-prompt 2 --seed 9
--latents noise.safetensors --output-type pil --out a.png --quiet --memory 8GiB
--solver ab2 --time-shift 2 --timesteps 0,0.25 --reuse 0.001 --quality fast
--mask-image m.png --mask-blur 3 --strength 0.5
--guidance-interval 0 0.5 --image-guidance-interval 0.25 1
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(main, ["generate", *arguments])


def generate(*arguments: str) -> list[str]:
    """Runs the command, which must succeed; returns the files that it names."""
    result = run(*SMALL, *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def failed(result, code: int, *parts: str) -> None:
    """The command failed with one line of its own."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == code
    (line,) = result.output.splitlines()
    assert line.startswith("Error: ")
    for part in parts:
        assert part in line


def files() -> list[str]:
    return sorted(os.listdir())


def pixels(path: str) -> np.ndarray:
    return np.array(Image.open(path))


def test_a_request_too_long_for_the_file_is_refused_before_anything_is_drawn(monkeypatch):
    monkeypatch.setattr("omnigen_fast.pipeline.OmniGenPipeline.from_pretrained", None)
    prompts = [part for _ in range(300) for part in ("--prompt", "é" * 600)]
    failed(run(*SMALL, *prompts, "--out", "a.png"), 2, "at most 1,048,576 bytes of request")
    assert files() == []


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="no file that can't be read")
@pytest.mark.parametrize("out", ["a.png", "a.jpg"])
def test_an_image_that_cannot_be_read_is_named(out):
    result = run(*SMALL, "--prompt", ONE, "--image", "/proc/self/mem", "--out", out)
    failed(result, 2, "input_images[0] (/proc/self/mem) can't be read")


class TestGenerate:
    def test_text(self, pipe):
        assert generate("--prompt", "A cat.", "--out", "cat.png") == ["cat.png"]
        assert files() == ["cat.png"]
        (expected,) = pipe("A cat.", **CALL)
        assert expected.size == (48, 32)
        np.testing.assert_array_equal(pixels("cat.png"), np.array(expected))

    def test_images(self, pipe):
        generate("--prompt", TWO, "--image", COFFEE, "--image", CAT, "--out", "two.png")
        (expected,) = pipe(TWO, [COFFEE, CAT], **CALL)
        np.testing.assert_array_equal(pixels("two.png"), np.array(expected))
        (other,) = pipe(TWO, [CAT, COFFEE], **CALL)
        assert not np.array_equal(np.array(expected), np.array(other))

    def test_size_of_the_input_image(self):
        generate(
            "--prompt", ONE, "--image", CAT, "--use-input-image-size-as-output", "--out", "a.png"
        )
        with Image.open(CAT) as image:
            wide = image.width > image.height
        width, height = Image.open("a.png").size
        assert max(width, height) == 32
        assert (width > height) == wide

    def test_several_images_of_a_prompt(self, pipe):
        names = generate("--prompt", "A cat.", "--num-images-per-prompt", "3", "--out", "c.a.png")
        assert names == ["c.a-1.png", "c.a-2.png", "c.a-3.png"] == files()
        for name, expected in zip(names, pipe("A cat.", num_images_per_prompt=3, **CALL)):
            np.testing.assert_array_equal(pixels(name), np.array(expected))

    def test_batch(self, pipe):
        prompts = ["A cat.", ONE]
        arguments = [part for prompt in prompts for part in ("--prompt", prompt)]
        negatives = ["--negative-prompt", "ugly", "--negative-prompt", "blurry"]
        names = generate(*arguments, "--image", f"2:{CAT}", *negatives, "--out", "batch.png")
        assert names == ["batch-1.png", "batch-2.png"]
        images = pipe(prompts, [[], [CAT]], negative_prompt=["ugly", "blurry"], **CALL)
        for name, expected in zip(names, images):
            np.testing.assert_array_equal(pixels(name), np.array(expected))

    def test_lora(self, load_pipe):
        lora = str(GOLDEN / "lora")
        other = load_pipe(device="cpu")
        plain = np.array(other("A cat.", **CALL)[0])
        generate("--prompt", "A cat.", "--lora", lora, "--out", "whole.png")
        generate("--prompt", "A cat.", "--lora", f"{lora}:-0.5", "--out", "half.png")
        other.load_lora_weights(lora, weight=-0.5)
        np.testing.assert_array_equal(pixels("half.png"), np.array(other("A cat.", **CALL)[0]))
        other.unload_lora_weights()
        other.load_lora_weights(lora)
        np.testing.assert_array_equal(pixels("whole.png"), np.array(other("A cat.", **CALL)[0]))
        assert not np.array_equal(pixels("whole.png"), plain)
        assert not np.array_equal(pixels("whole.png"), pixels("half.png"))

    def test_lora_file(self):
        folder = GOLDEN / "lora"
        for name, lora in (
            ("folder.png", f"{folder}:0.5"),
            ("file.png", f"{folder / 'adapter_model.safetensors'}:0.5"),
        ):
            generate("--prompt", "A cat.", "--lora", lora, "--out", name)
        np.testing.assert_array_equal(pixels("folder.png"), pixels("file.png"))

    def test_a_lora_of_the_hub_is_fetched_as_the_model_is(self, monkeypatch, tmp_path):
        asked = []

        def snapshot_download(name, **arguments):
            asked.append((name, arguments["cache_dir"], arguments["local_files_only"]))
            return str(GOLDEN / "lora")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        hub = ["--cache-dir", str(tmp_path), "--local-files-only"]
        generate("--prompt", "A cat.", "--lora", "owner/name:0.5", *hub, "--out", "hub.png")
        assert asked == [("owner/name", str(tmp_path), True)]

    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tiff", ".PNG"])
    def test_image_files(self, suffix):
        name = f"cat{suffix}"
        assert generate("--prompt", "A cat.", "--out", name) == [name]
        with Image.open(name) as image:
            image.load()
            assert image.size == (48, 32)

    def test_arrays_and_tensors(self, pipe):
        for kind, suffix in (("np", ".npy"), ("pt", ".safetensors"), ("latent", ".safetensors")):
            generate("--prompt", "A cat.", "--output-type", kind, "--out", kind + suffix)
        np.testing.assert_array_equal(np.load("np.npy"), pipe("A cat.", **CALL, output_type="np"))
        for name, kind in (("images", "pt"), ("latents", "latent")):
            ((found, tensor),) = load_file(f"{kind}.safetensors").items()
            assert found == name
            assert torch.equal(tensor, pipe("A cat.", **CALL, output_type=kind))

    def test_latents_round_trip(self, pipe):
        latents = ["--output-type", "latent"]
        generate("--prompt", "A cat.", *latents, "--out", "one.safetensors")
        again = ["--latents", "one.safetensors", "--out", "two.safetensors"]
        generate("--prompt", "A dog.", *latents, *again)
        start = pipe("A cat.", **CALL, output_type="latent")
        expected = pipe("A dog.", **CALL, output_type="latent", latents=start)
        assert torch.equal(load_file("two.safetensors")["latents"], expected)

    def test_seeds_repeat_byte_for_byte(self):
        for name, seed in (("a.png", "5"), ("b.png", "5"), ("c.png", "6")):
            place = SMALL.index("--seed") + 1
            options = [*SMALL[:place], seed, *SMALL[place + 1 :], "--prompt", "A cat."]
            assert run(*options, "--out", name).exit_code == 0
        assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
        assert Path("a.png").read_bytes() != Path("c.png").read_bytes()

    def test_a_file_that_is_there_is_replaced(self):
        Path("cat.png").write_text("old")
        generate("--prompt", "A cat.", "--out", "cat.png")
        assert pixels("cat.png").shape == (32, 48, 3)
        assert files() == ["cat.png"]

    def test_permissions_are_those_of_any_new_file(self):
        generate("--prompt", "A cat.", "--out", "cat.png")
        Path("other").touch()
        assert stat.S_IMODE(os.stat("cat.png").st_mode) == stat.S_IMODE(os.stat("other").st_mode)

    def test_a_process_of_its_own(self, folder, pipe):
        command = [sys.executable, "-m", "omnigen_fast.cli", "generate", *SMALL]
        command += ["--prompt", "A cat.", "--out", "cat.png"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, "cat.png\n"), done.stderr
        assert "Traceback" not in done.stderr
        np.testing.assert_array_equal(pixels("cat.png"), np.array(pipe("A cat.", **CALL)[0]))


def test_progress_is_shown_unless_quiet(monkeypatch):
    shown = []

    class Pipe:
        def __call__(self, *, progress, **_):
            shown.append(progress)
            return [Image.new("RGB", (16, 16))]

    monkeypatch.setattr(OmniGenPipeline, "from_pretrained", lambda *_, **__: Pipe())
    for arguments in ([], ["--quiet"]):
        assert run("--prompt", "A cat.", "--out", "a.png", *arguments).exit_code == 0
    assert shown == [True, False]


class TestArguments:
    def test_every_argument_of_a_call_has_an_option(self):
        arguments = set(inspect.signature(OmniGenPipeline.__call__).parameters)
        options = {option.name for option in main.commands["generate"].params}
        assert arguments - options == WITHOUT_OPTION

    def test_defaults_are_those_of_a_call(self, monkeypatch):
        seen = {}

        class Pipe:
            def __call__(self, **arguments):
                seen.update(arguments)
                return [Image.new("RGB", (16, 16))]

        monkeypatch.setattr(OmniGenPipeline, "from_pretrained", lambda *_, **__: Pipe())
        assert run("--prompt", "x", "--out", "a.png").exit_code == 0
        assert seen.pop("prompt") == "x"
        assert 0 <= seen.pop("seed") < 1 << 32  # drawn and recorded: it can be made again
        assert len(seen) > 15
        parameters = inspect.signature(OmniGenPipeline.__call__).parameters
        for name, value in seen.items():
            assert value == parameters[name].default, name

    def test_every_option_reaches_the_pipeline(self, monkeypatch):
        seen = {}

        class Pipe:
            def load_lora_weights(self, path, weight):
                seen.setdefault("loras", []).append((path, weight))

            def __call__(self, **arguments):
                seen["call"] = arguments
                return [Image.new("RGB", (16, 16))]

        def from_pretrained(*arguments, **named):
            seen["load"] = (arguments, named)
            return Pipe()

        monkeypatch.setattr(OmniGenPipeline, "from_pretrained", from_pretrained)
        save_file({"latents": torch.ones(1, 4, 2, 2)}, "noise.safetensors")
        result = run(*EVERY_OPTION.split())
        assert result.exit_code == 0, result.output
        assert seen["load"] == (
            ("owner/name", "vae"),
            {
                "device": "cuda:1",
                "dtype": "float32",
                "weights": "int8",
                "compute": "int8",
                "cache": "fp8",
                "vae_dtype": "bfloat16",
                "attention": "auto",
                "compile": True,
                "revision": "v1",
                "cache_dir": "cache",
                "local_files_only": True,
                "memory": "8GiB",
            },
        )
        assert seen["loras"] == [("one", 1.0), ("two", 0.5)]
        assert torch.equal(seen["call"].pop("latents"), torch.ones(1, 4, 2, 2))
        assert seen["call"] == {
            "prompt": "x",
            "input_images": ["a", "b"],
            "negative_prompt": "y",
            "height": 64,
            "width": 80,
            "num_inference_steps": 7,
            "guidance_scale": 2.5,
            "use_img_guidance": False,
            "img_guidance_scale": 1.5,
            "max_input_image_size": 512,
            "use_input_image_size_as_output": True,
            "separate_cfg_infer": False,
            "use_kv_cache": False,
            "offload_kv_cache": False,
            "offload_model": True,
            "mask_image": "m.png",
            "mask_blur": 3,
            "strength": 0.5,
            "solver": "ab2",
            "time_shift": 2.0,
            "timesteps": [0.0, 0.25],
            "reuse": 0.001,
            "quality": "fast",
            "guidance_interval": (0.0, 0.5),
            "image_guidance_interval": (0.25, 1.0),
            "num_images_per_prompt": 2,
            "seed": 9,
            "output_type": "pil",
            "progress": False,
        }


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "parts"),
        [
            (["--height", "100"], ["height must be a multiple of 16, got 100", "96 and 112"]),
            (["--steps", "0"], ["num_inference_steps must be from 1"]),
            (["--guidance-scale", "nan"], ["guidance_scale must be a finite number"]),
            (["--dtype", "float16"], ["float16 overflows", "use bfloat16 or float32"]),
            (["--device", "cuda:99"], ["device 'cuda:99' can't be used"]),
            (["--device", "toaster"], ["device 'toaster' can't be used"]),
            (["--image", CAT], ["names 0 of them", "add <img><|image_1|></img>"]),
            (["--prompt", ONE], ["names image 1"]),
            (["--negative-prompt", "a", "--negative-prompt", "b"], ["2 negative prompts for 1"]),
            (["--negative-prompt", "\udcff"], ["negative_prompt holds '\\udcff'"]),
            (["--lora", f"{GOLDEN / 'lora'}:nan"], ["weight must be a finite number"]),
        ],
        ids=lambda value: None if not value or isinstance(value, str) else value[0][:24],
    )
    def test_request(self, arguments, parts):
        prompt = [] if "--prompt" in arguments else ["--prompt", "A cat."]
        failed(run(*SMALL, *prompt, *arguments, "--out", "a.png"), 2, *parts)
        assert files() == []

    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            (["--model", "no/such/folder"], "no/such/folder does not exist"),
            (["--model", str(GOLDEN)], "has no model.safetensors"),
            (["--lora", "no-such-folder"], "no-such-folder is not a folder"),
            (["--lora", str(TINY)], "adapter_config.json does not exist"),
        ],
    )
    def test_model(self, arguments, part):
        failed(run(*SMALL, "--prompt", "A cat.", *arguments, "--out", "a.png"), 1, part)
        assert files() == []

    @pytest.mark.parametrize(
        ("arguments", "code", "parts"),
        [
            (["--out", "a.txt"], 2, ["--out must end in .png", "got a.txt"]),
            (["--out", "a"], 2, ["--out must end in"]),
            (["--out", ""], 2, ["--out must end in"]),
            (["--out", "a.png", "--output-type", "np"], 2, ["must end in .npy"]),
            (["--out", "a.npy", "--output-type", "pt"], 2, ["must end in .safetensors"]),
            (["--out", "a.png", "--output-type", "latent"], 2, ["must end in .safetensors"]),
            (["--out", "none/a.png"], 2, ["the folder none does not exist", "make it first"]),
            (["--out", "folder.png"], 2, ["folder.png is a folder", "give a file name in it"]),
            (["--out", "x" * 300 + ".png"], 1, ["File name too long"]),
            (["--out", "a.png", "--lora", "x:heavy"], 2, ["'heavy' is not a weight", ":0.8"]),
            (["--out", "a.png", "--prompt", "b", "--image", CAT], 2, ["with 2 prompts", "1:/"]),
            (["--out", "a.png", "--prompt", "b", "--image", "3:x"], 2, ["with 2 prompts"]),
            (["--out", "a.png", "--prompt", "b", "--image", "0:x"], 2, ["with 2 prompts"]),
            (["--out", "a.png", "--prompt", "b", "--image", "9" * 5000 + ":x"], 2, ["say which"]),
            (["--out", "a.png", "--latents", "cat.png"], 1, ["not a readable safetensors file"]),
            (["--out", "a.png", "--latents", "two.safetensors"], 1, ["has 2 tensors"]),
            (["--out", "a.png", "--latents", "int.safetensors"], 1, ["holds I64"]),
        ],
    )
    def test_nothing_is_loaded_for_it(self, monkeypatch, arguments, code, parts):
        def load(*_, **__):
            raise AssertionError("a model was loaded")

        monkeypatch.setattr(OmniGenPipeline, "from_pretrained", load)
        Path("folder.png").mkdir()
        Path("cat.png").write_bytes(Path(CAT).read_bytes())
        save_file({"a": torch.ones(1), "b": torch.ones(1)}, "two.safetensors")
        save_file({"a": torch.ones(1).long()}, "int.safetensors")
        before = files()
        failed(run(*SMALL, "--prompt", "A cat.", *arguments), code, *parts)
        assert files() == before

    def test_folder_that_is_not_writable(self, monkeypatch):
        monkeypatch.setattr("omnigen_fast.cli.files.os.access", lambda *_: False)  # root may write
        failed(run(*SMALL, "--prompt", "x", "--out", "a.png"), 2, "can't be written to")
        assert files() == []

    def test_wrong_usage(self):
        for arguments in (
            [],
            ["--prompt", "x"],
            ["--prompt", "x", "--out", "a.png", "--height", "tall"],
            ["--prompt", "x", "--out", "a.png", "--output-type", "gif"],
            ["--prompt", "x", "--out", "a.png", "--latents", "none.safetensors"],
            ["--prompt", "x", "--out", "a.png", "--no-such-option"],
        ):
            result = run(*arguments)
            assert result.exit_code == 2
            assert "Error: " in result.output
            assert "Traceback" not in result.output
        assert files() == []

    @pytest.mark.parametrize(
        ("kind", "name", "writer", "error", "reason"),
        [
            (
                "pil",
                "a.png",
                "PIL.Image.Image.save",
                OSError(errno.ENOSPC, "No space left on device"),
                "No space left on device",
            ),
            ("np", "a.npy", "numpy.save", OSError("12 requested and 3 written"), "12 requested"),
            (
                "pt",
                "a.safetensors",
                "safetensors.torch.save_file",
                SafetensorError("Error while serializing: I/O error: No space left on device"),
                "No space left on device",
            ),
            (
                "latent",
                "a.safetensors",
                "omnigen_fast.cli.files.os.replace",
                OSError(errno.EACCES, "Permission denied"),
                "Permission denied",
            ),
            (
                "pil",
                "a.png",
                "tempfile.mkstemp",
                OSError(errno.EROFS, "Read-only file system"),
                "Read-only file system",
            ),
        ],
        ids=["full-disk-image", "full-disk-array", "full-disk-tensor", "no-rename", "read-only"],
    )
    def test_a_failing_write_leaves_no_partial_file(
        self, monkeypatch, kind, name, writer, error, reason
    ):
        def fail(*arguments):
            for argument in arguments:
                if isinstance(argument, str) and os.path.exists(argument):
                    Path(argument).write_bytes(b"half of it")
            raise error

        def fail_any(*arguments, **named):
            fail(*arguments, *named.values())

        Path(name).write_bytes(b"an earlier one")
        monkeypatch.setattr(writer, fail_any)
        result = run(*SMALL, "--prompt", "A cat.", "--output-type", kind, "--out", name)
        failed(result, 1, f"{name} can't be written", reason)
        assert files() == [name]
        assert Path(name).read_bytes() == b"an earlier one"


def test_env():
    result = CliRunner().invoke(main, ["env"])
    assert result.exit_code == 0
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in result.output.splitlines())
    assert lines["omnigen_fast"] == __version__
    assert torch.__version__.startswith(lines["torch"])  # metadata may lack a suffix: +cu130
    assert lines["pillow"] == Image.__version__
    assert lines["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert re.match(r"(cpu|mps|cuda:\d), transformer in bfloat16", lines["will run on"])


def test_env_says_what_is_not_installed(monkeypatch):
    from importlib import metadata

    version = metadata.version

    def without_triton(package):
        if package == "triton":
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(metadata, "version", without_triton)
    assert "triton        not installed" in CliRunner().invoke(main, ["env"]).output


def test_version_and_help():
    assert __version__ in CliRunner().invoke(main, ["--version"]).output
    output = CliRunner().invoke(main, ["generate", "-h"]).output
    for option in main.commands["generate"].params:
        assert option.opts[0] in output
