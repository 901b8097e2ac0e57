"""The GPU check itself, on a CPU with tiny sizes: its parts, its result, its ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from limits import measured_limits
from omnigen_fast.kernels import ops

from bench import gpu_check
from bench.gpu import exact, pictures, run
from bench.kernels import workload
from omnigen_fast.graph import StepGraphs

pytestmark = pytest.mark.early

ROOT = Path(__file__).parents[1]


def check(folder: Path, *arguments: str) -> tuple[int, dict]:
    """Exit status and result of a tiny run."""
    given = ["--device", "cpu", "--tiny", "--out", str(folder), *arguments]
    status = gpu_check.main(given)
    (path,) = folder.glob("*.json")
    assert not list(folder.glob("*.partial"))
    return status, json.loads(path.read_text())


@pytest.fixture(scope="module", autouse=True)
def limits_measured_once():
    """In the first run that needs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "measure_limits", measured_limits)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every part but diffusers', as they run without a GPU."""
    parts = ",".join(name for name in gpu_check.PARTS if name != "peer")
    return check(tmp_path_factory.mktemp("whole"), "--parts", parts)


@pytest.fixture
def capture_by(monkeypatch):
    """Captures on the CPU, by a function: `capture_by(capture)`."""

    def use(capture):
        on = classmethod(lambda graphs, _: graphs(capture))
        monkeypatch.setattr(StepGraphs, "on", on)

    return use


@pytest.fixture
def capturing(capture_by):
    """A capture is the work itself, which reads the tensors that it was captured on."""
    capture_by(lambda work: work)


def test_every_part_runs(whole):
    status, result = whole
    assert status == 0 and result["state"] == "complete"
    assert list(result["parts"]) == list(gpu_check.PARTS)
    found = {name: part["status"] for name, part in result["parts"].items()}
    assert found == dict.fromkeys(gpu_check.PARTS, "ok") | {"peer": "not measured"}
    assert result["parts"]["peer"]["why"] == "not selected"


def test_checks_say_how_exact(whole):
    _, result = whole
    rows = result["parts"]["kernels"]["rows"]
    assert {row["kernel"] for row in rows} == set(ops.OPERATIONS)
    assert {row["dtype"] for row in rows} == {"bfloat16", "float32"}
    for row in rows:
        if row["status"] == "not measured":
            assert row["why"] == "needs a GPU" and row["shape"] == "of the real model"
        else:
            assert row["status"] == "ok" and 0 <= row["error"] < 0.02, row
    precision = result["parts"]["model"]["rows"][:3]
    assert [row["check"].split()[0] for row in precision] == ["kernels,", "library", "flash"]
    assert all(0 < row["error"] <= row["bound"] * row["plain_error"] for row in precision)


def test_pictures_have_all_their_numbers(whole):
    _, result = whole
    rows = result["parts"]["pictures"]["rows"]
    assert len(rows) == 6
    for row in rows:
        assert row["status"] == "ok" and row["steps_run"] == row["steps_of_a_picture"] == 5
        assert len(row["condition_tokens"]) == (3 if row["images"] else 2)
        for timing in (row["prefill"], row["eager_step"]):
            assert 0 < timing["lowest"] <= timing["seconds"] <= timing["highest"]
        assert row["picture_seconds"] > row["eager_step"]["lowest"]
        assert row["second_picture"]["prepare_seconds"] < row["picture_seconds"]
        # what a CPU can't have is absent, not made up
        assert row["peaks"] is None and row["share_of_datasheet_peak"] is None
        assert row["captured"] is False and "captured_step" not in row


def test_operations_are_timed_or_say_why_not(whole):
    _, result = whole
    for row in result["parts"]["operations"]["rows"]:
        if row["contender"] in ("kernels", "reference, compiled"):
            assert row["status"] == "not measured" and "seconds" not in row
        else:
            assert row["status"] == "ok" and row["seconds"] > 0 and row["samples"] >= 5, row


def test_the_attention_is_raced(whole):
    """A CPU has no Triton to race, so nobody wins."""
    _, result = whole
    part = result["parts"]["attention"]
    assert part["winners"] == {}
    assert {(row["contender"], row["status"]) for row in part["rows"]} == {
        ("flash", "ok"),
        ("triton", "not measured"),
    }
    assert len(part["rows"]) == 6
    assert all(0 < row["seconds"] <= row["again"] for row in part["rows"] if "seconds" in row)


def test_winners_are_kept_only_if_that_is_asked(tmp_path, monkeypatch):
    def won(run, found):
        found.update(rows=[], winners={96: "flash"})

    kept = []
    monkeypatch.setitem(gpu_check.PARTS, "attention", won)
    monkeypatch.setattr(gpu_check.workload, "keep_winners", lambda *given: kept.append(given))
    check(tmp_path, "--parts", "attention")
    assert not kept
    check(tmp_path, "--parts", "attention", "--keep-winners")
    assert kept == [("cpu", {96: "flash"})]


def test_the_last_line_is_the_headline(tmp_path, capsys):
    check(tmp_path, "--parts", "environment")
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["parts"]["environment"] == "ok" and last["product_flops_per_second"] > 0
    assert last["pictures"] == {}


@pytest.mark.slow
def test_captured_steps_are_checked_and_timed(tmp_path, capturing):
    status, result = check(tmp_path, "--parts", "model,pictures")
    assert status == 0
    rows = [row for row in result["parts"]["model"]["rows"] if "captured" in row["check"]]
    assert len(rows) == 3
    for row in rows:
        assert row["status"] == "ok" and row["equal"] == [True] * 6, row
        assert row["captures_of_second_round"] == 0
    for row in result["parts"]["pictures"]["rows"]:
        assert row["captured"] and row["captured_step"]["samples"] == 3
    steps = result["headline"]["pictures"]
    assert all(one["step_seconds"] > 0 for one in steps.values()) and len(steps) == 6


def test_a_capture_that_changes_the_result_is_found(tmp_path, capture_by):
    def late(work):
        def replay():
            work()
            work.func.__self__.values.latents.mul_(1.001)

        return replay

    capture_by(late)
    status, result = check(tmp_path, "--parts", "model")
    assert status == 1
    assert [row["status"] for row in result["parts"]["model"]["rows"]] == ["ok"] * 3 + [
        "failed"
    ] * 3


def test_a_refused_capture_is_a_failure(tmp_path, capture_by):
    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    capture_by(refuse)
    status, result = check(tmp_path, "--parts", "model,pictures")
    assert status == 1 and result["parts"]["model"]["status"] == "failed"
    rows = result["parts"]["pictures"]["rows"]
    assert {row["why_not_captured"] for row in rows} == {"the capture was refused"}


def test_a_picture_is_what_the_pipeline_makes(tmp_path):
    of = run.Run(torch.device("cpu"), True, tmp_path / "x.json", time.monotonic() + 60)
    pipe = pictures._pipeline(of)
    for images in range(3):
        arguments = pictures.arguments_of(64, images, 4)
        clock = pictures.Clock(of.device)
        taken = pictures.take(pipe, arguments, clock, captured=True, most=4)
        assert len(taken.steps) == 4
        assert torch.equal(taken.latents, pipe(**arguments))


@pytest.mark.parametrize(("images", "documented"), [(0, 72.9), (1, 122.5), (2, 135.7)])
def test_operations_of_a_step(images, documented):
    """As counted for the real model at 1024 px: about 100 words, images of 4096 tokens."""
    cached = [130, 120] if not images else [images * 4096 + 80, 120, images * 4096 + 30]
    counted = pictures.step_flops(run.sizes_of(False).config, 4096, cached)
    assert counted / 1e12 == pytest.approx(documented, rel=0.01)


@pytest.mark.slow
def test_captured_steps_are_timed_beside_diffusers(tmp_path, capturing):
    pytest.importorskip("diffusers")
    status, result = check(tmp_path, "--parts", "peer")
    part = result["parts"]["peer"]
    assert (status, part["status"]) == (0, "ok"), part
    assert len(part["rows"]) == 6
    for row in part["rows"]:
        assert row["captured"] and 0 < row["difference"] < 5e-2
        assert row["ours"]["samples"] == row["diffusers"]["samples"] == 3


def test_without_diffusers_its_part_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    status, result = check(tmp_path, "--parts", "peer")
    part = result["parts"]["peer"]
    assert (status, part["status"], part["why"]) == (
        0,
        "not measured",
        "diffusers is not installed",
    )


def test_a_wrong_kernel_fails_the_check_and_nothing_else(tmp_path, monkeypatch):
    swiglu = ops.swiglu
    monkeypatch.setattr(ops, "swiglu", lambda x, out=None: swiglu(x, out).mul_(1.02))
    status, result = check(tmp_path, "--parts", "environment,kernels,operations")
    assert status == 1
    parts = result["parts"]
    assert parts["kernels"]["status"] == "failed" and "swiglu" in parts["kernels"]["why"]
    failed = {row["kernel"] for row in parts["kernels"]["rows"] if row["status"] == "failed"}
    assert failed == {"swiglu"}
    assert parts["operations"]["status"] == "ok"


def test_what_writes_beside_its_rows_is_found(tmp_path, monkeypatch):
    def stray(x, weight, eps, out=None):
        out.as_strided(out.shape, out.stride(), out.storage_offset() - 1).fill_(0)
        return rms_norm(x, weight, eps, out)

    rms_norm = ops.rms_norm
    monkeypatch.setattr(ops, "rms_norm", stray)
    status, result = check(tmp_path, "--parts", "kernels")
    whys = {
        row.get("why") for row in result["parts"]["kernels"]["rows"] if row["status"] == "failed"
    }
    assert status == 1 and whys == {"wrote outside its rows"}


@pytest.mark.parametrize(("name", "expected"), [("model", 1), ("operations", 0)])
def test_a_part_that_fails_lets_the_next_run(tmp_path, monkeypatch, name, expected):
    def fail(*_):
        raise MemoryError("no more")

    parts = {"kernels": lambda *_: None, name: fail, "environment": lambda *_: None}
    monkeypatch.setattr(gpu_check, "PARTS", {"model": lambda *_: None} | parts)
    status, result = check(tmp_path, "--parts", ",".join(gpu_check.PARTS))
    assert status == expected and result["state"] == "complete"
    assert result["parts"][name]["why"] == "MemoryError: no more"
    assert "in fail" in result["parts"][name]["traceback"]
    assert result["parts"]["environment"]["status"] == "ok"


def test_no_budget_measures_nothing(tmp_path):
    status, result = check(tmp_path, "--budget", "0")
    assert status == 0 and result["state"] == "out of time"
    assert {part["status"] for part in result["parts"].values()} == {"not measured"}
    assert {part["why"] for part in result["parts"].values()} == {"time"}


def test_a_part_that_takes_too_long_is_cut_off(tmp_path):
    def slow(_, found):
        found["rows"] = [{"case": "first", "status": "ok"}]
        time.sleep(30)

    begin = time.monotonic()
    of = run.Run(torch.device("cpu"), True, tmp_path / "x.json", begin + 0.5)
    run.execute(of, {"slow": slow, "after": lambda *_: None}, ("slow", "after"))
    assert time.monotonic() - begin < 5
    assert of.result["state"] == "out of time"
    assert of.parts["slow"]["status"] == "cut off" and len(of.parts["slow"]["rows"]) == 1
    assert of.parts["after"] | {"seconds": 0} == {
        "status": "not measured",
        "why": "time",
        "seconds": 0,
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_keeps_what_it_has(tmp_path, monkeypatch, number):
    def interrupted(*_):
        os.kill(os.getpid(), number)
        time.sleep(30)

    parts = {"kernels": lambda *_: None, "model": interrupted, "environment": lambda *_: None}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    handler = signal.getsignal(number)
    status, result = check(tmp_path, "--parts", ",".join(parts))
    assert status == 130 and result["state"] == "interrupted"
    assert signal.getsignal(number) is handler
    found = {name: (part["status"], part.get("why")) for name, part in result["parts"].items()}
    assert found == {
        "kernels": ("ok", None),
        "model": ("cut off", "interrupted"),
        "environment": ("not measured", "not reached"),
    }


def test_a_killed_run_leaves_a_result(tmp_path):
    program = (
        "import os, signal\n"
        "from bench import gpu_check\n"
        "from bench.kernels import workload\n"
        "workload.measure_limits = lambda *_: workload.Limits(1e10, 1e11)\n"
        "def kill(run, found):\n"
        "    found['rows'] = [{'case': 'first', 'status': 'ok'}]\n"
        "    run.save()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "gpu_check.PARTS |= {'kernels': kill}\n"
        f"gpu_check.main(['--device', 'cpu', '--tiny', '--out', {str(tmp_path)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert result["state"] == "running"
    assert result["parts"]["environment"]["status"] == "ok"
    assert len(result["parts"]["kernels"]["rows"]) == 1
    assert result["parts"]["model"] == {"status": "not measured", "why": "not reached"}


def test_arguments_that_make_no_sense(capsys):
    for given in (["--parts", "nothing"], ["--device", "cpu"]):
        with pytest.raises(SystemExit) as raised:
            gpu_check.main(given)
        assert raised.value.code == 2
    assert "unknown parts nothing" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_nan_is_never_earned():
    exact_ = torch.ones(3, dtype=torch.float64)
    assert not exact._errors(torch.full((3,), torch.nan), torch.ones(3), exact_)[2]
