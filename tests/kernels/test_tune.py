"""What of tuner and micro-benchmarks needs no GPU: choosing, checking, the table, the refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from numerics import DEVICE
from omnigen_fast.kernels import launch, ops, winners

FOLDER = Path(__file__).parents[2] / "bench" / "kernels"


@pytest.fixture
def tune(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import tune

    return tune


def test_the_table_stands_as_the_tuner_writes_it(tune):
    text = Path(launch.__file__).read_text()
    assert tune.rewritten(text, launch.TABLE) == text
    assert tune.rewritten_amd(text, launch.AMD) == text


def test_a_new_table_is_read_back(tune):
    changed = launch.Launch(num_warps=16, num_stages=5, block_m=32, block_n=256)
    table = {**launch.TABLE, 90: {**launch.TABLE[90], "attention_step/96/16": changed}}
    text = tune.rewritten(Path(launch.__file__).read_text(), table)
    module = type(sys)("rewritten_launch")
    module.__file__ = launch.__file__
    sys.modules[module.__name__] = module  # where dataclasses look their module up
    try:
        exec(compile(text, "launch.py", "exec"), module.__dict__)
        found = {
            capability: {key: vars(one) for key, one in entries.items()}
            for capability, entries in module.TABLE.items()
        }
    finally:
        del sys.modules[module.__name__]
    expected = {
        capability: {key: vars(one) for key, one in entries.items()}
        for capability, entries in table.items()
    }
    assert found == expected
    assert module.lookup("attention_step", 90, 96).block_n == 256


def test_a_new_table_of_amd_is_read_back(tune):
    changed = launch.Launch(num_warps=16, block_m=32, block_n=256)
    entries = {**launch.AMD["gfx1100"], "attention_step/96/16": changed}
    text = tune.rewritten_amd(Path(launch.__file__).read_text(), launch.AMD | {"gfx1151": entries})
    assert text.count(tune.written(changed)) == 1
    before, _, after = text.partition('    "gfx1151": {\n')
    assert before.rstrip().endswith("},") and after.startswith('        "rms_norm": ')
    assert tune.rewritten_amd(text, launch.AMD) == Path(launch.__file__).read_text()


def test_every_kernel_has_candidates(tune):
    for key, now in launch.AMD["gfx942"].items():
        tried = list(tune.candidates(key.partition("/")[0], "gfx942"))
        assert len(tried) == len(set(tried)) > 3 and not any(one.tensor_maps for one in tried)
        if not key.endswith("/32"):
            assert now in tried, key
    for key in launch.TABLE[90]:
        kernel = key.partition("/")[0]
        tried = list(tune.candidates(kernel, 90))
        assert len(tried) == len(set(tried)) > 3
        names = {"attention_step": "block_m", "attention_prefill": "block_n"}
        assert all(getattr(one, names.get(kernel, "num_warps")) for one in tried)


def test_sizes_keep_the_work(tune):
    for head_dim in tune.HEAD_DIMS:
        size = tune.size_of(head_dim)
        assert size.hidden == 3072 and size.heads * head_dim == 3072


def tiny():
    import workload

    return workload.Size(noise=16, cached=(20, 3), heads=2, hidden=128, inner=96)


def test_the_fastest_right_configuration_wins(tune):
    """Times are made up here, by the number of warps; what computes something else never wins."""
    import workload

    case = workload.build("swiglu", torch.device(DEVICE), tiny())
    took = {2: 5e-6, 4: 1e-6, 8: 3e-6}
    kernel = case.contenders[workload.KERNELS]

    def wrong_with_4_warps():
        right = kernel()
        return -right if launch.choose("swiglu", right).num_warps == 4 else right

    case.contenders[workload.KERNELS] = wrong_with_4_warps
    now = launch.TABLE[80]["swiglu"]
    assert now.num_warps == 4

    def seconds(run, device):
        return took[launch.choose("swiglu", run()).num_warps]

    with (
        mock.patch.object(workload, "build", return_value=case),
        mock.patch.object(workload, "seconds", seconds),
        mock.patch.object(launch, "capability_of", return_value=80),
        pytest.raises(AssertionError, match="swiglu: kernels is off"),
    ):
        tune.tune("swiglu", 0, now, torch.device(DEVICE))
    case.contenders[workload.KERNELS] = kernel
    with (
        mock.patch.object(workload, "build", return_value=case),
        mock.patch.object(workload, "seconds", seconds),
        mock.patch.object(launch, "capability_of", return_value=80),
    ):
        assert (
            tune.tune("swiglu", 0, replace(now, num_warps=8), torch.device(DEVICE)).num_warps == 4
        )


CASES = (
    "rms_norm",
    "rope_",
    "rope_cache_",
    "swiglu",
    "modulate",
    "quantise_",
    "rms_norm_quantise_",
    "swiglu_quantise_",
    "scaled_mm_",
    "quantise_cache_",
    "dequantise_int8_",
    "dequantise_fp8_",
    "dequantise_nf4_",
    "guidance_step_",
    "attention_step",
    "join_segments",
    "attention_step_8bit",
    "attention_prefill",
)


@pytest.mark.parametrize("name", CASES)
def test_benchmarks_check_before_they_time(tune, name):
    import workload

    assert set(CASES) == set(workload.CASES)
    case = workload.build(name, torch.device(DEVICE), tiny())
    for contender in case.contenders:
        if contender != workload.COMPILED:  # which needs a compiler for C++ on a CPU
            workload.check(case, contender)
    right = case.contenders[workload.KERNELS]
    case.contenders[workload.KERNELS] = lambda: right() * 1.05
    with pytest.raises(AssertionError, match=f"{name}: kernels is off"):
        workload.check(case, workload.KERNELS)


def test_who_wins(tune):
    import workload

    def won(**seconds):
        raced = {one: workload.Raced(took) for one, took in seconds.items()}
        return workload.fastest(raced)

    assert won(triton=(2.0, 2.1), flash=(1.0, 1.0), cudnn=(1.5, 1.5)) == "flash"
    assert won(triton=(2.0, 2.1), flash=None, cudnn=(1.5, 1.5)) == "cudnn"
    assert won(triton=(2.0, 2.1), flash=(1.95, 2.0)) == "triton"  # within noise
    assert won(triton=(2.0, 2.0), flash=(1.9, 2.2)) == "triton"
    assert won(triton=(2.0, 2.0), flash=(3.0, 3.0), cudnn=None) == "triton"
    assert won(triton=None, flash=(1.0, 1.0)) is None
    assert won(flash=(1.0, 1.0)) is None


def test_the_winners_are_read_back(tune, tmp_path):
    import workload

    text = Path(winners.__file__).read_text()
    assert workload.with_winners(text, winners.WINNERS) == text
    copy = tmp_path / "winners.py"
    copy.write_text(text)
    with mock.patch.object(winners, "__file__", str(copy)):
        workload.keep_winners("NVIDIA H200", {96: "cudnn", 64: "flash"})
        with mock.patch.object(winners, "WINNERS", {"NVIDIA H200": {96: "cudnn", 64: "flash"}}):
            workload.keep_winners("NVIDIA A10", {96: "triton"})
            workload.keep_winners("NVIDIA H200", {96: "triton"})
    found: dict = {}
    exec(copy.read_text(), found)
    assert found["WINNERS"] == {"NVIDIA H200": {64: "flash", 96: "triton"}}
    assert found["winner"]("NVIDIA H200", 64) == "flash"
    assert found["winner"]("NVIDIA H200", 128) == found["winner"]("NVIDIA L4", 96) == "triton"


def test_a_race_holds_its_contenders_to_float64(tune):
    """On a CPU, where its flash attention runs alone; a wrong one has no time."""
    import workload

    with mock.patch.object(workload, "seconds", return_value=1.0):
        found = workload.race(torch.device("cpu"), tiny())
        assert found == {"flash": workload.Raced((1.0, 1.0))}
        real = ops.attention_step
        with mock.patch.object(
            ops, "attention_step", lambda *args, **more: 1.1 * real(*args, **more)
        ):
            (wrong,) = workload.race(torch.device("cpu"), tiny()).values()
    assert wrong.seconds is None and "flash, joined is off" in wrong.why


def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, FOLDER / "tune.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2
    assert done.stderr.strip().endswith("needs an NVIDIA GPU of compute capability 8.0 or later")
    assert "an AMD GPU of gfx90a" in done.stderr
