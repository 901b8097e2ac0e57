"""`omnigen-fast env`: what is installed, which devices there are, and which one will be used."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator

import click

from .. import __version__

_PACKAGES = ("torch", "triton", "safetensors", "tokenizers", "diffusers", "pillow")


@click.command()
def env() -> None:
    """Prints versions and devices, and what will run where."""
    for line in versions():
        click.echo(line)
    import torch  # after the versions, which are there even if this fails

    from ..memory.device import capability_of
    from ..pipeline import check_device

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            props = torch.cuda.get_device_properties(index)
            click.echo(
                f"cuda:{index}        {props.name}, {props.total_memory / 1e9:.1f} GB, "
                f"capability {capability_of(torch.device('cuda', index))}"
            )
    else:
        click.echo(f"cpu           {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    click.echo(f"will run on   {check_device(None)}, transformer in bfloat16, VAE in float32")


def versions() -> Iterator[str]:
    """A line for each program and package that matters."""
    from importlib.metadata import PackageNotFoundError, version

    yield f"omnigen_fast  {__version__}"
    yield f"python        {platform.python_version()} on {platform.platform()}"
    for package in _PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        yield f"{package:<13} {found}"
