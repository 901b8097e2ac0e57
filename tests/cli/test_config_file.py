"""The config file: what wins over what, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from golden_cases import TINY
from PIL import Image

from omnigen_fast import OmniGenPipeline
from omnigen_fast.cli import config_file
from omnigen_fast.cli.main import main
from omnigen_fast.page.record import read_record

START = ["generate", "--prompt", "x", "--out", "a.png"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory, and a home without a config file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def seen(monkeypatch) -> dict:
    """Arguments of the pipeline that a command loads, and of its call."""
    found: dict = {}

    class Pipe:
        def load_lora_weights(self, path, weight):
            found.setdefault("loras", []).append((path, weight))

        def __call__(self, **arguments):
            found.update(arguments)
            return [Image.new("RGB", (16, 16))]

    def load(model, *_, **options):
        found.update(options, model=model)
        return Pipe()

    monkeypatch.setattr(OmniGenPipeline, "from_pretrained", load)
    return found


def config(text: str, name: str = "c.toml") -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def run(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def test_options_win_over_the_file_and_the_file_over_defaults(seen):
    path = config(
        """
        model = "owner/name"
        vae-dtype = "bfloat16"
        [generate]
        steps = 30
        guidance_scale = 2
        lora = ["one:0.5", "two"]
        use-kv-cache = false
        guidance-interval = [0.25, 1.0]
        timesteps = [0, 0.5]
        reuse = 0.001
        negative-prompt = "dull"
        [plan]
        size = 512
        """
    )
    result = run(*START, "--config", path, "--guidance-scale", "4")
    assert result.exit_code == 0, result.output
    assert seen["model"] == "owner/name" and seen["vae_dtype"] == "bfloat16"
    assert (seen["num_inference_steps"], seen["guidance_scale"]) == (30, 4.0)
    assert seen["loras"] == [("one", 0.5), ("two", 1.0)]
    assert seen["use_kv_cache"] is False and seen["guidance_interval"] == (0.25, 1.0)
    assert (seen["timesteps"], seen["reuse"]) == ([0.0, 0.5], 0.001)
    assert seen["negative_prompt"] == "dull" and seen["height"] == 1024


def test_the_usual_place_is_read_without_being_named(seen, tmp_path):
    config('model = "owner/other"', str(tmp_path / "home/omnigen-fast/config.toml"))
    assert run(*START).exit_code == 0 and seen["model"] == "owner/other"
    named = config('model = "owner/named"')
    assert run(*START, "--config", named).exit_code == 0 and seen["model"] == "owner/named"


def test_the_file_wins_over_the_models_own(seen):
    path = config('model = "shapes"\n[generate]\nsteps = 9\nsize = 64')
    assert run(*START, "--config", path).exit_code == 0
    assert (seen["num_inference_steps"], seen["height"], seen["guidance_scale"]) == (9, 64, 2.5)


def test_a_typed_quality_or_side_wins_over_the_files_parts(seen):
    path = config("[generate]\nsteps = 9\nsize = 512")
    assert run(*START, "--config", path, "--quality", "fast").exit_code == 0
    assert seen["num_inference_steps"] == 14
    assert run(*START, "--config", path, "--height", "64").exit_code == 0
    assert (seen["height"], seen["width"]) == (64, 1024)
    path = config("[generate]\nheight = 64\nwidth = 64")
    assert run(*START, "--config", path, "--size", "128", "--aspect", "3:2").exit_code == 0
    assert (seen["height"], seen["width"]) == (96, 144)


def test_a_request_in_a_picture_wins_over_the_file(folder):
    small = ["--model", str(TINY), "--device", "cpu", "--quiet", "--out"]
    made = [*small, "a.png", "--prompt", "x", "--size", "32", "--steps", "1", "--seed", "3"]
    assert run("generate", *made).exit_code == 0
    path = config("[generate]\nsteps = 3\nsize = 64\nseed = 8")
    result = run("generate", *small, "b.png", "--from", "a.png", "--config", path)
    assert result.exit_code == 0, result.output
    assert read_record("b.png") == read_record("a.png")


def test_other_commands_have_it_too():
    path = config("[plan]\ndevice = 'a800'\nsize = 512")
    result = run("plan", "--config", path)
    assert result.exit_code == 0 and "512 x 512 px" in result.output


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[generate]\nstpes = 3", "[generate] stpes is not known; did you mean steps?"),
        ("[generat]\nsteps = 3", "[generat] is not known; did you mean [generate]?"),
        ("modle = 'x'", "modle is not known; did you mean model?"),
        ("steps = 3", "Options of one command go under its name, as in [generate]"),
        ("[generate]\nsteps = 'x'", "[generate] steps can't be 'x'"),
        ("[generate]\nsteps = true", "steps can't be True: it must be a text, a number or a list"),
        ("[generate]\nquiet = 1", "quiet can't be 1: it must be true or false"),
        ("[generate]\noutput-type = 'gif'", "output-type can't be 'gif'"),
        ("[generate]\nprompt = {a = 1}", "prompt can't be"),
        ("[generate]\nguidance-interval = [1]", "guidance-interval can't be"),
        ("[generate]\nconfig = 'x'", "config is not known"),
        ("model = ", "is not TOML"),
        ("a = " + "[" * 5000, "is not TOML"),
        ("\x00", "is not TOML"),
    ],
)
def test_mistakes_end_in_one_line(text, said, seen):
    result = run(*START, "--config", config(text))
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    (line,) = result.output.splitlines()
    assert line.startswith("Error: c.toml") and said in line
    assert not seen


def test_files_that_are_none(tmp_path):
    for path, said in (("none.toml", "does not exist"), (str(tmp_path), "it is a folder")):
        (line,) = run(*START, "--config", path).output.splitlines()
        assert said in line
    Path("huge.toml").write_text("#" * ((1 << 20) + 1))
    assert "at most" in run(*START, "--config", "huge.toml").output


def test_where_it_is_looked_for(tmp_path, monkeypatch):
    assert config_file.default_path() == tmp_path / "home/omnigen-fast/config.toml"
