"""`omnigen-fast app`: the page in the browser."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import OmniGenError
from .failure import failure
from .files import UserPath
from .loading import loading_options
from .process import die_of


@click.command()
@loading_options("vae_path", "revision", "cache_dir")
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
    device: str | None,
    dtype: str,
    weights: str | None,
    compute: str | None,
    cache: str | None,
    attention: str,
    vae_dtype: str,
    compile: bool | None,
    local_files_only: bool,
    host: str,
    allowed_hosts: tuple[str, ...],
    port: int | None,
    share: bool,
    out_dir: Path,
) -> None:
    """Serves a page for making images, on 127.0.0.1 only unless --host or --share is given."""
    try:
        from ..page.ui import serve
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "gradio":
            raise
        message = "the page needs gradio; install it with: pip install 'omnigen_fast[app]'"
        raise failure(OmniGenError(message)) from error
    try:
        number = serve(
            model,
            {"device": device, "dtype": dtype, "weights": weights, "compute": compute}
            | {"cache": cache, "attention": attention, "vae_dtype": vae_dtype, "compile": compile}
            | {"local_files_only": local_files_only},
            host,
            port,
            allowed_hosts,
            share,
            out_dir,
        )
    except (OmniGenError, OSError) as error:
        raise failure(error) from error
    if number is not None:
        die_of(number)
