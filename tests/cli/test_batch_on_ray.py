"""Batches on Ray, as far as they need no Ray: make test-ray has the rest."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from batch_cases import EDIT, defaults, made, prompts, write

from omnigen_fast.batch import on_ray
from omnigen_fast.batch.lines import Source
from omnigen_fast.batch.results import Earlier
from omnigen_fast.errors import OmniGenError
from omnigen_fast.page.record import Record

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture(autouse=True)
def installed(monkeypatch) -> set[str]:
    """Packages that can be found, besides those that are there."""
    found, names = importlib.util.find_spec, {"ray"}

    def find(name, *rest):
        if name in ("ray", "pyarrow"):
            return found("json") if name in names else None
        return found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    return names


def test_says_what_to_install(installed):
    installed.clear()
    write(*prompts(1))
    line = made("--ray", "local", code=1)
    assert line == "Error: --ray needs Ray; install it with: pip install 'omnigen_fast[ray]'"
    line = made("--results", "a.parquet", code=1)
    assert line == "Error: --results needs pyarrow; install it with: pip install pyarrow"
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ray", "ray://a:1"], "--ray ray://a:1 is a Ray client's address"),
        (["--ray", "auto", "--device", "cuda:1"], "--device must be cuda or cpu, got cuda:1"),
        (["--ray-actors", "2"], "--ray-actors is for a batch on Ray"),
        (["--results", "a.csv"], "--results a.csv must end in .parquet"),
    ],
    ids=lambda one: one[0] if isinstance(one, list) else "",
)
def test_what_can_not_be_used(options, message):
    write(*prompts(1))
    assert message in made(*options, code=2)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("actors", "device", "nodes", "expected"),
    [
        (None, None, [{"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 1}], (5, 1, 1)),
        (2, None, [{"CPU": 8, "GPU": 4}], (2, 1, 1)),
        (9, "cuda", [{"CPU": 8, "GPU": 4}], (4, 1, 1)),
        (None, "cpu", [{"CPU": 8, "GPU": 4}, {"CPU": 4}], (2, 0, 4)),
        (None, None, [{"CPU": 2}], (1, 0, 2)),
        (2, None, [{"CPU": 2}], (2, 0, 1)),
        (9, None, [{"CPU": 2}, {}], (2, 0, 1)),
        (1, None, [{"CPU": 16}, {"CPU": 2}], (1, 0, 2)),
    ],
    ids=str,
)
def test_what_each_actor_gets(actors, device, nodes, expected):
    """Actors, GPUs and CPUs of each."""
    alive = [{"Alive": True, "Resources": one} for one in nodes]
    lost = {"Alive": False, "Resources": {"CPU": 99, "GPU": 99}}
    cluster = on_ray.Cluster("auto", actors, device)
    count, resources = on_ray._shares(cluster, [*alive, lost])
    assert (count, resources.get("num_gpus", 0), resources["num_cpus"]) == expected


@pytest.mark.parametrize(
    ("device", "nodes", "message"),
    [("cuda", [{"CPU": 2}], "no GPU; leave it out"), (None, [{}], "has no CPU to run on")],
)
def test_clusters_that_have_too_little(device, nodes, message):
    with pytest.raises(OmniGenError, match=message):
        on_ray._shares(
            on_ray.Cluster("auto", None, device),
            [{"Alive": True, "Resources": one} for one in nodes],
        )


def test_what_the_reading_task_passes_on(tmp_path, monkeypatch):
    """Portions of like lines with their files, which stay small; what is known by number."""
    monkeypatch.setattr(on_ray, "_PORTION_BYTES", 100)
    for name, size in {"a": 60, "b": 60, "c": 10}.items():
        Path(f"{name}.png").write_bytes(name.encode() * size)
    os.mkdir("folder.png")
    names = ["a", "b", "c", "folder", "gone"]
    edits = [{"prompt": EDIT, "input_images": [f"{name}.png"]} for name in names]
    write(*prompts(2), b"broken", *edits)
    Path("out").mkdir()
    out = (tmp_path / "out").absolute()
    source = Source(tmp_path, out, Record("m", (), (), None, {}), defaults())
    reader = on_ray._Reader(Path("in.jsonl"), source, Earlier(out, {}), False, frozenset({1, 99}))
    found = [block["portion"].item() for block in reader(None)]
    assert [one.number for one in found] == list(range(len(found)))
    assert [one.is_last for one in found] == [False] * (len(found) - 1) + [True]
    assert [[job.number for job in one.jobs] for one in found] == [[2, 4], [5, 6, 8], []]
    files = [{os.path.basename(name) for name in one.files} for one in found]
    assert files == [{"a.png"}, {"b.png", "c.png"}, set()]
    passed = {number: entry for one in found for number, _, entry in one.passed}
    assert passed.keys() == {3, 7}
    assert "the line is not JSON" in passed[3].error
    assert "it is a folder, not a regular file" in passed[7].error
