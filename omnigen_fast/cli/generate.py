"""`omnigen-fast generate` and `show`: makes pictures, and prints the request in one."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import OmniGenError, RequestError
from ..fewer_steps import QUALITIES
from ..model_defaults import defaults_of
from ..page import embedded
from ..page.record import (
    Record,
    find_images,
    find_mask,
    read_record,
    recorded_arguments,
    recorded_file,
    recorded_images,
    recorded_precision,
)
from ..request import MAX_IMAGES, OUTPUT_TYPES
from ..solvers import SOLVERS
from .calls import OneCall, Saver, calls_of, show_picture
from .config_file import given_options, quality_values
from .failure import failure
from .files import PATH_OR_NAME, SUFFIXES, UserPath, check_writable
from .loading import loading_options
from .ranks import Place, gpus_option, on_ranks
from .rerun import check_rerun
from .sizes import aspect_option, chosen_sides

if TYPE_CHECKING:
    from ..pipeline import OmniGenPipeline

T = TypeVar("T")


def parse_reuse(_context: click.Context, _option: click.Parameter, text: str) -> str | float:
    """The value of --reuse: a number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text  # a name, which the call checks


@click.command()
@loading_options()
@gpus_option
@click.option("--lora", multiple=True, help="A LoRA: FILE, FOLDER or hub id, or LORA:WEIGHT.")
@click.option("--prompt", multiple=True, help="May be repeated for a batch.")
@click.option(
    "--prompt-file",
    type=UserPath(path_type=Path),
    help="A prompt a line, made one after the other with the same seeds and images; - reads "
    "standard input.",
)
@click.option(
    "--image",
    "input_images",
    multiple=True,
    type=PATH_OR_NAME,
    help="Input image; the prompt refers to it as <img><|image_1|></img>. May be repeated. "
    "With several prompts, 2:FILE is an image of the second one.",
)
@click.option(
    "--mask-image",
    type=PATH_OR_NAME,
    help="Of the input image's size: what is white, or transparent, is edited; the rest stays.",
)
@click.option(
    "--mask-blur", default=0, show_default=True, help="Width of the mask's seam in pixels."
)
@click.option(
    "--strength",
    default=1.0,
    show_default=True,
    help="Below 1: start from the input image with noise, and leave out the first steps.",
)
@click.option("--negative-prompt", multiple=True, help="One for all prompts, or one for each.")
@click.option(
    "--size", type=int, help="Height and width in pixels, a multiple of 16.  [default: the model's]"
)
@aspect_option
@click.option(
    "--height", default=1024, show_default="the model's, else 1024", help="Overrides --size."
)
@click.option(
    "--width", default=1024, show_default="the model's, else 1024", help="Overrides --size."
)
@click.option(
    "--num-inference-steps",
    "--steps",
    default=50,
    show_default="the model's, else 50",
    help="Denoising steps.",
)
@click.option(
    "--solver",
    default="euler",
    show_default=True,
    type=click.Choice(SOLVERS),
    help="heun and midpoint run the model twice in a step.",
)
@click.option(
    "--time-shift", default=1.0, show_default=True, help="Above 1: more steps near the noise."
)
@click.option(
    "--timesteps",
    metavar="TIMES",
    callback=lambda _context, _option, text: _parse_times(text),
    help="When steps begin, as in 0,0.05,0.2,0.6, instead of --steps and --time-shift.",
)
@click.option(
    "--reuse",
    default="off",
    show_default=True,
    callback=parse_reuse,
    help="off, careful, fast or a threshold: do not compute steps that change little.",
)
@click.option(
    "--quality",
    default=QUALITIES[0],
    show_default=True,
    type=click.Choice(QUALITIES),
    help="Below exact: less work. Chooses steps, solver, times, intervals and reuse, where no "
    "option does.",
)
@click.option(
    "--guidance-scale",
    default=3.0,
    show_default="the model's, else 3.0",
    help="Strength of the prompt.",
)
@click.option(
    "--use-img-guidance/--no-img-guidance",
    default=True,
    show_default=True,
    help="Guide by the input images separately from the text.",
)
@click.option(
    "--img-guidance-scale",
    default=1.6,
    show_default="the model's, else 1.6",
    help="Strength of the input images.",
)
@click.option(
    "--guidance-interval",
    type=float,
    nargs=2,
    metavar="START STOP",
    help="Times, from 0 (noise) to 1 (picture), between which the prompt guides.",
)
@click.option(
    "--image-guidance-interval",
    type=float,
    nargs=2,
    metavar="START STOP",
    help="Likewise for the input images.",
)
@click.option(
    "--max-input-image-size",
    default=1024,
    show_default="the model's, else 1024",
    help="Pixels per side.",
)
@click.option(
    "--use-input-image-size-as-output", is_flag=True, help="Instead of --height and --width."
)
@click.option(
    "--separate-cfg-infer/--joint-cfg-infer",
    default=None,
    help="Run guidance branches one by one or together. Same image either way.",
)
@click.option(
    "--use-kv-cache/--no-kv-cache",
    default=None,
    help="Cache keys and values of the condition. Same image either way.",
)
@click.option(
    "--offload-kv-cache/--keep-kv-cache", default=None, help="Keep the cache on the host."
)
@click.option("--offload-model/--keep-model", default=None, help="Keep weights on the host.")
@click.option(
    "--memory",
    default="auto",
    show_default=True,
    help="Device memory to use: auto, 8GiB, ...",
)
@click.option(
    "--num-images-per-prompt",
    "--count",
    default=1,
    show_default=True,
    help="Pictures of each prompt and seed; they share the work on the prompt.",
)
@click.option(
    "--seed",
    type=int,
    multiple=True,
    help="Makes the result reproducible. May be repeated: a picture for each seed.",
)
@click.option(
    "--latents",
    type=UserPath(exists=True, dir_okay=False),
    help="Initial noise: a safetensors file with one tensor, as --output-type latent writes it.",
)
@click.option(
    "--output-type",
    type=click.Choice(OUTPUT_TYPES),
    default="pil",
    show_default=True,
    help="pil: image files; np: a .npy file; pt, latent: a .safetensors file.",
)
@click.option("--out", required=True, type=UserPath(path_type=Path), help="File to write.")
@click.option("--open", "opens", is_flag=True, help="Show the first picture afterwards.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option(
    "--from",
    "picture",
    metavar="FILE",
    type=PATH_OR_NAME,
    help="Take options that are not given from the request in a PNG, JPEG or WebP file.",
)
@click.option(
    "--recorded-images",
    "trusts_images",
    is_flag=True,
    help="With --from, open the input images that the file names. Only for files that you trust.",
)
@click.pass_context
@on_ranks
def generate(
    context: click.Context,
    *,
    place: Place,
    model: str,
    vae_path: str | None,
    revision: str | None,
    cache_dir: str | None,
    local_files_only: bool,
    dtype: str,
    weights: str | None,
    compute: str | None,
    cache: str | None,
    attention: str,
    vae_dtype: str,
    compile: bool | None,
    lora: tuple[str, ...],
    prompt: tuple[str, ...],
    prompt_file: Path | None,
    size: int | None,
    aspect: str | None,
    seed: tuple[int, ...],
    opens: bool,
    input_images: tuple[str, ...],
    mask_image: str | None,
    negative_prompt: tuple[str, ...],
    latents: str | None,
    output_type: str,
    out: Path,
    quiet: bool,
    memory: str,
    picture: str | None,
    trusts_images: bool,
    **arguments: Any,  # of the call, without those above
) -> None:
    """Makes images from a prompt and writes them to --out.

    Several images become NAME-1.png, NAME-2.png and so on. Existing files are replaced. PNG, JPEG
    and WebP files carry the request: `show` prints it, --from runs it again.
    """
    precision = {"weights": weights, "compute": compute, "cache": cache, "vae_dtype": vae_dtype}
    try:
        images = None
        given = given_options(context, file=picture is None)
        chosen_by_preset = quality_values(context)
        arguments |= chosen_by_preset
        if picture is None:
            arguments |= model_values(context, model)
        else:
            made = read_record(picture)
            if "quality" in given:
                given |= {*chosen_by_preset, "timesteps"}
            chosen = model if "model" in given else None
            if prompt_file is not None:
                made = replace(made, prompts=made.prompts[:1], input_images=made.input_images[:1])
            check_rerun(made, picture, given, chosen, trusts_images)
            prompt = prompt or made.prompts
            negative_prompt = negative_prompt or made.negative_prompts or ()
            if given & {"height", "width", "size", "aspect"}:
                arguments["use_input_image_size_as_output"] = False
                given.add("use_input_image_size_as_output")
            recorded = dict(made.arguments)
            dtype = dtype if "dtype" in given else recorded.pop("dtype")
            precision |= {
                name: value for name, value in made.precision.items() if name not in given
            }
            recorded_seed = recorded.pop("seed")
            seed = seed if "seed" in given else (recorded_seed,)
            taken = recorded.keys() & arguments.keys() - given
            arguments |= {name: recorded[name] for name in taken}
            if trusts_images and not input_images:
                images = find_images(made, picture)
            if trusts_images and mask_image is None:
                mask_image = find_mask(made, picture)
        arguments |= chosen_sides(context, size, aspect, arguments["height"], file=picture is None)
        if prompt_file is not None and "prompt" in given:
            raise RequestError("--prompt and --prompt-file can't be had together; give one of them")
        if place.parallel is not None and str(prompt_file) == "-":
            raise RequestError(
                "several ranks can't share standard input; give --prompt-file a file"
            )
        if not prompt and prompt_file is None:
            raise click.UsageError("Missing option '--prompt'.", context)
        if place.leads:
            _check_out(out, output_type)
        if opens and output_type != "pil":
            raise RequestError(f"--open shows pictures, --output-type {output_type} makes none")
        loras = parse_loras(lora)
        carries = out.suffix.lower() in embedded.SUFFIXES
        if carries and not seed:  # recorded, to run it again
            seed = (place.same("seed", secrets.randbelow(1 << 32)),)
        calls = calls_of(prompt, prompt_file, seed)
        in_call = len(calls[0].prompts)
        if images is None:
            images = _assign_images(input_images, in_call)
        record = None
        if carries:
            record = Record(
                model=model,
                prompts=calls[0].prompts,
                input_images=recorded_images(images, out.parent),
                negative_prompts=negative_prompt or None,
                arguments=recorded_arguments(arguments | {"dtype": dtype, "seed": calls[0].seed}),
                loras=lora,
                latents=recorded_file(latents, out.parent) if latents else None,
                vae_path=vae_path,
                revision=revision,
                mask_image=recorded_file(mask_image, out.parent) if mask_image else None,
                precision=recorded_precision(precision),
            )
            for call in calls:  # raises now if one is too long to save
                text = replace(record, prompts=call.prompts, index=MAX_IMAGES - 1).text()
                embedded.check_length(text, out.suffix)
        noise = None
        if latents:
            from ..weights.files import read_single_tensor

            noise = read_single_tensor(latents)
        pipe = load_pipeline(
            model,
            vae_path,
            loras,
            device=place.device,
            dtype=dtype,
            **({} if place.parallel is None else {"parallel": place.parallel}),
            **precision,
            attention=attention,
            compile=compile,
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            memory=memory,
        )
        others: dict[str, Any] = {"latents": noise, "mask_image": mask_image}
        others |= {"output_type": output_type, "input_images": None, "negative_prompt": None}
        if any(images):
            others["input_images"] = _one_or_all(images)
        if negative_prompt:
            others["negative_prompt"] = _one_or_all(negative_prompt)
        arguments |= others
        if prompt_file is not None:
            for call in calls:  # a mistake in the last line is found before the first picture
                with call.naming():
                    pipe.plan(_one_or_all(call.prompts), **arguments, seed=call.seed)
        each = in_call * arguments["num_images_per_prompt"]
        saver = Saver(out, output_type, each * len(calls))
        for call in calls:
            with call.naming():
                result = pipe(
                    prompt=_one_or_all(call.prompts),
                    seed=call.seed,
                    progress=place.leads and not quiet,
                    **arguments,
                )
            if place.leads:
                saver.add(result, record and _record_of(record, call))
        if place.leads:
            saver.finish()
            if opens:
                show_picture(saver.paths[0])
    except (OmniGenError, OSError) as error:
        raise failure(error) from error


@click.command()
@click.argument("file", type=PATH_OR_NAME)
def show(file: str) -> None:
    """Prints the request in a PNG, JPEG or WebP file."""
    try:
        for line in read_record(file).lines():
            click.echo(line)
    except (OmniGenError, OSError) as error:
        raise failure(error) from error


def model_values(context: click.Context, model: str) -> dict[str, Any]:
    """The model's own defaults of options that neither the caller nor a quality gives."""
    given = given_options(context)
    own = dict(defaults_of(model).call)
    if context.params.get("timesteps") is not None or context.params["quality"] != QUALITIES[0]:
        own.pop("num_inference_steps", None)
    return {name: value for name, value in own.items() if name not in given}


def _record_of(record: Record, call: OneCall) -> Record:
    """The record of one of several calls."""
    arguments = {**record.arguments, "seed": call.seed}
    return replace(record, prompts=call.prompts, arguments=arguments)


def _check_out(out: Path, output_type: str) -> None:
    suffixes = SUFFIXES[output_type]
    if out.suffix.lower() not in suffixes:
        raise RequestError(
            f"--out must end in {' or '.join(suffixes)} for --output-type {output_type}, got {out}"
        )
    check_writable(out)


def parse_loras(loras: Sequence[str]) -> list[tuple[str, float]]:
    """Path or hub id, and weight, of each --lora."""
    return [_parse_lora(one) for one in loras]


def _parse_lora(text: str) -> tuple[str, float]:
    path, colon, weight = text.rpartition(":")
    if not colon or os.path.exists(os.path.expanduser(text)):
        return os.path.expanduser(text), 1.0
    try:
        return os.path.expanduser(path), float(weight)
    except ValueError as error:
        raise RequestError(f"--lora {text}: {weight!r} is not a weight; give LORA:0.8") from error


def load_pipeline(
    model: str,
    vae_path: str | None,
    loras: Sequence[tuple[str, float]],
    *,
    cache_dir: str | None,
    local_files_only: bool,
    **options: Any,
) -> OmniGenPipeline:
    """A model with its LoRAs; `options` are further arguments of `from_pretrained`."""
    from ..pipeline import OmniGenPipeline

    hub: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only}
    pipe = OmniGenPipeline.from_pretrained(model, vae_path, **hub, **options)
    for lora, weight in loras:
        is_hub_id = lora.count("/") == 1 and not os.path.exists(lora)
        pipe.load_lora_weights(lora, weight=weight, **(hub if is_hub_id else {}))
    return pipe


def _parse_times(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(one) for one in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{error}; give times such as 0,0.05,0.2,0.6") from error


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
        lists[int(match[1]) - 1].append(os.path.expanduser(match[2]))
    return lists


def _one_or_all(values: Sequence[T]) -> T | list[T]:
    """The value if there is one, else the list, as calls take them."""
    return values[0] if len(values) == 1 else list(values)
