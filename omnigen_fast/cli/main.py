"""The command line: making pictures, the page, plans, what is installed, and the benches."""

from __future__ import annotations

import os
import time
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click

from .. import __version__
from ..errors import OmniGenError, RequestError
from .files import _SUFFIXES, _check_writable, _Failure, _make_folder, _write
from .generate import generate, show
from .plan import plan


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="omnigen-fast")
def main() -> None:
    """Makes and edits images with OmniGen."""


@main.command()
@click.option("--model", default="shapes", show_default=True, help="Folder or hub id.")
@click.option(
    "--out",
    default="demo-output/sheet.png",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Sheet to write.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--device", help="cuda, cuda:1, cpu, ...; the current GPU if there is one.")
@click.option("--dtype", default="bfloat16", show_default=True, help="bfloat16 or float32.")
def demo(model: str, out: Path, seed: int, device: str | None, dtype: str) -> None:
    """Shows on one sheet what the small model that ships can do, and says what ran."""
    try:
        if out.suffix.lower() not in _SUFFIXES["pil"]:
            raise RequestError(f"--out must end in {' or '.join(_SUFFIXES['pil'])}, got {out}")
        _make_folder(out.parent)
        _check_writable(out)
        from ..page.demo import run, sheet
        from ..pipeline import OmniGenPipeline

        start = time.perf_counter()
        pipe = OmniGenPipeline.from_pretrained(model, device=device, dtype=dtype)
        results = run(pipe, click.echo, seed)
        _write(out, lambda path: sheet(results).save(path))
        click.echo(f"{len(results)} pictures in {time.perf_counter() - start:.1f} s: {out}")
    except (OmniGenError, OSError) as error:
        raise _Failure(error) from error


@main.command()
def env() -> None:
    """Says which versions and devices are here, and what will run."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    click.echo(f"omnigen_fast  {__version__}")
    click.echo(f"python        {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "triton", "safetensors", "tokenizers", "diffusers", "pillow"):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        click.echo(f"{package:<13} {found}")
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            props = torch.cuda.get_device_properties(index)
            click.echo(
                f"cuda:{index}        {props.name}, {props.total_memory / 1e9:.1f} GB, "
                f"capability {props.major}.{props.minor}"
            )
    else:
        click.echo(f"cpu           {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    from ..pipeline import _check_device

    click.echo(f"will run on   {_check_device(None)}, transformer in bfloat16, VAE in float32")


@main.command()
@click.option("--model", default="Shitao/OmniGen-v1", show_default=True, help="Folder or hub id.")
@click.option("--device", help="cuda, cuda:1, cpu, ...; the current GPU if there is one.")
@click.option("--dtype", default="bfloat16", show_default=True, help="bfloat16 or float32.")
@click.option("--local-files-only", is_flag=True, help="Do not ask the hub.")
@click.option("--port", type=click.IntRange(1, 65535), help="The first free one from 7860.")
@click.option("--share", is_flag=True, help="Also under a public address, through Gradio's server.")
@click.option(
    "--out-dir",
    default="omnigen-pictures",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Where pictures are saved.",
)
def app(out_dir: Path, port: int | None, share: bool, **loading: Any) -> None:
    """Opens a page in the browser for making images; for this machine alone unless --share."""
    try:
        from ..page.ui import serve
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "gradio":
            raise
        message = "the page needs gradio; install it with: pip install 'omnigen_fast[app]'"
        raise _Failure(OmniGenError(message)) from error
    try:
        serve(out_dir=out_dir, port=port, share=share, **loading)
    except (OmniGenError, OSError) as error:
        raise _Failure(error) from error


def _add_commands() -> None:
    """Joins the commands of this package and those that others bring, the benches among them."""
    for command in (generate, show, plan):
        main.add_command(command)
    for entry in entry_points(group="omnigen_fast.commands"):
        main.add_command(entry.load(), entry.name)


_add_commands()
