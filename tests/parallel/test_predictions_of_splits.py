"""Seconds on several devices: pure arithmetic, held to what a hand can work out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from click.testing import CliRunner

from omnigen_fast import profiles
from omnigen_fast.cli.main import main
from omnigen_fast.config import released_sizes
from omnigen_fast.errors import RequestError
from omnigen_fast.memory.autoencoder import VaeShape
from omnigen_fast.memory.cost import Estimate
from omnigen_fast.memory.plan import MemoryPlan, typical_workload
from omnigen_fast.parallel.layout import Layout
from omnigen_fast.parallel.planner import choose_layout, report, splits
from omnigen_fast.precision import Precision
from omnigen_fast.schedule import StepKind, StepSchedule

LAYERS, NOISE, WIDTH = 32, 4096, 3072  # of the released model, at 1024 px
PLAN = MemoryPlan.plain(layers=LAYERS, capture=True)
BASE = profiles.load("rtx3090")
INSTANT = {"peer_bytes_per_second": 1e30, "peer_latency_seconds": 1e-30}


def estimate_of(workload=None, **profile):
    workload = workload or typical_workload(1024, 1024)
    bfloat16 = Precision.of("bfloat16")
    return Estimate(released_sizes(), VaeShape(), bfloat16, workload, replace(BASE, **profile))


def by_layout(estimate, ranks, plan=PLAN):
    return {one.layout: one for one in splits(estimate, plan, ranks)}


def test_each_layout_of_so_many_ranks_that_leaves_none_idle():
    text, image = estimate_of(), estimate_of(typical_workload(1024, 1024, images=1))
    assert set(by_layout(text, 2)) == {Layout(2, 1), Layout(1, 2)}
    assert set(by_layout(text, 3)) == {Layout(1, 3)}
    assert set(by_layout(image, 3)) == {Layout(3, 1), Layout(1, 3)}
    assert set(by_layout(image, 4)) == {Layout(2, 2), Layout(1, 4)}
    assert set(by_layout(image, 6)) == {Layout(3, 2), Layout(2, 3), Layout(1, 6)}
    assert set(by_layout(image, 1)) == {Layout(1, 1)}


def test_one_rank_takes_what_one_device_takes():
    for images in (0, 1):
        estimate = estimate_of(typical_workload(1024, 1024, images=images))
        (alone,) = splits(estimate, PLAN, 1)
        assert alone.seconds == pytest.approx(alone.alone)
        assert alone.gain == pytest.approx(1) and alone.communication == 0


def test_branches_exchange_velocities_only():
    """Of two branches each rank receives one, and half of the picture at the end."""
    rate, latency, steps = 1e9, 1e-3, 50
    estimate = estimate_of(peer_bytes_per_second=rate, peer_latency_seconds=latency)
    one = by_layout(estimate, 2)[Layout(2, 1)]
    velocities, pixels = NOISE * 16 * 2, 1024 * 1024 * 3 * 4 / 2
    expected = steps * (latency + velocities / rate) + latency + pixels / rate
    assert one.communication == pytest.approx(expected)


def test_rows_exchange_keys_and_values_of_each_layer():
    rate, latency, steps, groups = 1e9, 1e-3, 50, 2
    estimate = estimate_of(peer_bytes_per_second=rate, peer_latency_seconds=latency)
    one = by_layout(estimate, 4)[Layout(1, 4)]
    rows = NOISE // 4
    layer = latency + 3 * groups * rows * 2 * WIDTH * 2 / rate
    velocities = latency + 3 * groups * rows * 16 * 2 / rate
    pixels = latency + 3 * 1024 * 1024 * 3 * 4 / 4 / rate
    expected = steps * (LAYERS * layer + velocities) + pixels
    assert one.communication == pytest.approx(expected)


def test_what_is_predicted_for_a_rank_is_its_share():
    """Without communication, two ranks take half as long, but for launches and prefill."""
    estimate = estimate_of(**INSTANT)
    for one in splits(estimate, PLAN, 2):
        assert 1.9 < one.gain <= 2.001
    three = estimate_of(typical_workload(1024, 1024, images=1), **INSTANT)
    found = by_layout(three, 2)
    assert 1.4 < found[Layout(2, 1)].gain < 1.6  # one rank runs two of three branches
    assert found[Layout(1, 2)].gain > found[Layout(2, 1)].gain


def test_the_link_decides():
    image = typical_workload(1024, 1024, images=1)
    fast, slow = estimate_of(image, **INSTANT), estimate_of(image, peer_bytes_per_second=1e9)
    assert choose_layout([fast], PLAN, 2) == Layout(1, 2)
    assert choose_layout([slow], PLAN, 2) == Layout(2, 1)


def test_one_layout_for_requests_with_and_without_images():
    """Three ranks take a branch each, and of text the rows: no other layout is as fast for both."""
    text, image = estimate_of(), estimate_of(typical_workload(1024, 1024, images=1))
    assert choose_layout([text, image], PLAN, 3) == Layout(3, 1)
    assert choose_layout([text, image], PLAN, 6) == Layout(3, 2)
    assert choose_layout([text, image], PLAN, 5) == Layout(1, 5)
    assert choose_layout([text, image], PLAN, 1) == Layout(1, 1)


def test_a_step_of_fewer_branches_is_divided_anew():
    """Where guidance is off, ranks of idle branches take rows."""
    one = StepKind(branches=(0,), coefficients=(1.0,))
    schedule = StepSchedule((one,) * 10)
    estimate = estimate_of(typical_workload(1024, 1024, schedule=schedule), **INSTANT)
    assert by_layout(estimate, 2)[Layout(2, 1)].gain > 1.8


def test_pictures_share_the_negative_condition():
    """Two pictures' four branches: two ranks prefill as little as they can."""
    estimate = estimate_of(typical_workload(1024, 1024, pictures=2), **INSTANT)
    found = by_layout(estimate, 4)
    assert 3.8 < found[Layout(4, 1)].gain <= 4.01


def test_without_a_cache_each_rank_recomputes_its_own_conditions():
    plan = replace(PLAN, cache="none", capture=False)
    image = typical_workload(1024, 1024, images=1)
    found = by_layout(estimate_of(image, **INSTANT), 3, plan)
    assert found[Layout(3, 1)].gain > found[Layout(1, 3)].gain  # under rows they are whole


def test_streamed_layers_are_copied_by_every_rank():
    """A link that is the bottleneck of one device is that of two."""
    plan = replace(PLAN, resident_layers=0, capture=False)
    estimate = estimate_of(link_bytes_per_second=1e9)
    assert splits(estimate, plan, 2)[0].gain < 1.02
    assert "a second device gains nothing: each device waits for its own copies" in report(
        estimate, plan, 2
    )


def test_processes_on_one_cpu_gain_nothing():
    estimate = estimate_of(on_host=True, **INSTANT)
    plan = replace(PLAN, capture=False)
    for one in splits(estimate, plan, 2):
        assert one.gain < 1.02
    said = report(estimate, plan, 4)
    assert "3 more devices gain nothing: processes on one CPU share its cores" in said


def test_a_slow_link_gains_nothing():
    one = StepKind(branches=(0,), coefficients=(1.0,))
    alone = typical_workload(1024, 1024, schedule=StepSchedule((one,) * 10))
    estimate = estimate_of(alone, peer_bytes_per_second=1e8)
    said = report(estimate, PLAN, 2)
    assert "gains nothing: the exchange takes longer than what it saves" in said


def test_more_ranks_than_rows_are_refused():
    tiny = typical_workload(16, 16)
    with pytest.raises(RequestError, match="can't be divided among 64 devices"):
        report(estimate_of(tiny), PLAN, 64)


def test_the_table_of_the_command_line():
    def lines(*more):
        result = CliRunner().invoke(main, ["plan", "--device", "rtx3090", *more])
        assert result.exit_code == 0, result.output
        return result.output.splitlines()

    alone, two = lines(), lines("--gpus", "2")
    assert two[: len(alone)] == alone  # what it says of one device stays
    head, _, names, *rows = two[len(alone) + 1 :]
    assert head.startswith("2 devices over PCIe, 9.9 GB/s (predicted; one alone takes ")
    assert names.split() == ["s", "gain", "communication", "layout"]
    assert rows[0].startswith("*") and rows[0].endswith("branches in 2")
    assert rows[1].endswith("rows in 2") and len(rows) == 2
    seconds, gain = map(float, rows[0].split()[1:3])
    assert 1.9 < gain < 2.01 and seconds < float(rows[1].split()[0])


@pytest.mark.parametrize("gpus", ["0", "65", "two"])
def test_a_number_of_devices_that_there_can_not_be(gpus):
    result = CliRunner().invoke(main, ["plan", "--device", "rtx3090", "--gpus", gpus])
    assert result.exit_code == 2 and "Error: Invalid value for '--gpus'" in result.output
