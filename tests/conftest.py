"""Shared by all tests: pipelines on the golden checkpoint."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import quick_tests
from golden_cases import TINY


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu-limit",
        type=float,
        metavar="SECONDS",
        help="CPU time that a test may take unless it is marked as slow; says what the tests took",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(quick_tests.Costs(config.getoption("--cpu-limit")))


@pytest.hookimpl(tryfirst=True)  # before pytest looks for what `-m` asks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks as slow what `slow_except` does not name, and takes the early files first.

    Processes that share the files then end at about the same time.
    """
    quick_tests.mark_slow(items)
    items.sort(key=lambda item: item.get_closest_marker("early") is None)


@pytest.fixture(scope="session", autouse=True)
def signals_that_nobody_ignores():
    """Processes that tests start heed signals, also where `nohup` or a shell's `&` started these.

    What is ignored here would be ignored in them; what is handled here is not.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


@pytest.fixture(scope="session", autouse=True)
def no_config_of_the_developers_own(tmp_path_factory):
    """Commands find no config file but a test's own, also in processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("XDG_CONFIG_HOME", "APPDATA"):
            patch.setenv(name, str(tmp_path_factory.mktemp("config")))
        yield


@pytest.fixture(scope="session")
def load_pipe():
    """Loads a pipeline on the golden checkpoint: `load_pipe(dtype="float32", ...)`."""
    from omnigen_fast import OmniGenPipeline

    def load(folder: Path = TINY, **arguments: Any) -> OmniGenPipeline:
        return OmniGenPipeline.from_pretrained(folder, **{"dtype": "float32", **arguments})

    return load


@pytest.fixture(scope="session")
def shared_pipe(load_pipe):
    """One float32 pipeline for all tests that change nothing but its cache."""
    return load_pipe()


@pytest.fixture
def pipe(shared_pipe):
    """The shared pipeline with nothing kept."""
    shared_pipe.clear_cache()
    return shared_pipe


@pytest.fixture(scope="session")
def diffusers_folder(tmp_path_factory) -> Path:
    """The golden checkpoint in diffusers' layout, written by diffusers' own classes."""
    from diffusers_models import write_folder

    return write_folder(tmp_path_factory.mktemp("diffusers"))


@pytest.fixture(scope="session")
def build(diffusers_folder):
    """Builds diffusers' own pipeline on the golden checkpoint, as it is without this project."""
    import torch
    from diffusers import OmniGenPipeline
    from diffusers_models import pipeline

    import omnigen_fast

    omnigen_fast.enable(OmniGenPipeline)  # torchvision may be missing

    def make(dtype: torch.dtype = torch.float32):
        return pipeline(diffusers_folder, dtype)

    yield make
    omnigen_fast.disable(OmniGenPipeline)
