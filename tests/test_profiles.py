"""Device profiles, and the predictions made of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from omnigen_fast import profiles

ROOT = Path(__file__).parents[1]
GOOD = {
    "name": "mine",
    "memory_bytes": 8e9,
    "bandwidth_bytes_per_second": 1e12,
    "bf16_flops_per_second": 100e12,
    "attained_product_flops_per_second": 80e12,
    "attained_attention_flops_per_second": 50e12,
    "attained_bandwidth_share": 0.5,
    "source": "a guess",
}


@pytest.mark.parametrize("name", profiles.names())
def test_what_is_attained_is_below_the_peak(name):
    profile = profiles.load(name)
    assert profile.attained_product_flops_per_second < profile.bf16_flops_per_second
    assert profile.attained_attention_flops_per_second < profile.bf16_flops_per_second
    assert 0 < profile.attained_bandwidth_share < 1
    assert profile.source


def test_the_devices_of_the_documented_tables_ship():
    assert {"a800", "rtx3090", "h200"} <= set(profiles.names())


def test_a_roofline(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(GOOD))
    profile = profiles.load(path)
    assert profile.seconds(1e12) == 2.0
    assert profile.seconds(1e12, flops=400e12) == 5.0
    assert profile.seconds(1e12, flops=400e12, attention=True) == 8.0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": 5}, "name can't be 5"),
        ({"memory_bytes": -1}, "memory_bytes can't be -1"),
        ({"memory_bytes": True}, "memory_bytes can't be True"),
        ({"memory_bytes": float("nan")}, "memory_bytes can't be nan"),
        ({"more": 1}, "exactly the fields"),
    ],
)
def test_bad_values(tmp_path, changes, match):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**GOOD, **changes}))
    with pytest.raises(ValueError, match=match):
        profiles.load(path)


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="no profile 'rtx9999': give a file, or one of a800"):
        profiles.load("rtx9999")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ValueError, match="is not JSON"):
        profiles.load(tmp_path / "text")


def test_predictions_say_that_they_are():
    command = [sys.executable, ROOT / "bench/kernels/predict.py", "h200", "rtx3090"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    first, head, *rows = result.stdout.splitlines()
    assert first.startswith("PREDICTED, not measured")
    assert "H200" in head and "RTX 3090" in head
    found = {row.split()[0]: [float(cell) for cell in row.split()[1:]] for row in rows}
    assert {"attention_step", "rms_norm", "swiglu"} <= found.keys()
    # 1.0426 TFLOP of attention at 550 and at 66 TFLOP/s
    assert found["attention_step"] == pytest.approx([1895.7, 15797.3], rel=1e-3)
    # 151 MB at 85 % of 4.8 TB/s
    assert found["rms_norm"][0] == pytest.approx(37.0, rel=1e-2)
