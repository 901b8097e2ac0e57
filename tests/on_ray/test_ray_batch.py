"""A batch on a cluster of this machine: workers and nodes die, and the folder is as without Ray."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from golden_cases import GOLDEN, TINY
from PIL import Image

from omnigen_fast.page.record import read_record

SECONDS = 200  # that anything may take
EDIT = "<img><|image_1|></img> at night"
MODEL = ["--model", str(TINY), "--device", "cpu", "--dtype", "float32"]
SMALL = [*MODEL, "--height", "32", "--steps", "1", "--max-input-image-size", "32", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Batch files with their images, and what this process makes of them without Ray."""
    folder = tmp_path_factory.mktemp("batch")
    cats = [{"prompt": f"Cat {i}.", "seed": i, "width": 32 + 16 * (i % 3)} for i in range(198)]
    (folder / "cat.png").write_bytes((GOLDEN / "images/cat.png").read_bytes())
    Image.new("L", (32, 32), 255).save(folder / "mask.png")
    (folder / "bad.png").write_bytes(b"bad")
    edit = {"prompt": EDIT, "input_images": ["cat.png"], "width": 32, "seed": 1}
    mask = {"input_images": ["mask.png"], "mask_image": "mask.png"}
    write(folder / "good.jsonl", [*cats, {"id": "edit", **edit}, {"id": "masked", **edit, **mask}])
    odd: list[Any] = [
        {"id": "two", "prompt": "Two.", "width": 32, "num_images_per_prompt": 2, "seed": 1},
        "no object",
        {"id": "gone", **edit, "input_images": ["gone.png"]},
        {"id": "bad", **edit, "input_images": ["bad.png"]},
        {"id": "array", "prompt": "A cat.", "width": 32, "output_type": "np", "seed": 1},
        {"id": "size", "prompt": "A cat.", "height": 33},
    ]
    write(folder / "odd.jsonl", odd)
    for name in ("good", "odd"):
        done = subprocess.run(command(folder, name, name), capture_output=True, timeout=SECONDS)
        assert done.returncode == (name == "odd"), done.stderr
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two machines, as far as Ray knows; its address is for this user alone."""
    names = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on loopback alone
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in names.items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 1, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield made
        finally:
            made.shutdown()


def write(path: Path, lines: list[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def command(folder: Path, name: str, out: str, *options: str) -> list[str]:
    files = [str(folder / f"{name}.jsonl"), str(folder / out)]
    return [sys.executable, "-m", "omnigen_fast", "batch", *files, *SMALL, *options]


def entries(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def count(folder: Path) -> int:
    path = folder / "results.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def actors(
    process: subprocess.Popen[str], but: psutil.Process | None = None
) -> list[psutil.Process]:
    """Workers that keep a model, without one."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            is_actor = "_Actor" in "".join(child.cmdline())
        except psutil.Error:  # it has just ended
            continue
        if is_actor and child != but and child.status() != psutil.STATUS_ZOMBIE:
            found.append(child)
    return found


def wait_for(process: subprocess.Popen[str], condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def without_seconds(one: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in one.items() if key != "seconds"}


def check_same(folder: Path, expected: Path) -> None:
    """The files of a folder, byte for byte, and one entry for each line."""
    names = sorted(set(os.listdir(expected)) - {"results.jsonl"})
    assert sorted(set(os.listdir(folder)) - {"results.jsonl"}) == names
    for name in names:
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
    found = sorted(map(without_seconds, entries(folder)), key=lambda one: one["line"])
    assert found == sorted(map(without_seconds, entries(expected)), key=lambda one: one["line"])


def listening(process: subprocess.Popen[str]) -> set[str]:
    """Addresses at which a process and its children listen."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    found = set()
    for one in family:
        try:
            connections = one.net_connections("inet")
        except psutil.Error:
            continue
        found |= {each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN}
    return found


def test_two_actors_are_killed(folder):
    """The 200 pictures are there, with the bytes that the process itself makes, each once."""
    options = ["--ray", "local", "--ray-actors", "2"]
    process = subprocess.Popen(
        command(folder, "good", "killed", *options), text=True, stdout=-1, stderr=-1
    )
    try:
        out = folder / "killed"
        first = wait_for(process, lambda: count(out) >= 5 and actors(process))[0]
        first.kill()
        second = wait_for(process, lambda: count(out) >= 70 and actors(process, first))[0]
        second.kill()
        assert count(out) < 200
        assert listening(process) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        said, complaints = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 0, complaints
    assert said == f"200 done: {out}/results.jsonl\n"
    check_same(out, folder / "good")
    assert read_record(str(out / "edit.png")).input_images[0][0].path == "../cat.png"


def test_a_node_is_lost_and_the_command_interrupted(folder, cluster):
    """On a cluster that runs already; the same command goes on, in this process or there."""
    node = cluster.add_node(num_cpus=1)
    options = ["--ray", cluster.address, "--ray-actors", "2"]
    out = folder / "lost"
    process = subprocess.Popen(
        command(folder, "good", "lost", *options), text=True, stdout=-1, stderr=-1
    )
    try:
        wait_for(process, lambda: count(out) >= 20)
        cluster.remove_node(node, allow_graceful=False)
        before = count(out)
        wait_for(process, lambda: count(out) >= before + 30)
        process.send_signal(2)
        _, complaints = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == 130, complaints
    assert complaints.endswith("interrupted; the same command goes on from here\n")
    done = count(out)
    assert 50 <= done < 200
    again = subprocess.run(
        command(folder, "good", "lost", "--ray", cluster.address),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout == f"200 done ({done} of them before): {out}/results.jsonl\n"
    assert [len(entries(out)), len({one["line"] for one in entries(out)})] == [200, 200]
    # groups of lines differ from those of a run without interruption, so pictures may by rounding
    names = sorted(os.listdir(folder / "good"))
    assert sorted(os.listdir(out)) == names
    for name in set(names) - {"results.jsonl"}:
        pair = [np.array(Image.open(one / name), dtype=int) for one in (out, folder / "good")]
        assert np.abs(pair[0] - pair[1]).max() <= 1, name


def test_odd_lines_and_a_table(folder, cluster):
    """Lines that fail, as without Ray; what became of each also as Parquet."""
    import pyarrow.parquet as pq

    table = folder / "odd.parquet"
    options = ["--ray", cluster.address, "--results", str(table)]
    done = subprocess.run(
        command(folder, "odd", "odd-on-ray", *options),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == f"2 done, 4 failed: {folder}/odd-on-ray/results.jsonl\n"
    assert done.stderr == ""
    check_same(folder / "odd-on-ray", folder / "odd")
    rows = pq.read_table(table).to_pylist()
    assert rows == sorted(entries(folder / "odd-on-ray"), key=lambda one: one["line"])
    wrong = command(folder, "odd", "none", "--ray", cluster.address)
    wrong[wrong.index(str(TINY))] = str(folder)
    failed = subprocess.run(wrong, capture_output=True, text=True, timeout=SECONDS)
    assert failed.returncode == 1
    (*_, last) = failed.stderr.splitlines()  # Ray says in front that its actors end
    way_out = "give the folder of a model, or a hub id (owner/name)"
    assert last == f"Error: {folder} has no model.safetensors; {way_out}"
