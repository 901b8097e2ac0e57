"""`omnigen-fast bench`: what it says, and what it keeps when something goes wrong."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from limits import measured_limits

from bench import commands, profiler, record, report, suite
from bench.cases import Setting, Size, Task, parse_settings, parse_sizes
from bench.contenders import Ours
from bench.kernels import workload
from bench.peers import original
from bench.peers.diffusers import DiffusersTransformer
from omnigen_fast.errors import RequestError

pytestmark = pytest.mark.early

TINY = ["--model", "random:tiny", "--device", "cpu", "--steps", "3", "--repeat", "1"]


counted = cache(suite.count)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the command: (status, standard output, standard error, result or None).

    What is the same in every run is measured in the first.
    """
    monkeypatch.setattr(suite, "_cold_start", lambda *_: {"status": "not measured", "why": "test"})
    for module in (suite, profiler):
        monkeypatch.setattr(module, "measure_limits", measured_limits)
        monkeypatch.setattr(module, "count", counted)

    def run(*arguments: str, tiny: bool = True):
        path = tmp_path / "result.json"
        given = [*(TINY if tiny else ()), "--json", str(path), *arguments]
        done = CliRunner().invoke(commands.bench, given)
        if done.exception and not isinstance(done.exception, SystemExit):
            raise done.exception
        result = json.loads(path.read_text()) if path.is_file() else None
        return done.exit_code, done.stdout, done.stderr, result

    return run


def test_cells_beside_diffusers(bench, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nobsolete\n{report.END}\nafter\n")
    status, out, said, result = bench("--peers", "diffusers", "--md", str(page))
    assert status == 0 and result["state"] == "complete"
    assert [cell["column"] for cell in result["cells"]] == ["text", "one image", "two images"]
    for cell in result["cells"]:
        for row in cell["contenders"].values():
            assert row["status"] == "ok" and row["picture"]["seconds"] > 0 and row["peak_gb"] > 0
        theirs = cell["contenders"]["diffusers"]
        ours = cell["contenders"]["omnigen_fast"]
        ratio = theirs["picture"]["seconds"] / ours["picture"]["seconds"]
        assert theirs["picture_ratio"] == pytest.approx(ratio)
        assert 0 < theirs["difference"] < theirs["bound"]
    # what was compared stands before any time
    assert len(result["checks"]) == 3 and all(one["passed"] for one in result["checks"])
    assert said.index("check passed: diffusers, float32") < said.index("64 px, default, text")
    for text in ("x ours", "share of the limit", "Made with"):
        assert text in out
    written = page.read_text()
    assert written.startswith(f"before\n{report.BEGIN}\n") and written.endswith("\nafter\n")
    assert "obsolete" not in written and "| diffusers |" in written


@pytest.mark.slow
def test_settings_are_rows_and_diffusers_has_none(bench):
    status, out, _, result = bench("--settings", "kv+separate", "--peers", "diffusers")
    assert status == 0 and len(result["cells"]) == 6
    row = result["cells"][-1]["contenders"]
    assert result["cells"][-1]["setting"] == "kv+separate" and row["omnigen_fast"]["status"] == "ok"
    assert row["diffusers"] == {"status": "not measured", "why": "has no such switches"}
    assert "by setting" in out


def test_a_missing_peer_is_a_row_that_says_so(bench, tmp_path):
    status, out, said, result = bench(
        "--peers", "original", "--original-python", str(tmp_path / "nothing")
    )
    assert status == 0
    assert "original: not installed" in said and "make peers" in out
    rows = [cell["contenders"]["original"] for cell in result["cells"]]
    assert {row["status"] for row in rows} == {"not installed"}
    assert "not installed" in out


def test_a_peer_that_does_not_start_says_why(bench, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no module named OmniGen' >&2\nexit 3\n")
    broken.chmod(0o755)
    status, out, _, _ = bench("--peers", "original", "--original-python", str(broken))
    assert status == 0 and "no module named OmniGen" in out


def test_without_diffusers_its_row_says_so(bench, monkeypatch):
    monkeypatch.setattr("bench.peers.find_spec", lambda name: None)
    status, out, _, _ = bench("--peers", "diffusers")
    assert status == 0 and "diffusers: not installed" in out


def test_no_time_of_a_peer_that_computes_something_else(bench, monkeypatch):
    velocity = DiffusersTransformer.velocity
    monkeypatch.setattr(DiffusersTransformer, "velocity", lambda *args: velocity(*args) * 1.001)
    status, out, said, result = bench("--peers", "diffusers")
    assert status == 1 and "check FAILED: diffusers" in said
    assert all("picture" not in cell["contenders"]["diffusers"] for cell in result["cells"])
    assert "x ours" not in out and result["cells"][0]["contenders"]["omnigen_fast"]["picture"]


@pytest.mark.skipif(not original.PYTHON.is_file(), reason="make peers was not run")
def test_the_original_computes_what_we_do(bench):
    status, _, _, result = bench("--peers", "original")
    assert status == 0
    assert len(result["checks"]) == 6 and all(one["passed"] for one in result["checks"])
    assert {one["contenders"]["original"]["status"] for one in result["cells"]} == {"ok"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sizes", "100"], "'100' is no size"),
        (["--sizes", "64/x"], "'64/x' is no size"),
        (["--settings", "fast"], "'fast' is no setting"),
        (["--peers", "sora"], "'sora' is not known"),
        (["--model", "random:huge"], "'random:huge' is not known"),
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--steps", "1"], "1 is not in the range"),
        (["--repeat", "0"], "0 is not in the range"),
    ],
)
def test_wrong_options_are_one_line(bench, arguments, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    status, out, error, result = bench(*arguments)
    assert status in (1, 2) and said in error and out == "" and result is None
    assert "Traceback" not in error and len(error.strip().splitlines()) <= 4


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_one_line_and_the_table_is_shown(bench, monkeypatch):
    monkeypatch.setattr(os, "replace", full_disk)
    status, out, said, result = bench("--peers", "none")
    assert status == 1 and result is None
    assert said.count("No space left on device") == 2  # when it happens, and at the end
    assert "two images" in out and " s (" in out


def test_an_interrupted_run_keeps_what_it_has(bench, monkeypatch):
    picture = Ours.picture

    def interrupted(self, start, *args, **more):
        if start.task.images == 1 and start.task.variant:
            os.kill(os.getpid(), signal.SIGTERM)
        return picture(self, start, *args, **more)

    monkeypatch.setattr(Ours, "picture", interrupted)
    handler = signal.getsignal(signal.SIGTERM)
    status, out, said, result = bench("--peers", "none")
    assert status == 130 and result["state"] == "interrupted"
    assert [cell["column"] for cell in result["cells"]] == ["text"]
    assert "interrupted" in said and "The run is interrupted" in out
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.slow
def test_a_contender_that_fails_leaves_the_others(bench, monkeypatch):
    run = DiffusersTransformer.run_step

    def fail(self, index=0):
        if index == 2:
            raise MemoryError("no more")
        return run(self, index)

    monkeypatch.setattr(DiffusersTransformer, "run_step", fail)
    status, out, _, result = bench("--peers", "diffusers")
    assert status == 1 and "MemoryError: no more" in out
    rows = [cell["contenders"] for cell in result["cells"]]
    assert {row["omnigen_fast"]["status"] for row in rows} == {"ok"}
    assert {row["diffusers"]["status"] for row in rows} == {"failed"}


def test_a_page_without_marks_is_left_alone(tmp_path):
    page = tmp_path / "notes.md"
    page.write_text("my notes\n")
    with pytest.raises(RequestError, match="give another file"):
        report.write_markdown(page, "table\n")
    assert page.read_text() == "my notes\n"


def test_a_result_is_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    one = record.Record(path, {"n": 1})
    one.save()
    one.result["n"] = 2
    monkeypatch.setattr(os, "replace", full_disk)
    one.save()
    assert "No space left" in one.lost
    assert json.loads(path.read_text()) == {"n": 1} and os.listdir(tmp_path) == ["x.json"]


def test_sizes_and_settings():
    assert parse_sizes("1024, 1024/512") == (Size(1024, 1024), Size(1024, 512))
    assert str(Size(1024, 512)) == "1024 px, images 512 px"
    assert parse_settings("default") == (Setting(),) and Setting().arguments == {}
    assert len(parse_settings("all")) == 5
    (setting,) = parse_settings("kv+offload-kv")
    assert setting.arguments == {
        "use_kv_cache": True,
        "offload_kv_cache": True,
        "separate_cfg_infer": False,
        "offload_model": False,
    }


def test_tasks_of_one_cell_share_no_condition_and_have_equal_lengths(load_pipe):
    from bench.contenders import make_start

    pipe = load_pipe()
    starts = [make_start(pipe, Task(Size(64, 64), 2, 4, variant)) for variant in range(3)]
    keys = [branch.key for start in starts for branch, _ in start.branches]
    assert len(set(keys)) == len(keys) == 9
    lengths = {tuple(branch.length for branch, _ in start.branches) for start in starts}
    assert len(lengths) == 1


@pytest.mark.slow
def test_plots_and_profile(bench, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    folder = tmp_path / "plots"
    status, out, _, result = bench("--peers", "none", "--plot", str(folder))
    assert status == 0
    made = sorted(folder.glob("*.png"))
    assert {"sizes.png", "limits.png"} <= {one.name for one in made}
    for one in made:
        with Image.open(one) as image:
            assert min(image.size) > 200 and len(image.convert("L").histogram()) == 256
            assert image.convert("L").getextrema()[0] < 100  # something is drawn
    found = result["profile"]
    names = {row["name"] for row in found["operations"]}
    assert {"attention_step", "rms_norm", "swiglu", "mm", "addmm"} <= names
    assert out.count("wrote") == 1 + len(made)


def test_a_profile_adds_up(bench, tmp_path):
    status, out, _, result = bench("--profile")
    assert status == 0
    assert len(list(tmp_path.glob("*.trace.json.gz"))) == 3
    for found in result["columns"].values():
        rows = found["families"]
        spent = sum(row["seconds"] for row in rows)
        assert spent == pytest.approx(found["step_seconds"], rel=0.05)
        gains = [row["to_gain_seconds"] for row in rows]
        assert gains == sorted(gains, reverse=True)
        (launches,) = [row for row in rows if row["name"] == "launches"]
        assert launches["calls"] == sum(row["calls"] for row in rows if row is not launches)
    assert "most to gain in" in out


@pytest.mark.slow
def test_limits_are_measured():
    """Of all products, which `limits.measured_limits` leaves out."""
    found = workload.measure_limits(torch.device("cpu"), torch.float32)
    assert found.bytes_per_second > 1e8 and found.flops_per_second > 1e8


def test_kernels_of_a_gpu_have_families():
    from bench.profiler import family_of_kernel

    for name, family in {
        "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT": "products",
        "sm80_xmma_gemm_bf16bf16_bf16f32": "products",
        "attention_step_maps_kernel": "attention",
        "rms_norm_kernel": "norms",
        "swiglu_kernel": "elementwise",
        "guidance_step_kernel": "elementwise",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "void at::native::vectorized_elementwise_kernel<4, add>": "elementwise",
        "void at::native::indexSelectLargeIndex<float>": "copies",
    }.items():
        assert family_of_kernel(name) == family, name


def test_the_module_is_the_command(tmp_path):
    import subprocess

    root = Path(commands.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--sizes", "7"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 2 and "'7' is no size" in done.stderr
