"""The harness finds what it is made to find, and makes an input twice alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fuzz import runner
from fuzz.faulty import FAULTS
from fuzz.kinds import KINDS, generator, load, shares

FAULTY = "fuzz.faulty:Faulty"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What is reported of inputs each of which misbehaves in its own way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "HANGS", 3.0)
        return runner.fuzz({FAULTY: (0, len(FAULTS))}, seed=0, jobs=1)[FAULTY]


@pytest.mark.parametrize(
    ("number", "said"),
    [pytest.param(i, said, id=f"{i} {what}") for i, (what, said) in enumerate(FAULTS)],
)
def test_each_fault_is_reported(found, number, said):
    reported = [fault["what"] for fault in found.faults if fault["number"] == number]
    assert len(reported) == bool(said)
    assert all(said in what for what in reported)


def test_inputs_are_counted_once(found):
    faults = sum(bool(said) for _, said in FAULTS)
    assert found.inputs == len(FAULTS)
    assert found.taken + found.refused + faults == len(FAULTS) + 1  # one is taken, and a fault
    assert found.slowest == (pytest.approx(0.6, abs=0.3), FAULTS.index(("sleeps", FAULTS[7][1])))
    assert found.largest[0] > 100_000_000 and FAULTS[found.largest[1]][0] == "eats"


def test_a_fault_fails_the_command_and_its_input_is_kept(tmp_path: Path):
    options = ["--kind", FAULTY, "--first", "2", "--number", "1", "--out", tmp_path]
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", *options],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert "1 x ValueError: not ours" in done.stdout
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert "ValueError: not ours" in (folder / "fault.txt").read_text()
    assert "raises" in (folder / "input.txt").read_text()
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["kinds"][FAULTY]["faults"][0]["number"] == 2


@pytest.mark.parametrize("name", KINDS)
def test_an_input_follows_from_its_number(name, tmp_path: Path):
    kinds = [load(name, _new(tmp_path / str(i))) for i in range(2)]
    for number in range(40):
        one, other = (repr(_plain(k.make(generator(name, 0, number), number))) for k in kinds)
        assert one == other
    # and others come from other numbers
    made = {repr(_plain(kinds[0].make(generator(name, 0, n), n))) for n in range(40)}
    assert len(made) > 30


def test_shares_add_up():
    assert shares(1000 * sum(share for _, share in KINDS.values())) == {
        kind: 1000 * share for kind, (_, share) in KINDS.items()
    }


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _plain(case):
    """An input as something whose repr says all."""
    if isinstance(case, tuple) and isinstance(case[0], np.ndarray):
        return case[0].dtype, case[0].shape, case[0].tolist(), case[1]
    return case
