"""`omnigen-fast demo`: a sheet of what the bundled model can do."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ..errors import OmniGenError, RequestError
from ..whole_files import write_whole
from .failure import failure
from .files import IMAGE_SUFFIXES, PATH_OR_NAME, UserPath, check_writable, make_folder


@click.command()
@click.option(
    "--model", default="shapes", show_default=True, type=PATH_OR_NAME, help="Folder or hub id."
)
@click.option(
    "--out",
    default="demo-output/sheet.png",
    show_default=True,
    type=UserPath(path_type=Path),
    help="Image file to write.",
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--device", help="cuda, cuda:1, cpu, ...; the current GPU if there is one.")
@click.option("--dtype", default="bfloat16", show_default=True, help="bfloat16 or float32.")
def demo(model: str, out: Path, seed: int, device: str | None, dtype: str) -> None:
    """Makes a sheet of what the bundled small model can do, and reports what ran."""
    try:
        if out.suffix.lower() not in IMAGE_SUFFIXES:
            raise RequestError(f"--out must end in {' or '.join(IMAGE_SUFFIXES)}, got {out}")
        make_folder(out.parent)
        check_writable(out)
        from ..page.demo import run, sheet
        from ..pipeline import OmniGenPipeline

        start = time.perf_counter()
        pipe = OmniGenPipeline.from_pretrained(model, device=device, dtype=dtype)
        results = run(pipe, click.echo, seed)
        write_whole(out, lambda path: sheet(results).save(path))
        click.echo(f"{len(results)} pictures in {time.perf_counter() - start:.1f} s: {out}")
    except (OmniGenError, OSError) as error:
        raise failure(error) from error
