"""Options that change how a model is loaded: passed on, recorded, and run again."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from golden_cases import TINY

from omnigen_fast import OmniGenPipeline
from omnigen_fast.cli.main import main
from omnigen_fast.page.record import read_record

SMALL = ("--model", str(TINY), "--height", "32", "--width", "32", "--steps", "1", "--quiet")
CHOSEN = {"weights": "int8", "compute": "int8", "cache": "fp8", "vae_dtype": "bfloat16"}
OPTIONS = ("--weights", "int8", "--compute", "int8", "--cache", "fp8", "--vae-dtype", "bfloat16")


@pytest.fixture
def loaded(monkeypatch) -> list[dict]:
    """What `from_pretrained` was given, call by call."""
    given: list[dict] = []
    load = OmniGenPipeline.from_pretrained.__func__

    def watched(cls, *args, **named):
        given.append({name: named[name] for name in CHOSEN})
        return load(cls, *args, **named)

    monkeypatch.setattr(OmniGenPipeline, "from_pretrained", classmethod(watched))
    return given


def run(*arguments: str) -> str:
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_picture_carries_them(folder, loaded):
    run("generate", "--prompt", "a cat", "--seed", "1", *SMALL, *OPTIONS, "--out", "one.png")
    assert read_record("one.png").precision == CHOSEN
    assert "compute                         int8" in run("show", "one.png")
    again = ("--from", "one.png", "--model", str(TINY), "--quiet", "--out")
    run("generate", *again, "two.png")
    assert loaded == [CHOSEN, CHOSEN]
    assert (folder / "one.png").read_bytes() == (folder / "two.png").read_bytes()
    run("generate", *again, "three.png", "--compute", "bfloat16")
    assert loaded[-1] == {**CHOSEN, "compute": "bfloat16"}


def test_a_plain_picture_carries_none(folder, loaded):
    run("generate", "--prompt", "a cat", "--seed", "1", *SMALL, "--out", "one.png")
    plain = {"weights": None, "compute": None, "cache": None, "vae_dtype": "float32"}
    assert loaded == [plain]
    assert not read_record("one.png").precision


def test_a_batch_made_otherwise_is_made_again(folder, loaded):
    (folder / "lines.jsonl").write_text(json.dumps({"id": "a", "prompt": "a cat", "seed": 1}))
    for options, calls in (((), 1), (OPTIONS, 2), (OPTIONS, 2)):
        run("batch", "lines.jsonl", "out", *SMALL, *options)
        assert len(loaded) == calls
    assert read_record("out/a.png").precision == CHOSEN


def test_plans(folder):
    plain = run("plan", "--device", "a800")
    chosen = run("plan", "--device", "a800", "--compute", "int8", "--vae-dtype", "bfloat16")
    assert "products in int8" in chosen and "products in" not in plain
    kept = run("plan", "--device", "a800", "--cache", "fp8")
    assert "KV cache on device in fp8" in kept and "device in" not in plain
    explained = run("plan", "--device", "a800", "--vae-dtype", "bfloat16", "--explain")
    assert "in bfloat16, on the device" in explained
    refused = CliRunner().invoke(main, ["plan", "--device", "rtx3090", "--compute", "fp8"])
    assert refused.exit_code == 2
    assert "compute=fp8 needs a GPU of compute capability 8.9 or later" in refused.output
