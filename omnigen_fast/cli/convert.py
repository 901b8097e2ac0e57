"""`omnigen-fast convert`: writes a model that others have stored as a folder that loads here."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from ..errors import OmniGenError
from .failure import failure


@click.command()
@click.argument("model")
@click.argument("out")
@click.option(
    "--dtype",
    type=click.Choice(("bfloat16", "float16", "float32")),
    default="bfloat16",
    show_default=True,
    help="Of the written weights.",
)
@click.option(
    "--base", help="Folder or hub id of a model; supplies what is missing beside the weights."
)
@click.option("--vae-path", help="Folder, .safetensors file or hub id of the VAE.")
def convert(model: str, out: str, dtype: str, base: str | None, vae_path: str | None) -> None:
    """Writes MODEL to the new folder OUT, which --model and from_pretrained load.

    MODEL is a folder, a .safetensors file, or a file of torch.save such as model.pt of the
    original's trainer. Pickles are read without running code. Weights may be in float8, with
    scales or without.
    """
    try:
        from .. import conversion

        with _stopped_by_signals():
            done = conversion.convert(
                os.path.expanduser(model),
                os.path.expanduser(out),
                conversion.DTYPES[dtype],
                base=_expanded(base),
                vae_path=_expanded(vae_path),
            )
        click.echo(
            f"{done.parameters / 1e6:,.1f} million parameters as {dtype}, with the VAE "
            f"{done.nbytes / 1e9:.3f} GB: {out}"
        )
    except (OmniGenError, OSError) as error:
        raise failure(error) from error


def _expanded(path: str | None) -> str | None:
    return None if path is None else os.path.expanduser(path)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP end the work as Ctrl-C does, so that nothing half stays."""

    def stop(number: int, _: Any) -> None:
        for one in kinds:
            signal.signal(one, signal.SIG_IGN)  # the second would interrupt the cleaning up
        raise SystemExit(128 + number)

    kinds = [signal.SIGTERM] + ([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])
    before = {one: signal.signal(one, stop) for one in kinds}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
