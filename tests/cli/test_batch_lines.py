"""No line of a batch stops another, and only files that are meant are read."""

from __future__ import annotations

import json
import os
import tracemalloc
from io import BytesIO
from pathlib import Path

import click
import pytest
import torch
from batch_cases import (
    CAT,
    EDIT,
    SMALL,
    defaults,
    entries,
    made,
    pictures,
    prompts,
    run,
    write,
)
from click.testing import CliRunner
from golden_cases import TINY
from safetensors.torch import save_file

from omnigen_fast.batch.lines import MAX_LINE_BYTES, BadLine, Job, Source
from omnigen_fast.cli.files import UserPath
from omnigen_fast.cli.main import main
from omnigen_fast.errors import MAX_MESSAGE
from omnigen_fast.page.record import Record

pytestmark = [pytest.mark.early, pytest.mark.usefixtures("folder")]


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
