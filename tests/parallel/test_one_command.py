"""`generate --gpus` and torchrun: one picture, one set of messages, and one end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from omnigen_fast.cli.main import main
from omnigen_fast.page.record import read_record

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")

PICTURE = ["generate", "--model", "shapes", "--prompt", "a red circle", "--device", "cpu"]
PICTURE += ["--dtype", "float32", "--height", "64", "--width", "64"]
IN_TIME = 20.0  # seconds
START = 120.0  # until a command has begun, on a busy machine


def command(folder: Path, *more: str, program: tuple[str, ...] = ("-m", "omnigen_fast")):
    """A process with its output in files."""
    env = {**os.environ, "TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    (folder / "tmp").mkdir(exist_ok=True)
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, *program, *PICTURE, *more], stdout=out, stderr=err, env=env
        )


def shown(folder: Path, name: str = "err") -> list[str]:
    """Lines of a process's output; a progress bar is one for each time that it is drawn."""
    return (folder / name).read_text().replace("\r", "\n").split("\n")


def alone(path: Path, *more: str) -> bytes:
    """The file that one process makes."""
    result = CliRunner().invoke(main, [*PICTURE, "--out", str(path), *more])
    assert result.exit_code == 0, result.output
    return path.read_bytes()


def ranks_of(parent: int) -> dict[int, int]:
    """The process of each rank that a process has started."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            started_by = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            if started_by == parent:
                named = dict(
                    one.split("=", 1) for one in (place / "environ").read_text().split("\0") if one
                )
                found[int(named["RANK"])] = int(place.name)
        except (OSError, KeyError, ValueError):
            continue
    return found


@pytest.fixture
def under_way(tmp_path):
    """A command of two ranks in the middle of its steps: the process, and those of the ranks."""
    out = str(tmp_path / "a.png")
    process = command(tmp_path, "--gpus", "2", "--steps", "1000", "--seed", "1", "--out", out)
    end = time.monotonic() + START
    while not any("/1000 [" in line and " 0/1000" not in line for line in shown(tmp_path)):
        assert time.monotonic() < end and process.poll() is None, shown(tmp_path)
        time.sleep(0.1)
    ranks = ranks_of(process.pid)
    assert set(ranks) == {0, 1}
    yield process, ranks, tmp_path
    for one in (process.pid, *ranks.values()):
        if Path(f"/proc/{one}").exists():
            os.kill(one, signal.SIGKILL)


def check_end(process, ranks, folder: Path, status: int, *last: str) -> None:
    """In time, all gone, one sentence, nothing left behind."""
    start = time.monotonic()
    assert process.wait(IN_TIME) == status, shown(folder)
    while any(Path(f"/proc/{one}").exists() for one in ranks.values()):
        assert time.monotonic() - start < IN_TIME
        time.sleep(0.1)
    said = [line for line in shown(folder) if line.strip() and "/1000 [" not in line]
    assert said == list(last)
    assert (folder / "out").read_text() == ""
    assert sorted(one.name for one in folder.iterdir()) == ["err", "out", "tmp"]
    assert not list((folder / "tmp").glob("omnigen*"))


@pytest.mark.slow
def test_a_rank_that_is_killed(under_way):
    process, ranks, folder = under_way
    os.kill(ranks[1], signal.SIGKILL)
    last = "rank 1 was ended by SIGKILL, as the system does where memory runs out"
    check_end(process, ranks, folder, 1, f"Error: {last}")


@pytest.mark.slow
def test_an_interrupt_of_rank_0(under_way):
    process, ranks, folder = under_way
    os.kill(ranks[0], signal.SIGINT)
    check_end(process, ranks, folder, 1, "Error: rank 0: interrupted by Ctrl-C")


@pytest.mark.slow
def test_an_interrupt_of_the_command(under_way):
    process, ranks, folder = under_way
    process.send_signal(signal.SIGINT)
    check_end(process, ranks, folder, 1, "Aborted!")


@pytest.mark.slow
def test_a_command_that_is_killed_leaves_no_rank(under_way):
    process, ranks, _ = under_way
    process.kill()
    process.wait()
    start = time.monotonic()
    while any(Path(f"/proc/{one}").exists() for one in ranks.values()):
        assert time.monotonic() - start < IN_TIME
        time.sleep(0.1)


@pytest.mark.slow
def test_two_ranks_make_the_picture_of_one_and_say_as_much(tmp_path):
    """After all these failures too: nothing of them is left."""
    out = tmp_path / "two.png"
    more = ["--steps", "3", "--seed", "1"]
    process = command(tmp_path, "--gpus", "2", *more, "--out", str(out))
    assert process.wait(START) == 0, shown(tmp_path)
    assert out.read_bytes() == alone(tmp_path / "one.png", *more)
    assert shown(tmp_path, "out") == [str(out), ""]
    assert sum("0/3 [" in line for line in shown(tmp_path)) == 1  # one bar
    assert any("3/3 [" in line for line in shown(tmp_path))  # to its end, which may be drawn twice
    assert not [line for line in shown(tmp_path) if line.strip() and "/3 [" not in line]


@pytest.mark.slow
def test_torchrun(tmp_path):
    """Without a seed, all ranks take the one that the picture records."""
    out = tmp_path / "two.png"
    program = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = command(
        tmp_path, "--steps", "2", "--out", str(out), program=(*program, "-m", "omnigen_fast")
    )
    assert process.wait(START) == 0, shown(tmp_path)
    seed = str(read_record(str(out)).arguments["seed"])
    assert out.read_bytes() == alone(tmp_path / "one.png", "--steps", "2", "--seed", seed)
    assert shown(tmp_path, "out") == [str(out), ""]


@pytest.mark.slow
def test_what_a_call_refuses(tmp_path):
    out = str(tmp_path / "a.png")
    process = command(tmp_path, "--gpus", "2", "--height", "1000", "--out", out)
    assert process.wait(START) == 2, shown(tmp_path)
    last = "Error: height must be a multiple of 16, got 1000; the nearest are 992 and 1008"
    assert [line for line in shown(tmp_path) if line.strip()] == [last]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpus", "2", "--device", "cuda:1"], "take the GPUs in their order; leave it out"),
        (["--gpus", "2", "--device", "mps"], "--device 'mps' can't be used with several ranks"),
        (["--gpus", "99"], "99 is not in the range 1<=x<=64"),
    ],
)
def test_what_the_command_refuses_before_it_starts_any(options, says, tmp_path):
    result = CliRunner().invoke(main, [*PICTURE, "--out", str(tmp_path / "a.png"), *options])
    assert result.exit_code == 2 and says in result.output


def test_more_gpus_than_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    options = ["--gpus", "2", "--device", "cuda", "--out", str(tmp_path / "a.png")]
    result = CliRunner().invoke(main, [*PICTURE, *options])
    assert result.exit_code == 2
    assert "--gpus 2 needs as many GPUs, and this machine has 1; " in result.output


def test_another_number_than_torchruns(tmp_path, monkeypatch):
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (ranks | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    options = ["--gpus", "3", "--out", str(tmp_path / "a.png")]
    result = CliRunner().invoke(main, [*PICTURE, *options])
    assert result.exit_code == 2
    assert "--gpus 3 among 2 ranks; leave it out" in result.output
