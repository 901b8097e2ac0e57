"""What `plan` says beside a prediction: ranges, the host, the disk, the nearest profile."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from omnigen_fast import OmniGenPipeline, profiles
from omnigen_fast.cli.main import main
from omnigen_fast.config import released_sizes
from omnigen_fast.memory import device
from omnigen_fast.memory.autoencoder import VaeShape
from omnigen_fast.memory.cost import Estimate
from omnigen_fast.memory.plan import MemoryPlan, typical_workload
from omnigen_fast.precision import Precision

GPUS = [name for name in profiles.names() if not profiles.load(name).on_host]


def run(*arguments: str):
    return CliRunner().invoke(main, ["plan", *arguments])


@pytest.mark.parametrize("name", GPUS)
def test_a_prediction_lies_in_its_range(name):
    profile = profiles.load(name)
    fastest, slowest = profiles.spread(profile)
    peak = profile.bf16_flops_per_second
    assert fastest.attained_product_flops_per_second == peak
    assert slowest.attained_product_flops_per_second <= 0.73 * peak
    workload, plan = typical_workload(1024, 1024, images=1), MemoryPlan.plain(32)
    seconds = [
        Estimate(released_sizes(), VaeShape(), Precision.of("bfloat16"), workload, one).seconds.of(
            plan
        )
        for one in (fastest, profile, slowest)
    ]
    assert seconds == sorted(seconds) and seconds[0] < seconds[2]


def test_stand_ins_have_no_range():
    assert profiles.spread(profiles.load("cpu")) is None
    output = run("--device", "cpu", "--size", "512").output
    assert "no range is known" in output and "host" not in output.splitlines()[2]


def test_every_column_is_explained():
    result = run("--device", "a800")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[2].split()[:5] == ["GB", "host", "s", "from", "to"]
    chosen = next(line for line in lines if line.startswith("*")).split()
    _, host, seconds, low, high = map(float, chosen[1:6])
    assert low < seconds < high and 0 < host < 1
    for said in ("GB: peak", "host: GB", "s: seconds", "from, to:", "disk:", "documented: GB"):
        assert any(line.startswith(said) for line in lines), said


def test_what_a_plan_holds_on_the_host():
    """The table of positions; streamed layers, an offloaded VAE and a streamed cache besides."""
    workload = typical_workload(1024, 1024)
    estimate = Estimate(
        *(released_sizes(), VaeShape(), Precision.of("bfloat16"), workload, profiles.load("a800"))
    ).bytes
    plain = MemoryPlan.plain(32)
    positions = 192**2 * 3072 * 2
    assert estimate.host_bytes(plain) == positions
    streamed = replace(plain, resident_layers=30, capture=False)
    assert estimate.host_bytes(streamed) == positions + 2 * estimate.slot_bytes
    assert estimate.host_bytes(replace(plain, vae_resident=False)) - positions > 300e6
    ring = estimate.host_bytes(replace(streamed, cache="ring")) - estimate.host_bytes(streamed)
    assert ring == estimate.cache_rows(plain) * estimate.row_bytes(plain)
    strips = replace(plain, strip_rows=16, strips_on_host=True)
    assert estimate.host_bytes(strips) > positions + 100e6


@pytest.mark.parametrize(
    ("capability", "gigabytes", "name"),
    [
        ((8, 9), 12.9, "rtx4070"),
        ((8, 9), 17.0, "rtx4080"),
        ((8, 6), 51.0, "rtx3090"),
        ((9, 0), 85.0, "h100"),
        ((12, 0), 33.6, "rtx5090"),
        ((7, 5), 16.7, "rtx3060-12gb"),  # of a generation that has none
    ],
)
def test_a_card_without_a_profile_has_the_nearest_one(monkeypatch, capability, gigabytes, name):
    card = SimpleNamespace(
        name="Card X", major=capability[0], minor=capability[1], total_memory=gigabytes * 1e9
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: card)
    found = device.profile_of(torch.device("cuda", 0))
    nearest = profiles.load(name)
    assert found.name == f"Card X (rates of {nearest.name}, the nearest profile)"
    assert found.memory_bytes == card.total_memory and not found.documented
    assert found.bf16_flops_per_second == nearest.bf16_flops_per_second


@pytest.mark.parametrize(
    ("asked", "near"), [("rtx4070ti", "rtx4070"), ("RTX 3090", "rtx3090"), ("h100-pcie", "h100")]
)
def test_an_unknown_name_is_answered_with_the_nearest(asked, near):
    result = run("--device", asked)
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert f"no profile '{asked}': give a file, or {near}, whose name is nearest" in line


def test_the_summary_sets_what_ran_beside_what_was_predicted():
    pipe = OmniGenPipeline.from_pretrained("shapes", device="cpu")
    pipe("A red star.", **{**pipe.defaults, "num_inference_steps": 2}, progress=False)
    report = pipe.last_report
    assert report.measured_seconds > 0 and report.measured_bytes is None
    # what later calls may take is room, not the peak of this one
    own = report.predicted.peak_bytes - report.predicted.kept_bytes
    assert report.predicted.kept_bytes > 1e9 and 0.4e9 < own < 0.7e9
    text = pipe.summary()
    assert f"predicted: peak {own / 1e9:.2f} GB" in text and "for later calls" in text
    assert f"measured: {report.measured_seconds:.1f} s" in text and "predict" in text
    if report.process_bytes is not None:  # Linux tells
        assert f"measured peak: {report.process_bytes / 1e9:.2f} GB, of the whole process" in text


@pytest.mark.parametrize(
    ("measured", "said"),
    [(11.0, "10% more than predicted"), (9.0, "10% less than predicted"), (40.0, "4 times the")],
)
def test_how_far_a_prediction_was_off(measured, said):
    from omnigen_fast.memory.cost import Cost
    from omnigen_fast.memory.overview import Report
    from omnigen_fast.memory.terms import Duration, Term

    term, duration = (Term("x", 10**9, ""),), (Duration("x", 10.0, ""),)
    cost = Cost((), (), term, term, duration)
    report = Report(MemoryPlan.plain(32), cost, 0.5, measured_seconds=measured)
    assert said in report.text(released_sizes())
