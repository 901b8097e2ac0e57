"""A batch goes on wherever it stopped, and does nothing twice."""

from __future__ import annotations

import errno
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from batch_cases import (
    CAT,
    EDIT,
    SMALL,
    entries,
    made,
    pictures,
    prompts,
    write,
)
from PIL import Image

from omnigen_fast import OmniGenPipeline
from omnigen_fast.batch.results import Entry, Results
from omnigen_fast.errors import OmniGenError

pytestmark = [pytest.mark.early, pytest.mark.usefixtures("folder")]


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
    @pytest.mark.slow
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

    @pytest.mark.slow_except("entry-half")
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
