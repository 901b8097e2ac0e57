"""`omnigen-fast plan`: predicts what a request needs, without weights."""

from __future__ import annotations

import click

from ..errors import OmniGenError
from ..fewer_steps import QUALITIES, preset
from ..guidance import typical_schedule
from ..memory.plan import PROMPT_TOKENS, Switches, typical_workload
from ..parallel.layout import MAX_RANKS
from ..precision import ATTENTIONS, AUTO, CACHED, COMPUTES, STORAGES, Precision, check_capability
from ..request import checked_side
from .config_file import given_options
from .failure import failure
from .files import PATH_OR_NAME
from .generate import parse_reuse
from .sizes import aspect_option, chosen_sides


@click.command()
@click.option(
    "--device",
    type=PATH_OR_NAME,
    help="A bundled profile (a800, rtx3090, cpu, ...) or a file; default: this device.",
)
@click.option(
    "--images",
    default=0,
    show_default=True,
    type=click.IntRange(0, 64),
    help="Input images per prompt.",
)
@click.option("--size", default=1024, show_default=True, help="Height and width in pixels.")
@aspect_option
@click.option("--height", type=int, help="Overrides --size.")
@click.option("--width", type=int, help="Overrides --size.")
@click.option(
    "--max-input-image-size",
    "--max-input-size",
    default=1024,
    show_default=True,
    type=click.IntRange(16, 3072),
    help="Height and width of each input image in pixels.",
)
@click.option(
    "--num-inference-steps",
    "--steps",
    "steps",
    default=50,
    show_default=True,
    type=click.IntRange(1, 1000),
)
@click.option(
    "--quality",
    default=QUALITIES[0],
    show_default=True,
    type=click.Choice(QUALITIES),
    help="Chooses steps, intervals of guidance and reuse; --steps and --reuse win.",
)
@click.option(
    "--reuse",
    default="off",
    show_default=True,
    callback=parse_reuse,
    help="off, careful, fast or a threshold, as for generate.",
)
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1, 64), help="Prompts.")
@click.option(
    "--prompt-tokens",
    default=PROMPT_TOKENS,
    show_default=True,
    type=click.IntRange(1, 10000),
    help="Length of each prompt.",
)
@click.option("--image-first/--no-image-first", help="Images come before the instruction.")
@click.option(
    "--memory", default="auto", show_default=True, help='"auto", or an amount such as "8GiB".'
)
@click.option(
    "--dtype",
    default="bfloat16",
    show_default=True,
    type=click.Choice(("bfloat16", "float32")),
)
@click.option(
    "--weights",
    default="bfloat16",
    show_default=True,
    type=click.Choice((*STORAGES, AUTO)),
    help="How the layers' matrices are stored; bfloat16: plain, in --dtype. auto: the least change "
    "with all layers on the device.",
)
@click.option(
    "--compute",
    type=click.Choice(COMPUTES),
    help="What the layers' products are computed in; default: --dtype.",
)
@click.option(
    "--cache",
    type=click.Choice(CACHED),
    help="How the condition's keys and values are kept; default: --dtype.",
)
@click.option(
    "--attention",
    default=AUTO,
    show_default=True,
    type=click.Choice(ATTENTIONS),
    help="Who computes that of a step.",
)
@click.option(
    "--vae-dtype",
    default="float32",
    show_default=True,
    type=click.Choice(("float32", "bfloat16")),
)
@click.option("--separate-cfg-infer/--joint-cfg-infer", default=None)
@click.option("--use-kv-cache/--no-kv-cache", default=None)
@click.option("--offload-kv-cache/--keep-kv-cache", default=None, help="No effect on a CPU.")
@click.option("--offload-model/--keep-model", default=None, help="No effect on a CPU.")
@click.option(
    "--gpus",
    default=1,
    show_default=True,
    type=click.IntRange(1, MAX_RANKS),
    help="How many such devices share the request; says what that gains.",
)
@click.option("--explain", is_flag=True, help="Itemise the chosen plan's bytes and seconds.")
@click.pass_context
def plan(
    context: click.Context,
    device: str | None,
    images: int,
    size: int,
    aspect: str | None,
    height: int | None,
    width: int | None,
    max_input_image_size: int,
    steps: int,
    quality: str,
    reuse: str | float,
    batch: int,
    prompt_tokens: int,
    image_first: bool,
    memory: str,
    dtype: str,
    weights: str,
    compute: str | None,
    cache: str | None,
    attention: str,
    vae_dtype: str,
    separate_cfg_infer: bool | None,
    use_kv_cache: bool | None,
    offload_kv_cache: bool | None,
    offload_model: bool | None,
    gpus: int,
    explain: bool,
) -> None:
    """Predicts memory and time of a request, on this device or another, without weights."""
    from ..config import released_sizes
    from ..memory.autoencoder import VaeShape
    from ..memory.device import (
        free_bytes,
        host_profile,
        less_margin,
        parse_memory,
        profile_of,
    )
    from ..memory.overview import report
    from ..memory.planner import least_change
    from ..memory.planner import plan as plan_for
    from ..parallel import planner as shared
    from ..profiles import load

    try:
        config = released_sizes()
        options = {"steps": ("num_inference_steps", steps), "reuse": ("reuse", reuse)}
        given = dict(options[name] for name in options.keys() & given_options(context))
        square = {"height": size, "width": size}
        sizes = square | chosen_sides(context, size, aspect, size)
        workload = typical_workload(
            checked_side("height", sizes["height"], config),
            checked_side("width", sizes["width"], config),
            images=images,
            max_input_image_size=max_input_image_size,
            schedule=typical_schedule({**preset(quality), **given}, [images > 0] * batch),
            pictures=batch,
            prompt_tokens=prompt_tokens,
            image_first=image_first,
        )
        budget = parse_memory(memory)
        if device is None:
            from ..pipeline import check_device

            here = check_device(None)
            profile = profile_of(here)
            budget = free_bytes(here, profile) if budget is None else budget
        else:
            profile = host_profile() if device == "cpu" else load(device)
            budget = less_margin(profile.memory_bytes) if budget is None else budget
        check_capability(compute, profile.capability)
        stored = None if weights in (STORAGES[0], AUTO) else weights
        precision = Precision.of(dtype, stored, compute, cache, attention)
        vae = VaeShape(value_bytes=4 if vae_dtype == "float32" else 2)
        switches = Switches(
            use_kv_cache=use_kv_cache,
            offload_kv_cache=offload_kv_cache,
            offload_model=offload_model,
            separate_cfg_infer=separate_cfg_infer,
        )

        if weights == AUTO:
            precision = least_change(config, vae, precision, workload, profile, budget, switches)
        decision = plan_for(
            config, vae, precision, workload, profile, budget, switches, kept_bytes=0
        )
        text = report(profile, workload, decision, precision, explain)
        if gpus > 1:
            text += f"\n\n{shared.report(decision.estimate, decision.plan, gpus)}"
        click.echo(text)
    except (OmniGenError, OSError) as error:
        raise failure(error) from error
