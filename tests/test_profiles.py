"""Device profiles, and the predictions made of them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from omnigen_fast import profiles
from omnigen_fast.config import released_sizes
from omnigen_fast.errors import ProfileError
from omnigen_fast.memory.autoencoder import VaeShape
from omnigen_fast.memory.plan import typical_workload
from omnigen_fast.memory.planner import plan
from omnigen_fast.precision import Precision

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
LEAST = ("name", "memory_bytes", "bandwidth_bytes_per_second", "bf16_flops_per_second", "source")
FIGURES = [field.name for field in fields(profiles.Profile) if field.type == "float"]
ROW = {
    "settings": "all",
    "max_input_image_size": 512,
    "height": 512,
    "width": 512,
    "use_kv_cache": True,
    "offload_kv_cache": True,
    "separate_cfg_infer": True,
    "offload_model": False,
    "cells": ["9G, 1m", "OOM"],
}

# The original's guide, docs/inference.md, "Requiremented Resources": its tables, word for word.
GUIDE = """
- Different image size.
For A800 GPU:
| Settings     |  Only Text | Text + Single Image |  Text + Two Images    |
|:-------------|:----------:|:-------------------:|:---------------------:|
| max_input_image_size=1024,height=1024,width=1024 | 9G, 31s   | 12G, 1m6s  | 13G, 1m20s  |
| max_input_image_size=512,height=1024,width=1024 | 9G, 31s   | 10G, 50s  | 10G, 54s |
| max_input_image_size=768,height=768,width=768 | 9G, 16s  | 10G, 32s  | 10G, 37s  |
| max_input_image_size=512,height=512,width=512 | 9G, 7s   | 9G, 14s  | 9G, 15s  |
For RTX 3090 GPU:
| Settings     |  Only Text | Text + Single Image |  Text + Two Images    |
|:-------------|:----------:|:-------------------:|:---------------------:|
| max_input_image_size=1024,height=1024,width=1024 | 9G, 1m17s   | 12G, 2m46s  | 13G, 3m23s  |
| max_input_image_size=512,height=1024,width=1024 | 9G, 1m18s   | 10G, 2m8s  | 10G, 2m18s |
| max_input_image_size=768,height=768,width=768 | 9G, 41s  | 10G, 1m22s  | 10G, 1m38s  |
| max_input_image_size=512,height=512,width=512 | 9G, 19s   | 9G, 36s  | 9G, 43s  |
- Different inference settings
For A800 GPU:
| Settings     |  Only Text | Text + Single Image |  Text + Two Images    |
|:-------------|:----------:|:-------------------:|:---------------------:|
| use_kv_cache | 18G, 30s   | 36G, 1m  | 48G, 1m13s |
| use_kv_cache,offload_kv_cache | 10G, 30s   | 14G, 1m10s | 17G, 1m30s  |
| use_kv_cache,offload_kv_cache,separate_cfg_infer | 9G, 31s   | 12G, 1m6s  | 13G, 1m20s  |
| use_kv_cache,offload_kv_cache,offload_model | 4G, 55s   | 7G, 1m30s  | 11G, 1m48s  |
| use_kv_cache,offload_kv_cache,separate_cfg_infer,offload_model | 3G, 1m23s   | 5G, 2m19s   | 6G, 2m30s |
For RTX 3090 GPU:
| Settings     |  Only Text | Text + Single Image |  Text + Two Images    |
|:-------------|:----------:|:-------------------:|:---------------------:|
| use_kv_cache | 18G, 1m14s   | OOM  | OOM  |
| use_kv_cache,offload_kv_cache | 10G, 1m17s   | 14G, 3m11s | 17G, 4m3s  |
| use_kv_cache,offload_kv_cache,separate_cfg_infer | 9G, 1m18s   | 12G, 2m46s  | 13G, 3m21s  |
| use_kv_cache,offload_kv_cache,offload_model | 4G,3m1s    | 7G, 4m14s  | 11G, 5m4s  |
| use_kv_cache,offload_kv_cache,separate_cfg_infer,offload_model | 3G, 4m56s   | 5G, 7m49s   | 6G, 8m6s |
"""  # noqa: E501


def write(folder, values):
    path = folder / "mine.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def documented(**changes):
    """A profile with a table of one row, changed."""
    row = {**ROW, **changes}
    tables = [{"title": "t", "rows": [row]}]
    return {**GOOD, "documented": {"columns": ["text", "image"], "tables": tables}}


@pytest.mark.parametrize("name", profiles.names())
def test_what_is_attained_is_below_the_peak(name):
    profile = profiles.load(name)
    assert profile.attained_product_flops_per_second < profile.bf16_flops_per_second
    assert profile.attained_attention_flops_per_second < profile.bf16_flops_per_second
    assert profile.fp32_flops_per_second < profile.attained_product_flops_per_second
    assert profile.link_bytes_per_second < profile.bandwidth_bytes_per_second
    assert 0 < profile.attained_bandwidth_share < 1
    assert profile.context_bytes < profile.memory_bytes / 4


@pytest.mark.parametrize("name", profiles.names())
def test_every_figure_has_its_source(name):
    profile = profiles.load(name)
    expected = {*FIGURES, "documented"} if profile.documented else set(FIGURES)
    assert set(profile.source) == expected
    assert not any(text.startswith("not given") for text in profile.source.values())


@pytest.mark.parametrize(
    ("names", "most"),
    [
        # cuDNN's median on a card of 8.9; flash attention's is 86
        (("rtx4090", "rtx4080", "rtx4070", "rtx4060", "l4", "l40s"), 106e12),
        # plain Triton on an H100 at 16,384 rows
        (("h100", "h200"), 487e12),
    ],
)
def test_attention_is_no_faster_than_others_report(names, most):
    for name in names:
        profile = profiles.load(name)
        assert profile.attained_attention_flops_per_second <= most
        ratio = (
            profile.attained_attention_flops_per_second / profile.attained_product_flops_per_second
        )
        assert ratio < 0.7  # softmax costs time that products don't


def test_the_devices_that_ship():
    expected = {"a100-40gb", "a10g", "a800", "b200", "cpu", "h100", "h200", "l4", "l40s"}
    expected |= {"rtx3060-12gb", "rtx3080-10gb", "rtx3090", "rtx4060", "rtx4070", "rtx4080"}
    expected |= {"rtx4090", "rtx5070", "rtx5080", "rtx5090"}
    expected |= {"mi300x", "rx7900xtx", "rx9070xt"}
    assert set(profiles.names()) == expected


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA A800-SXM4-80GB", "a800"),
        ("NVIDIA A800 80GB PCIe", "a800"),
        ("NVIDIA A100-SXM4-80GB", "a800"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4060", "rtx4060"),
        ("NVIDIA H200", "h200"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Radeon RX 7900 XTX", "rx7900xtx"),
        ("AMD Radeon RX 9070 XT", "rx9070xt"),
        ("AMD Radeon RX 7900 XT", None),
        ("AMD Radeon Graphics", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4060 Ti", None),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", None),
        ("NVIDIA A800 40GB Active", None),
        ("NVIDIA ", None),
        ("", None),
    ],
)
def test_a_device_is_found_by_its_name(name, device):
    found = profiles.by_device_name(name)
    assert found == (device and profiles.load(device))


@pytest.mark.parametrize(("name", "heading"), [("a800", "A800"), ("rtx3090", "RTX 3090")])
def test_the_documented_tables_are_the_guides_word_for_word(name, heading):
    title = device = columns = None
    expected = []
    for line in GUIDE.strip().splitlines():
        if line.startswith("- "):
            title = line[2:].rstrip(".")
        elif line.startswith("For "):
            device = line[4:].removesuffix(" GPU:")
        elif not line.startswith("|:"):
            first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            if first == "Settings":
                columns = cells
            elif device == heading:
                expected += [(title, first, *pair) for pair in zip(columns, cells, strict=True)]
    cells = profiles.load(name).documented
    assert [(one.table, one.settings, one.column, one.text) for one in cells] == expected
    assert len(cells) == 27
    for one in cells:
        assert one.images == columns.index(one.column)


def test_what_a_documented_row_means():
    """Each row's text says it: sizes under the defaults, or the switches that are on at 1024."""
    for name in ("a800", "rtx3090"):
        for cell in profiles.load(name).documented:
            sizes = {"max_input_image_size": 1024, "height": 1024, "width": 1024}
            on = {"use_kv_cache", "offload_kv_cache", "separate_cfg_infer"}
            if "=" in cell.settings:
                pairs = (part.split("=") for part in cell.settings.split(","))
                sizes = {key: int(value) for key, value in pairs}
            else:
                on = set(cell.settings.split(","))
            assert {key: getattr(cell, key) for key in sizes} == sizes
            switches = ("use_kv_cache", "offload_kv_cache", "separate_cfg_infer", "offload_model")
            assert {key for key in switches if getattr(cell, key)} == on


@pytest.mark.parametrize(
    ("text", "gigabytes", "seconds"),
    [
        ("9G, 31s", 9, 31),
        ("12G, 1m6s", 12, 66),
        ("36G, 1m", 36, 60),
        ("4G,3m1s", 4, 181),
        ("OOM", None, None),
    ],
)
def test_cells_are_read(tmp_path, text, gigabytes, seconds):
    first, second = profiles.load(write(tmp_path, documented(cells=["9G, 7s", text]))).documented
    assert (first.images, first.gigabytes, first.seconds) == (0, 9, 7)
    assert (second.images, second.gigabytes, second.seconds) == (1, gigabytes, seconds)


def test_a_roofline(tmp_path):
    profile = profiles.load(write(tmp_path, GOOD))
    assert profile.seconds(1e12) == 2.0
    assert profile.seconds(1e12, flops=400e12) == 5.0
    assert profile.seconds(1e12, flops=400e12, attention=True) == 8.0


def test_a_users_file_needs_little(tmp_path):
    path = write(tmp_path, {key: GOOD[key] for key in LEAST})
    profile = profiles.load(path)
    assert profile == profiles.load(str(path))
    assert profile.capability is None and profile.device_names == profile.documented == ()
    for key in FIGURES:
        given = key in LEAST
        assert getattr(profile, key) == GOOD[key] if given else getattr(profile, key) > 0
        assert profile.source[key] == "a guess" if given else "not given" in profile.source[key]
    assert profile.attained_product_flops_per_second == 80e12
    # whoever gives no more must not be promised more than any device that ships attains
    for name in profiles.names():
        other = profiles.load(name)
        share = other.fp32_flops_per_second / other.bf16_flops_per_second
        if other.capability:
            assert profile.fp32_flops_per_second / profile.bf16_flops_per_second < share
            assert profile.link_bytes_per_second < other.link_bytes_per_second


def test_a_users_device_is_discrete_without_a_capability(tmp_path):
    """A plan asks whether the host is the device, not which CUDA it has."""
    with_it, without, host = (
        profiles.load(write(tmp_path, {**GOOD, "memory_bytes": 24e9, **more}))
        for more in ({"capability": "8.6"}, {}, {"on_host": True})
    )
    assert not with_it.on_host and not without.on_host and host.on_host
    first, second, third = (
        plan(
            released_sizes(),
            VaeShape(),
            Precision.of("bfloat16"),
            typical_workload(1024, 1024, images=1),
            profile,
            int(12e9),
        )
        for profile in (with_it, without, host)
    )
    assert (first.plan, first.cost, first.candidates) == (
        second.plan,
        second.cost,
        second.candidates,
    )
    assert third.candidates != first.candidates


def test_a_users_file_may_have_all(tmp_path):
    values = {
        **documented(),
        "capability": "12.0",
        "device_names": ["My GPU"],
        "fp32_flops_per_second": 20e12,
        "link_bytes_per_second": 50e9,
        "context_bytes": 3e8,
    }
    figures = (values.keys() & set(FIGURES)) | {"documented"}
    values["source"] = {key: f"of {key}" for key in figures}
    profile = profiles.load(write(tmp_path, values))
    assert (profile.capability, profile.device_names) == ("12.0", ("My GPU",))
    assert (profile.link_bytes_per_second, profile.context_bytes) == (50e9, 3e8)
    assert profile.source["link_bytes_per_second"] == "of link_bytes_per_second"
    assert profiles.by_device_name("My GPU") is None  # only among those that ship


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": 5}, "name can't be 5: it must be a text"),
        ({"name": " "}, "name can't be ' '"),
        ({"memory_bytes": -1}, "memory_bytes can't be -1: it must be a positive number"),
        ({"memory_bytes": 0}, "memory_bytes can't be 0"),
        ({"memory_bytes": True}, "memory_bytes can't be True"),
        ({"memory_bytes": "8e9"}, "memory_bytes can't be '8e9'"),
        ({"memory_bytes": float("nan")}, "memory_bytes can't be nan"),
        ({"memory_bytes": float("inf")}, "memory_bytes can't be inf"),
        ({"memory_bytes": 10**400}, "memory_bytes can't be 1000"),
        ({"memory_bytes": None}, "memory_bytes can't be None"),
        ({"link_bytes_per_second": []}, r"link_bytes_per_second can't be \[\]"),
        ({"context_bytes": -5}, "context_bytes can't be -5"),
        ({"peer_bytes_per_second": 0}, "peer_bytes_per_second can't be 0"),
        ({"peer_latency_seconds": 0}, "peer_latency_seconds can't be 0"),
        ({"peer_link": 4}, "peer_link can't be 4: it must be a text such as NVLink or PCIe"),
        ({"attained_bandwidth_share": 1.5}, "attained_bandwidth_share can't be 1.5: .* at most 1"),
        ({"attained_product_flops_per_second": 2e14}, "at most the peak of 1e.14"),
        ({"attained_attention_flops_per_second": 2e14}, "at most the peak of 1e.14"),
        ({"capability": 8.6}, "capability can't be 8.6: it must be null or a text like"),
        ({"capability": "sm_86"}, "capability can't be 'sm_86'"),
        ({"capability": "gfx"}, "capability can't be 'gfx': .* or \"gfx942\""),
        ({"capability": "gfx942:xnack-"}, "capability can't be 'gfx942:xnack-'"),
        ({"device_names": "RTX"}, "device_names can't be 'RTX': it must be a list of texts"),
        ({"device_names": [3]}, r"device_names can't be \[3\]"),
        ({"more": 1}, "there is no more; a profile has name, memory_bytes"),
        ({"source": ""}, "source can't be ''"),
        ({"source": {"memory_bytes": 1}}, "source can't be .*: it must be a text, or an object"),
        ({"source": {"memory_bytes": "x"}}, "source must have a text for each of attained_att"),
        ({"documented": []}, "documented must be an object with exactly columns, tables"),
        ({"documented": {"columns": [1], "tables": []}}, r"columns can't be \[1\]"),
        ({"documented": {"columns": [], "tables": {}}}, "tables can't be {}"),
        ({"documented": {"columns": [], "tables": [1]}}, "a table must be an object with exactly"),
        (
            {"documented": {"columns": [], "tables": [{"title": "", "rows": []}]}},
            "title can't be ''",
        ),
        (
            {"documented": {"columns": [], "tables": [{"title": "t", "rows": 1}]}},
            "rows can't be 1",
        ),
        (
            {"documented": {"columns": [], "tables": [{"title": "t", "rows": [{}]}]}},
            "a row must be an object with exactly settings, max_input_image_size",
        ),
        (documented(settings=""), "settings can't be ''"),
        (documented(height=1000), "height can't be 1000: it must be a positive multiple of 16"),
        (documented(width=True), "width can't be True"),
        (documented(max_input_image_size=0), "max_input_image_size can't be 0"),
        (documented(offload_model=1), "offload_model can't be 1: it must be true or false"),
        (documented(cells=["9G, 7s"]), "cells can't be .*: it must be 2 texts like"),
        (documented(cells=["9G, 7s", "9GB"]), "cells can't be"),
        (documented(cells=["9G, 7s", 9]), "cells can't be"),
    ],
)
def test_bad_values(tmp_path, changes, match):
    path = write(tmp_path, {**GOOD, **changes})
    with pytest.raises(ProfileError, match=match) as caught:
        profiles.load(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", LEAST)
def test_a_missing_figure(tmp_path, key):
    values = {one: GOOD[one] for one in GOOD if one != key}
    with pytest.raises(ProfileError, match=f": {key} must be given"):
        profiles.load(write(tmp_path, values))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("text", "is not JSON: Expecting value"),
        ("", "is not JSON: Expecting value"),
        ("[" * 100_000, "is not JSON: "),
        ('{"name": "a", "name": "b"}', "is not JSON: 'name' is given twice"),
        ("[]", "a profile is an object with name, memory_bytes"),
        ("null", "a profile is an object"),
        ("{}", "name, memory_bytes, .*, source must be given"),
    ],
    ids=["text", "empty", "deep", "twice", "list", "null", "nothing"],
)
def test_bad_files(tmp_path, text, match):
    with pytest.raises(ProfileError, match=match) as caught:
        profiles.load(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path):
    shipped = ", ".join(profiles.names())
    with pytest.raises(ProfileError, match=f"no profile 'rtx9999': give a file, or .* {shipped}"):
        profiles.load("rtx9999")
    with pytest.raises(ProfileError, match="no profile"):
        profiles.load(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match="is not JSON: 'utf-8' codec"):
        profiles.load(tmp_path / "bytes")


def test_predictions_say_that_they_are():
    command = [sys.executable, ROOT / "bench/kernels/predict.py", "h200", "rtx3090"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    first, head, *rows = result.stdout.splitlines()
    assert first.startswith("PREDICTED, not measured")
    assert "H200" in head and "RTX 3090" in head
    found = {row.split()[0]: [float(cell) for cell in row.split()[1:]] for row in rows}
    assert {"attention_step", "rms_norm", "swiglu"} <= found.keys()
    # 1.0426 TFLOP of attention at 460 and at 66 TFLOP/s
    assert found["attention_step"] == pytest.approx([2266.6, 15797.3], rel=1e-3)
    # 151 MB at 85 % of 4.8 TB/s
    assert found["rms_norm"][0] == pytest.approx(37.0, rel=1e-2)
