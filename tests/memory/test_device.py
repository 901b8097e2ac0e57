"""What a plan may use: what is free or the pipeline's own, and nothing else of the process."""

from __future__ import annotations

import functools
import multiprocessing
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from omnigen_fast import profiles
from omnigen_fast.memory import device
from omnigen_fast.memory.device import free_bytes, held_bytes, host_profile

CPU = torch.device("cpu")
MB = 10**6
NEAR = 8 * MB  # what the interpreter takes and gives back meanwhile
needs_proc = pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs /proc")


def anonymous_bytes() -> int:
    """What this process holds beside mapped files."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10


def in_a_new_process(function):
    """Runs a test there: one that has run other tests reuses memory that it once had."""

    @functools.wraps(function)
    def test():
        child = multiprocessing.get_context("spawn").Process(target=_run, args=(test.__name__,))
        child.start()
        child.join(300)
        if child.is_alive():
            child.kill()
        assert child.exitcode == 0

    test.inside = function
    return test


def _run(name: str) -> None:
    globals()[name].inside()


def alone() -> None:
    """From here on the host has 64 GiB, and no other process uses them."""
    device._host_bytes = lambda: 64 << 30
    device.free_host_bytes = lambda: (32 << 30) - anonymous_bytes()


def free(held=0) -> int:
    return free_bytes(CPU, profiles.load("cpu"), held)


@needs_proc
@in_a_new_process
def test_arrays_of_the_caller_are_not_free():
    alone()
    before = free()
    array = np.ones(300 * MB, np.uint8)
    assert before - free() == pytest.approx(array.nbytes, abs=NEAR)
    del array
    assert free() == pytest.approx(before, abs=NEAR)


@needs_proc
@in_a_new_process
def test_another_model_is_not_ours():
    alone()
    before = free()
    ours = [torch.ones(50 * MB // 4) for _ in range(2)]
    assert free(held_bytes(ours)) == pytest.approx(before, abs=NEAR)
    others = [torch.ones(50 * MB // 4) for _ in range(3)]
    assert before - free(held_bytes(ours)) == pytest.approx(150 * MB, abs=NEAR)
    assert sum(one.nbytes for one in others) == 150 * MB


def test_two_pipelines(load_pipe):
    """Each holds its own weights, whatever the other holds."""
    first = load_pipe(dtype="bfloat16")  # converted: the file's own dtype stays mapped
    alone_held = held_bytes(first.model.parameters())
    second = load_pipe(dtype="bfloat16")
    assert held_bytes(first.model.parameters()) == alone_held > 0
    both = [*first.model.parameters(), *second.model.parameters()]
    assert held_bytes(both) == pytest.approx(2 * alone_held, rel=0.01)


@needs_proc
def test_mapped_files_are_not_held(tmp_path):
    """Their pages are available already; a converted copy is not."""
    save_file({"a": torch.ones(MB), "b": torch.ones(MB)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        mapped = [file.get_tensor(name) for name in ("a", "b")]
    assert sum(map(float, (one.sum() for one in mapped))) == 2 * MB  # every page is read
    assert held_bytes(mapped) == 0
    converted = [one.to(torch.bfloat16) for one in mapped]
    assert held_bytes([*mapped, *converted]) == 4 * MB


@needs_proc
@in_a_new_process
def test_memory_that_nobody_wrote_is_not_held():
    """A cache takes its room only as its rows are written."""
    cache = torch.empty(64, MB)
    assert held_bytes([cache]) < 2 * MB
    cache[:4] = 1
    assert held_bytes([cache]) == pytest.approx(16 * MB, abs=2 * MB)


def test_a_storage_counts_once():
    block = torch.ones(MB)
    assert held_bytes([block, block[: MB // 2], block.view(1000, 1000), block]) == 4 * MB
    assert held_bytes(one for one in (block, torch.ones(MB))) == 8 * MB
    assert held_bytes([torch.ones(10), torch.empty(0), torch.empty(MB, device="meta")]) == 40
    assert held_bytes([]) == 0


def test_tensors_on_other_devices_do_not_count():
    block = torch.ones(MB)
    assert held_bytes([block], CPU) == 4 * MB
    assert held_bytes([block], torch.device("cuda", 0)) == 0


def test_without_proc_all_count(monkeypatch):
    def absent(*args, **kwargs):
        raise OSError

    monkeypatch.setattr(device.Path, "read_text", absent)
    monkeypatch.setattr(device, "open", absent, raising=False)
    assert held_bytes([torch.empty(64, MB)]) == 256 * MB


@pytest.mark.parametrize("held", [0, 7 << 30])
def test_free_memory_of_a_gpu(monkeypatch, held):
    """Another pipeline's 20 GiB are neither free nor ours; cached blocks can be used again."""
    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 27 * gib)
    profile = profiles.load("a800")
    margin = 80 * gib - device.less_margin(80 * gib)
    expected = (40 + 3) * gib + held + round(profile.context_bytes) - margin
    assert free_bytes(SimpleNamespace(type="cuda"), profile, held) == expected


def test_never_more_than_the_device_less_its_margin(monkeypatch):
    monkeypatch.setattr(device, "_host_bytes", lambda: 8 << 30)
    monkeypatch.setattr(device, "free_host_bytes", lambda: 8 << 30)
    assert free() == free(1 << 30) == device.less_margin(8 << 30)
    monkeypatch.setattr(device, "free_host_bytes", lambda: 0)
    assert free_bytes(CPU, SimpleNamespace(context_bytes=1e6)) == 0


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("flags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n", "CPU with AMX"),
        ("flags\t\t: fpu sse avx512_bf16\n", "CPU with AVX512-bf16"),
        ("flags\t\t: fpu sse avx2\n", "CPU"),
        ("vmx flags\t: amx_bf16\nflags\t\t: fpu\n", "CPU"),
        ("Features\t: fp asimd bf16\n", "CPU"),
        (None, "CPU"),
    ],
)
def test_a_processor_is_named_by_its_own_instructions(tmp_path, text, name):
    if text is not None:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\n{text}bugs\t\t: none\n")
    profile = host_profile(tmp_path)
    assert profile.name == f"{name} (rates of a two-core Xeon)"
    assert profile.on_host
