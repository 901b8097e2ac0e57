"""`omnigen-fast generate` and `show`: pictures, and the request that a picture carries."""

from __future__ import annotations

import os
import re
import secrets
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..errors import CheckpointError, OmniGenError, RequestError
from ..page import record as metadata
from ..request import MAX_IMAGES, OUTPUT_TYPES
from .files import _SUFFIXES, _check_writable, _Failure, _save


@click.command()
@click.option("--model", default="Shitao/OmniGen-v1", show_default=True, help="Folder or hub id.")
@click.option("--vae-path", help="Folder or hub id of the VAE, if the model has none.")
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--cache-dir", help="Where hub files are kept.")
@click.option("--local-files-only", is_flag=True, help="Do not ask the hub.")
@click.option("--device", help="cuda, cuda:1, cpu, ...; the current GPU if there is one.")
@click.option("--dtype", default="bfloat16", show_default=True, help="bfloat16 or float32.")
@click.option("--lora", multiple=True, help="A LoRA: FILE, FOLDER or hub id, or LORA:WEIGHT.")
@click.option("--prompt", multiple=True, help="May be repeated: a batch.")
@click.option(
    "--image",
    "input_images",
    multiple=True,
    help="Input image, named in the prompt as <img><|image_1|></img>. May be repeated. "
    "With several prompts: 2:FILE is an image of the second one.",
)
@click.option("--negative-prompt", multiple=True, help="One, or one for each prompt.")
@click.option("--height", default=1024, show_default=True, help="Pixels, a multiple of 16.")
@click.option("--width", default=1024, show_default=True, help="Pixels, a multiple of 16.")
@click.option("--num-inference-steps", "--steps", default=50, show_default=True)
@click.option("--guidance-scale", default=3.0, show_default=True, help="How much the text counts.")
@click.option("--use-img-guidance/--no-img-guidance", default=True, show_default=True)
@click.option("--img-guidance-scale", default=1.6, show_default=True, help="And the images.")
@click.option("--max-input-image-size", default=1024, show_default=True, help="Pixels a side.")
@click.option("--use-input-image-size-as-output", is_flag=True)
@click.option("--separate-cfg-infer/--joint-cfg-infer", default=None, help="Same image either way.")
@click.option("--use-kv-cache/--no-kv-cache", default=None, help="Same image either way.")
@click.option("--offload-kv-cache/--keep-kv-cache", default=None)
@click.option("--offload-model/--keep-model", default=None)
@click.option(
    "--memory",
    default="auto",
    show_default=True,
    help="How much of the device's memory to use: auto, 8GiB, ...",
)
@click.option("--num-images-per-prompt", default=1, show_default=True)
@click.option("--seed", type=int, help="Makes the result repeatable.")
@click.option(
    "--latents",
    type=click.Path(exists=True, dir_okay=False),
    help="Initial noise: the one tensor of a safetensors file, as --output-type latent writes.",
)
@click.option(
    "--output-type",
    type=click.Choice(OUTPUT_TYPES),
    default="pil",
    show_default=True,
    help="pil: image files; np: a .npy file; pt, latent: a .safetensors file.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option(
    "--from",
    "picture",
    metavar="FILE",
    help="Take what is not given here from the request in a PNG file that was made before.",
)
@click.option(
    "--recorded-images",
    is_flag=True,
    help="With --from: open the input images that the file names. For files that you trust.",
)
@click.pass_context
def generate(
    context: click.Context,
    model: str,
    vae_path: str | None,
    revision: str | None,
    cache_dir: str | None,
    local_files_only: bool,
    device: str | None,
    dtype: str,
    lora: tuple[str, ...],
    prompt: tuple[str, ...],
    input_images: tuple[str, ...],
    negative_prompt: tuple[str, ...],
    latents: str | None,
    output_type: str,
    out: Path,
    quiet: bool,
    memory: str,
    picture: str | None,
    recorded_images: bool,
    **arguments: Any,
) -> None:
    """Makes images from a prompt and writes them to --out.

    Several images become NAME-1.png, NAME-2.png and so on. A file that is there is replaced. PNG
    files carry the request: `show` prints it, --from makes it again.
    """
    try:
        images = None
        if picture is not None:
            made = metadata.read(picture)
            given = _given(context)
            named = model if "model" in given else None
            _check_rerun(made, picture, given, named, recorded_images)
            prompt = prompt or made.prompts
            negative_prompt = negative_prompt or made.negative_prompts or ()
            if "height" in given or "width" in given:
                arguments["use_input_image_size_as_output"] = False
                given.add("use_input_image_size_as_output")
            recorded = dict(made.arguments)
            dtype = dtype if "dtype" in given else recorded.pop("dtype")
            taken = recorded.keys() & arguments.keys() - given
            arguments |= {name: recorded[name] for name in taken}
            if recorded_images and not input_images:
                images = metadata.recorded_images(made, picture)
        if not prompt:
            raise click.UsageError("Missing option '--prompt'.", context)
        suffixes = _SUFFIXES[output_type]
        if out.suffix.lower() not in suffixes:
            raise RequestError(
                f"--out must end in {' or '.join(suffixes)} for --output-type {output_type}, "
                f"got {out}"
            )
        _check_writable(out)
        loras = [_parse_lora(one) for one in lora]
        if images is None:
            images = _assign_images(input_images, len(prompt))
        record = None
        if out.suffix.lower() == ".png":
            if arguments["seed"] is None:
                arguments["seed"] = secrets.randbelow(1 << 32)  # or nobody could make it again
            record = metadata.Record(
                model=model,
                prompts=prompt,
                input_images=metadata.sources(images, out.parent),
                negative_prompts=negative_prompt or None,
                arguments={
                    name: (arguments | {"dtype": dtype})[name] for name in metadata.ARGUMENTS
                },
                loras=lora,
                latents=metadata.source(latents, out.parent) if latents else None,
                vae_path=vae_path,
                revision=revision,
            )
            replace(record, index=MAX_IMAGES - 1).text()  # now: it may be too long to be saved
        noise = _read_latents(latents) if latents else None
        one = len(prompt) == 1
        from ..pipeline import OmniGenPipeline

        pipe = OmniGenPipeline.from_pretrained(
            model,
            vae_path,
            device=device,
            dtype=dtype,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            memory=memory,
        )
        for lora_path, weight in loras:
            hub: dict[str, Any] = {
                "cache_dir": cache_dir,
                "local_files_only": local_files_only,
            }
            if lora_path.count("/") != 1 or os.path.exists(lora_path):
                hub = {}  # no hub id
            pipe.load_lora_weights(lora_path, weight=weight, **hub)
        result = pipe(
            prompt=prompt[0] if one else list(prompt),
            input_images=(images[0] if one else images) if any(images) else None,
            negative_prompt=(
                None
                if not negative_prompt
                else negative_prompt[0]
                if len(negative_prompt) == 1
                else list(negative_prompt)
            ),
            latents=noise,
            output_type=output_type,
            progress=not quiet,
            **arguments,
        )
        for path in _save(result, output_type, out, record):
            click.echo(path)
    except (OmniGenError, OSError) as error:
        raise _Failure(error) from error


@click.command()
@click.argument("file")
def show(file: str) -> None:
    """Prints the request that a PNG file carries."""
    try:
        for line in metadata.read(file).lines():
            click.echo(line)
    except (OmniGenError, OSError) as error:
        raise _Failure(error) from error


def _given(context: click.Context) -> set[str]:
    """The options that stand on the command line."""
    return {
        name
        for name in context.params
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    }


def _check_rerun(
    record: metadata.Record,
    picture: str,
    given: set[str],
    model: str | None,
    recorded_images: bool,
) -> None:
    """A picture does not choose which files are opened: the caller does.

    `model` is what the caller gave, if anything.
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
        needed.append(("latents", metadata.found_from(picture, record.latents)))
    if not recorded_images and "input_images" not in given:
        several = len(record.prompts) > 1
        needed += [
            ("image", f"{i}:" * several + metadata.found_from(picture, image))
            for i, images in enumerate(record.input_images, 1)
            for image in images
        ]
    if not needed:
        return
    options = " ".join(f"--{name} {shlex.quote(value)}" for name, value in needed)
    also = ", or --recorded-images to open those it names" if "image" in dict(needed) else ""
    raise RequestError(
        f"{picture} was made with {metadata.printable(options)}; a picture opens nothing by "
        f"itself: give that, or others{also}"
    )


def _parse_lora(text: str) -> tuple[str, float]:
    path, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(os.path.expanduser(text)):
        return os.path.expanduser(text), 1.0
    try:
        return os.path.expanduser(path), float(weight)
    except ValueError as error:
        raise RequestError(f"--lora {text}: {weight!r} is not a weight; give LORA:0.8") from error


def _assign_images(images: tuple[str, ...], prompts: int) -> list[list[str]]:
    """The images of each prompt."""
    if prompts == 1:
        return [list(images)]
    lists: list[list[str]] = [[] for _ in range(prompts)]
    for image in images:
        match = re.fullmatch(r"(\d{1,4}):(.+)", image)
        if not match or not 1 <= int(match[1]) <= prompts:
            raise RequestError(
                f"--image {image}: with {prompts} prompts, say which one it belongs to, as in "
                f"1:{image}"
            )
        lists[int(match[1]) - 1].append(match[2])
    return lists


def _read_latents(path: str) -> Any:
    import torch

    from ..weights.files import read_tensors

    tensors = read_tensors([path], torch.float32, torch.device("cpu"))
    if len(tensors) != 1:
        raise CheckpointError(f"{path} has {len(tensors)} tensors; it must hold the latents alone")
    return next(iter(tensors.values()))
