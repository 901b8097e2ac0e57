"""What `make test` leaves out, that nothing it runs costs too much, and that homes stay outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from omnigen_fast.cli import config_file

TESTS = Path(__file__).parent
CONFTEST = """
    import quick_tests

    def pytest_addoption(parser):
        parser.addoption("--limit", type=float)

    def pytest_configure(config):
        config.pluginmanager.register(quick_tests.Costs(config.getoption("--limit")))

    def pytest_collection_modifyitems(items):
        quick_tests.mark_slow(items)
"""
MARKS = "[pytest]\nmarkers =\n    slow:\n    slow_for(*patterns):\n    slow_except(*patterns):\n"
COSTLY = """
    import subprocess, sys, time
    import pytest

    SPEND = "import time\\nwhile time.process_time() < 0.6: pass"

    @pytest.mark.slow_except("2-*", "1-a")
    @pytest.mark.parametrize("name", ["a", "b"])
    @pytest.mark.parametrize("number", [1, 2])
    def test_of_many(number, name):
        pass

    @pytest.mark.slow_for("[23]*")
    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_of_few(number):
        pass

    @pytest.mark.slow
    def test_slow():
        exec(SPEND)

    def test_that_starts_a_process():
        subprocess.run([sys.executable, "-c", SPEND], check=True)

    def test_that_waits():
        time.sleep(0.6)

    @pytest.fixture(scope="module")
    def costly():
        exec(SPEND.replace("0.6", str(time.process_time() + 0.6)))

    def test_that_needs_much(costly):
        pass

    def test_that_finds_it(costly):
        pass
"""


def run(folder: Path, tests: str, *options: str) -> list[str]:
    """Lines that pytest prints of such tests."""
    for name, text in (("conftest.py", CONFTEST), ("test_these.py", tests)):
        (folder / name).write_text(textwrap.dedent(text))
    (folder / "pytest.ini").write_text(MARKS)
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return [*done.stdout.split("\n"), *done.stderr.split("\n")]


@pytest.mark.parametrize("processes", [(), ("-p", "xdist", "-n", "1")], ids=["one", "xdist"])
def test_a_test_that_costs_too_much_fails(processes, tmp_path):
    """In a process of its own, or by what it is the first to need; not one that waits."""
    lines = run(tmp_path, COSTLY, "--strict-markers", "--limit", "0.5", *processes)
    failed = sorted(line.split()[1] for line in lines if line.startswith("FAILED "))
    named = ["test_that_needs_much", "test_that_starts_a_process"]
    assert failed == [f"test_these.py::{name}" for name in named], lines
    said = "CPU seconds, and a test that is not marked as slow may take 0.5"
    assert any(said in line for line in lines), lines
    (total,) = [line for line in lines if line.endswith(" s are meant")]
    assert re.fullmatch(r"[1-9]\d* s of 8 tests; at most 450 s are meant", total)


def test_marks_name_parametrisations(tmp_path):
    lines = run(tmp_path, COSTLY, "-m", "not slow", "-k", "of_many or of_few or slow")
    passed = sorted(line.partition("::")[2] for line in lines if line.startswith("PASSED "))
    many = [f"test_of_many[{one}]" for one in ("1-a", "2-a", "2-b")]
    assert passed == ["test_of_few[1]", *many], lines


def test_what_marks_name_is_there(tmp_path):
    lines = run(tmp_path, COSTLY.replace("2-*", "3-*"))
    said = "ERROR: test_these.py::test_of_many: no parametrisation that a mark names: 3-*"
    assert said in lines, lines


def test_no_config_of_the_developers_own():
    """A command of a test, or of a process that it starts, finds none."""
    folder = Path(os.environ["XDG_CONFIG_HOME"])
    assert folder.is_dir() and Path.home() / ".config" != folder
    assert not config_file.default_path().exists()
    assert not list(folder.glob("omnigen*"))  # other libraries may keep theirs there
    if sys.platform == "linux":
        assert folder in config_file.default_path().parents
