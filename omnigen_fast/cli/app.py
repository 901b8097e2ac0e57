"""`omnigen-fast app`: the page in the browser."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import OmniGenError
from .failure import failure
from .files import UserPath
from .generate import parse_loras
from .loading import loading_options
from .process import die_of


@click.command()
@loading_options()
@click.option(
    "--memory",
    default="auto",
    show_default=True,
    help="Device memory to use at most: auto, 8GiB, ... Visitors may choose less.",
)
@click.option(
    "--lora",
    multiple=True,
    help="LoRA that visitors can choose: FILE, FOLDER, hub id or LORA:WEIGHT. May be repeated.",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address of this machine to listen at."
)
@click.option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    help="A name that the page answers to, besides --host and localhost. May be repeated.",
)
@click.option(
    "--port", type=click.IntRange(1, 65535), help="By default the first free one from 7860."
)
@click.option(
    "--auth",
    type=UserPath(path_type=Path),
    help="File of user:password lines; default: those in the variable OMNIGEN_PAGE_AUTH.",
)
@click.option("--share", is_flag=True, help="Also create a public link through Gradio's server.")
@click.option(
    "--out-dir",
    default="omnigen-pictures",
    show_default=True,
    type=UserPath(path_type=Path),
    help="Folder for pictures.",
)
def app(
    model: str,
    vae_path: str | None,
    revision: str | None,
    cache_dir: str | None,
    device: str | None,
    dtype: str,
    weights: str | None,
    compute: str | None,
    cache: str | None,
    attention: str,
    vae_dtype: str,
    compile: bool | None,
    local_files_only: bool,
    memory: str,
    lora: tuple[str, ...],
    host: str,
    allowed_hosts: tuple[str, ...],
    port: int | None,
    auth: Path | None,
    share: bool,
    out_dir: Path,
) -> None:
    """Serves a page for making images, on 127.0.0.1 only unless --host or --share is given."""
    try:
        from ..page.serve import serve
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "gradio":
            raise
        message = "the page needs gradio; install it with: pip install 'omnigen_fast[app]'"
        raise failure(OmniGenError(message)) from error
    try:
        number = serve(
            model,
            {"device": device, "dtype": dtype, "weights": weights, "compute": compute}
            | {"cache": cache, "attention": attention, "vae_dtype": vae_dtype}
            | {"compile": compile, "vae_path": vae_path}
            | {"revision": revision, "cache_dir": cache_dir, "memory": memory}
            | {"local_files_only": local_files_only},
            host,
            port,
            allowed_hosts,
            share,
            out_dir,
            parse_loras(lora),
            auth,
        )
    except (OmniGenError, OSError) as error:
        raise failure(error) from error
    if number is not None:
        die_of(number)
