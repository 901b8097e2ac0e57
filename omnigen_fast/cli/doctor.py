"""`omnigen-fast doctor`: what is here as `env` prints it, and what to do about each finding."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

import click

from ..errors import MemoryBudgetError, OmniGenError, first_line
from .config_file import default_path, read_config
from .env import versions

_RELEASED = "Shitao/OmniGen-v1"
_RELEASED_BYTES = 15_500_000_000  # of its files on the hub, in float32
_EXTRAS = {  # package that tells whether an extra is installed: what for
    "gradio": ("app", "the page (omnigen-fast app)"),
    "fastapi": ("serve", "the server (omnigen-fast serve)"),
    "gguf": ("gguf", "GGUF files (omnigen-fast convert)"),
}
_DRIVER, _AMD_DRIVER = "/proc/driver/nvidia/version", "/dev/kfd"
_OK, _NOTE, _PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """What was found, and what to do about it."""

    kind: str  # ok; note: something works in another way or not at all; problem: nothing runs
    text: str
    way_out: str = ""


@click.command()
@click.pass_context
def doctor(context: click.Context) -> None:
    """Prints what env does, checks what a picture needs, and says what to do.

    The exit status is 1 if there is a problem.
    """
    for line in versions():
        click.echo(line)
    click.echo(
        "\nok: as it should be; note: works otherwise, or not all of it; problem: stops you\n"
    )
    found = []
    root = context.find_root().command
    assert isinstance(root, click.Group)
    checks: list[Callable[[], Iterator[Finding]]] = [_packages, _device, _memory, _weights, _extras]
    for check in [*checks, lambda: _config(root)]:
        for one in _guarded(check):
            found.append(one)
            click.echo(f"{one.kind:<8} {one.text}")
            if one.way_out:
                click.echo(f"         -> {one.way_out}")
    sys.exit(1 if any(one.kind == _PROBLEM for one in found) else 0)


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check that fails is a finding, not the end."""
    try:
        yield from check()
    except Exception as error:  # of any kind: libraries that do not load raise their own
        name = getattr(check, "__name__", "check").strip("_")
        yield Finding(_PROBLEM, f"the check of {name} failed: {first_line(error)}")


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement  # huggingface_hub needs it

    wrong = 0
    for line in requires("omnigen_fast") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            found = None
        if found is None or not needed.specifier.contains(found, prereleases=True):
            wrong += 1
            what = "is not installed" if found is None else f"{found} is installed"
            wanted = f"{needed.name}{needed.specifier}"
            yield Finding(_PROBLEM, f"{needed.name} {what}", f"pip install '{wanted}'")
    if not wrong:
        yield Finding(_OK, "the packages have the versions that are supported")


def _device() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        from ..memory.device import capability_of, launch_entry, profile_of

        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            name = torch.cuda.get_device_name(device)
            yield Finding(_OK, f"cuda:{index}: {name}, predictions by {profile_of(device).name}")
            architecture = capability_of(device)
            if not architecture.startswith("gfx"):
                continue
            entry = launch_entry(architecture)
            if entry is None:
                yield Finding(
                    _NOTE,
                    f"cuda:{index}: there are no kernels for {architecture}; plain PyTorch runs",
                    "gfx90a, gfx94x, gfx95x, gfx11 and gfx12 have kernels",
                )
            else:
                yield Finding(
                    _NOTE,
                    f"cuda:{index}: the kernels are compiled for {entry}, but not run on a card",
                    "python -m bench.gpu_check compares their results with plain PyTorch's",
                )
        return
    if os.path.exists(_DRIVER) or shutil.which("nvidia-smi"):
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        yield Finding(
            _PROBLEM,
            f"an NVIDIA driver is here, but torch {torch.__version__}, built {built}, sees no GPU",
            "install the build of PyTorch for the driver's CUDA version; in a container, give it "
            "the GPU",
        )
    elif os.path.exists(_AMD_DRIVER):
        built = f"for ROCm {torch.version.hip}" if torch.version.hip else "without ROCm"
        yield Finding(
            _PROBLEM,
            f"an AMD driver is here, but torch {torch.__version__}, built {built}, sees no GPU",
            "install the build of PyTorch for the driver's ROCm version; in a container, give it "
            "/dev/kfd and /dev/dri",
        )
    elif torch.backends.mps.is_available():
        yield Finding(_OK, "Apple's GPU; the kernels are PyTorch's own")
    else:
        from ..memory.device import host_profile

        name = host_profile().name
        yield Finding(
            _NOTE,
            f"no GPU: pictures are made on the processor, {name.partition(' (')[0]}, "
            f"{os.cpu_count()} cores",
            "omnigen-fast plan predicts how long that takes; --model shapes is the small model",
        )
        if name.startswith("CPU ("):
            yield Finding(
                _NOTE,
                "the processor has no instructions for bfloat16",
                "--dtype float32 may be faster",
            )


def _memory() -> Iterator[Finding]:
    """Whether a picture of the released model fits."""
    from ..config import released_sizes
    from ..memory.autoencoder import VaeShape
    from ..memory.device import free_bytes, profile_of
    from ..memory.plan import typical_workload
    from ..memory.planner import gigabytes, plan
    from ..pipeline import check_device
    from ..precision import Precision

    device = check_device(None)
    profile = profile_of(device)
    free = free_bytes(device, profile)
    workload, precision = typical_workload(1024, 1024), Precision.of("bfloat16")
    try:
        chosen = plan(
            *(released_sizes(), VaeShape(), precision, workload, profile, free), kept_bytes=0
        )
    except MemoryBudgetError as error:
        yield Finding(
            _NOTE,
            f"a picture of 1024 px of {_RELEASED} takes at least {gigabytes(error.least_bytes)}, "
            f"{gigabytes(free)} of {device} can be used",
            "end other programs, or make smaller pictures (--size 512)",
        )
        return
    yield Finding(
        _OK,
        f"a picture of 1024 px of {_RELEASED} takes {gigabytes(chosen.cost.peak_bytes)} of "
        f"{gigabytes(free)} of {device} (predicted): {chosen.describe(chosen.plan)}",
    )


def _weights() -> Iterator[Finding]:
    """Whether the released weights are here, or there is room for them."""
    from huggingface_hub import constants

    folder = os.path.join(constants.HF_HUB_CACHE, f"models--{_RELEASED.replace('/', '--')}")
    if os.path.isdir(os.path.join(folder, "snapshots")):
        yield Finding(_OK, f"{_RELEASED} was downloaded to {folder}")
        return
    place = constants.HF_HUB_CACHE
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free
    size = f"{_RELEASED_BYTES / 1e9:.1f} GB"
    if free < _RELEASED_BYTES:
        yield Finding(
            _NOTE,
            f"{_RELEASED} takes {size}, {free / 1e9:.1f} GB are free in {constants.HF_HUB_CACHE}",
            "set HF_HOME to a folder on a larger disk, or give --cache-dir",
        )
    elif constants.HF_HUB_OFFLINE:
        yield Finding(
            _NOTE,
            f"{_RELEASED} is not here, and HF_HUB_OFFLINE forbids to fetch it",
            "unset HF_HUB_OFFLINE, or give the folder of a model as --model",
        )
    else:
        yield Finding(
            _NOTE,
            f"{_RELEASED} is not here",
            f"the first picture downloads {size} to {constants.HF_HUB_CACHE}; --model shapes needs "
            "no download",
        )


def _extras() -> Iterator[Finding]:
    for package, (extra, purpose) in _EXTRAS.items():
        try:
            version(package)
        except PackageNotFoundError:
            way_out = f"pip install 'omnigen_fast[{extra}]'"
            yield Finding(_NOTE, f"{purpose}: {package} is not installed", way_out)


def _config(root: click.Group) -> Iterator[Finding]:
    path = default_path()
    try:
        read_config(None, root)
    except OmniGenError as error:
        yield Finding(_PROBLEM, str(error), "correct or remove the file")
        return
    yield Finding(_OK, f"config file: {path}" if path.is_file() else f"no config file ({path})")
