"""`omnigen-fast convert`: writes a model that others have stored as a folder that loads here."""

from __future__ import annotations

import click

from ..errors import OmniGenError
from ..precision import STORAGES
from .failure import failure
from .files import PATH_OR_NAME


@click.command()
@click.argument("model", type=PATH_OR_NAME)
@click.argument("out", type=PATH_OR_NAME)
@click.option(
    "--dtype",
    type=click.Choice(("bfloat16", "float16", "float32")),
    default="bfloat16",
    show_default=True,
    help="Of the written weights.",
)
@click.option(
    "--weights",
    type=click.Choice(STORAGES),
    default="bfloat16",
    show_default=True,
    help="How the matrices of the layers are written; bfloat16: plain, in --dtype.",
)
@click.option(
    "--base",
    type=PATH_OR_NAME,
    help="Folder or hub id of a model; supplies what is missing beside the weights.",
)
@click.option(
    "--vae-path", type=PATH_OR_NAME, help="Folder, .safetensors file or hub id of the VAE."
)
def convert(
    model: str, out: str, dtype: str, weights: str, base: str | None, vae_path: str | None
) -> None:
    """Writes MODEL to the new folder OUT, which --model and from_pretrained load.

    MODEL is a folder, a .safetensors or .gguf file, or a file of torch.save such as model.pt of
    the original's trainer. Pickles are read without running code. Weights may be in float8, with
    scales or without.
    """
    try:
        from .. import conversion

        kind = conversion.DTYPES[dtype]
        form = None if weights == "bfloat16" else weights
        done = conversion.convert(model, out, kind, weights=form, base=base, vae_path=vae_path)
        click.echo(
            f"{done.parameters / 1e6:,.1f} million parameters as {form or dtype}, with the VAE "
            f"{done.nbytes / 1e9:.3f} GB: {out}"
        )
    except (OmniGenError, OSError) as error:
        raise failure(error) from error
