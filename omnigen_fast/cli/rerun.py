"""--from: what the request in a picture may decide, and what its caller must confirm."""

from __future__ import annotations

import shlex

from ..errors import RequestError
from ..page.record import Record, printable


def check_rerun(
    record: Record,
    picture: str,
    given: set[str],
    model: str | None,
    trusts_images: bool,
) -> None:
    """Raises RequestError if the record names files that the caller has not confirmed.

    A picture must not choose which files are opened.

    Args:
        record: of the picture.
        picture: its file.
        given: options on the command line.
        model: the model on the command line.
        trusts_images: whether to open the recorded input images.
    """
    needed = [] if model is not None else [("model", record.model)]
    if model in (None, record.model):
        if "vae_path" not in given and record.vae_path is not None:
            needed.append(("vae-path", record.vae_path))
        if "revision" not in given and record.revision is not None:
            needed.append(("revision", record.revision))
    if "lora" not in given:
        needed += [("lora", lora) for lora in record.loras]
    if "latents" not in given and record.latents is not None:
        needed.append(("latents", record.latents.path_from(picture)))
    if not trusts_images and "input_images" not in given:
        several = len(record.prompts) > 1
        needed += [
            ("image", f"{i}:" * several + image.path_from(picture))
            for i, images in enumerate(record.input_images, 1)
            for image in images
        ]
    if not trusts_images and "mask_image" not in given and record.mask_image is not None:
        needed.append(("mask-image", record.mask_image.path_from(picture)))
    if not needed:
        return
    options = " ".join(f"--{name} {shlex.quote(value)}" for name, value in needed)
    images = {"image", "mask-image"} & dict(needed).keys()
    also = ", or --recorded-images to open those it names" if images else ""
    raise RequestError(
        f"{picture} was made with {printable(options)}; a picture opens nothing by "
        f"itself: give that, or others{also}"
    )
