"""Commands as processes: signals, and output that is closed or full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from golden_cases import TINY

from omnigen_fast.page.job import save
from omnigen_fast.whole_files import write_whole

COMMAND = [sys.executable, "-m", "omnigen_fast"]
SMALL = ["generate", "--model", str(TINY), "--device", "cpu", "--dtype", "float32", "--seed", "3"]
SMALL += ["--height", "32", "--width", "32", "--prompt", "A cat.", "--steps"]
PRINTING = {
    "plan": ["plan", "--device", "a800"],
    "env": ["env"],
    "help": ["--help"],
    "help of a command": ["generate", "--help"],
    "bench": ["bench", "--help"],
    "version": ["--version"],
}
needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
# A picture whose writing begins and does not end.
SLOW = """
import sys, time
from pathlib import Path
from PIL import Image

def save(self, path, **options):
    Path(path).write_bytes(b"half a picture")
    print("writing", flush=True)
    time.sleep(600)

Image.Image.save = save
from omnigen_fast.cli import main
main(sys.argv[1:])
"""


def run(command, **options):
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


class TestOutput:
    @pytest.mark.slow_for("env", "bench")
    @needs_full
    @pytest.mark.parametrize("arguments", PRINTING.values(), ids=PRINTING)
    def test_full(self, arguments):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert done.returncode == 1
        assert done.stderr == ("Error: standard output can't be written: No space left on device\n")

    @pytest.mark.slow_for("env", "bench")
    @pytest.mark.parametrize("arguments", PRINTING.values(), ids=PRINTING)
    def test_reader_gone(self, arguments):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (1, "")

    @pytest.mark.slow_for("env", "bench")
    @pytest.mark.parametrize("arguments", PRINTING.values(), ids=PRINTING)
    def test_closed(self, arguments):
        done = run(["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, *arguments])
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.slow
    @needs_full
    def test_a_full_error_stream_stops_nothing(self, tmp_path):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*COMMAND, *SMALL, "1", "--out", "a.png"],
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=full,
                text=True,
            )
        assert (done.returncode, done.stdout) == (0, "a.png\n")
        assert os.listdir(tmp_path) == ["a.png"]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
class TestSignals:
    @pytest.mark.slow_except("SIGTERM")
    @pytest.mark.parametrize(
        "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name
    )
    def test_while_a_file_is_written(self, tmp_path, number):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, *SMALL, "1", "--out", "a.png", "--quiet"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "writing\n"
        assert len(os.listdir(tmp_path)) == 1
        process.send_signal(number)
        if number != signal.SIGINT:
            process.send_signal(number)  # `timeout` sends it twice
        _, errors = process.communicate(timeout=20)
        assert os.listdir(tmp_path) == []
        if number == signal.SIGINT:
            assert process.returncode == 1 and errors.strip() == "Aborted!"
        else:
            assert (process.returncode, errors) == (-number, "")

    def test_while_a_picture_is_made(self, tmp_path):
        (tmp_path / "a.png").write_text("an earlier one")
        process = subprocess.Popen(
            [*COMMAND, *SMALL, "1000", "--out", "a.png"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        while "/1000" not in process.stderr.read(1 << 8):
            assert process.poll() is None
        process.terminate()
        start = time.monotonic()
        errors = process.communicate(timeout=60)[1]
        assert time.monotonic() - start < 10
        assert process.returncode == -signal.SIGTERM
        assert "Traceback" not in errors
        assert (tmp_path / "a.png").read_text() == "an earlier one"
        assert os.listdir(tmp_path) == ["a.png"]

    @pytest.mark.slow
    def test_one_that_the_caller_ignores_stays_ignored(self, tmp_path):
        process = subprocess.Popen(
            ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *COMMAND, *SMALL, "3", "--out", "a.png"],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        process.stderr.read(1)  # the progress bar
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=60)
        assert process.returncode == 0
        assert os.listdir(tmp_path) == ["a.png"]


class TestWholeFiles:
    def test_nothing_is_seen_before_it_is_whole(self, tmp_path):
        out, seen = tmp_path / "a.png", []

        def write(path: str) -> None:
            Path(path).write_bytes(b"half")
            seen.append(out.exists())
            Path(path).write_bytes(b"whole")

        write_whole(out, write)
        assert (seen, out.read_bytes()) == ([False], b"whole")
        assert os.listdir(tmp_path) == ["a.png"]

    def test_an_earlier_file_is_kept_if_it_must_be(self, tmp_path):
        out = tmp_path / "a.png"
        out.write_bytes(b"earlier")
        with pytest.raises(FileExistsError):
            write_whole(out, lambda path: Path(path).write_bytes(b"later"), replace=False)
        assert out.read_bytes() == b"earlier"
        assert os.listdir(tmp_path) == ["a.png"]

    def test_without_links(self, tmp_path, monkeypatch):
        def link(*arguments):
            raise PermissionError("no links here")

        monkeypatch.setattr(os, "link", link)
        out = tmp_path / "a.png"
        write_whole(out, lambda path: Path(path).write_bytes(b"one"), replace=False)
        with pytest.raises(FileExistsError):
            write_whole(out, lambda path: Path(path).write_bytes(b"two"), replace=False)
        assert out.read_bytes() == b"one"
        assert os.listdir(tmp_path) == ["a.png"]

    def test_interrupted_before_the_name_is_known(self, tmp_path, monkeypatch):
        import tempfile

        make = tempfile.mkstemp

        def interrupted(**options):
            make(**options)
            raise KeyboardInterrupt

        monkeypatch.setattr(tempfile, "mkstemp", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_whole(tmp_path / "a.png", print)
        assert os.listdir(tmp_path) == []

    def test_the_page_shows_no_half_picture(self, tmp_path):
        from PIL import Image

        seen = []

        class Slow(Image.Image):
            def save(self, path, **options):
                Path(path).write_bytes(b"half")
                seen.append(sorted(name for name in os.listdir(tmp_path) if name[0] != "."))
                raise KeyboardInterrupt

        given = {"seed": 1, "input_images": [], "negative_prompt": None, "prompt": "A cat."}
        sizes = ("height", "width", "num_inference_steps", "max_input_image_size")
        given |= dict.fromkeys(sizes, 16) | {"use_input_image_size_as_output": False}
        given |= {"guidance_scale": 1.0, "img_guidance_scale": 1.0}
        with pytest.raises(KeyboardInterrupt):
            save(Slow(), given, "tiny", "float32", tmp_path)
        assert seen == [[]]
        assert os.listdir(tmp_path) == []
