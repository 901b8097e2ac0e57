"""`omnigen-fast plan`: what a request would need, without weights."""

from __future__ import annotations

import click

from ..errors import OmniGenError
from ..request import checked_side
from .failure import failure


@click.command()
@click.option(
    "--device", help="A profile that ships (a800, rtx3090, ...) or a file; else this one."
)
@click.option("--images", default=0, show_default=True, type=click.IntRange(0, 64))
@click.option("--size", default=1024, show_default=True, help="Height and width in pixels.")
@click.option("--height", type=int, help="Instead of --size.")
@click.option("--width", type=int, help="Instead of --size.")
@click.option(
    "--max-input-image-size",
    "--max-input-size",
    default=1024,
    show_default=True,
    type=click.IntRange(16, 3072),
    help="Pixels a side of each input image.",
)
@click.option(
    "--num-inference-steps",
    "--steps",
    "steps",
    default=50,
    show_default=True,
    type=click.IntRange(1, 1000),
)
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1, 64), help="Prompts.")
@click.option("--prompt-tokens", default=60, show_default=True, type=click.IntRange(1, 10000))
@click.option("--image-first/--no-image-first", help="Images stand before the instruction.")
@click.option("--memory", default="auto", show_default=True, help='"auto", "8GiB", "7.5 GB", ...')
@click.option("--dtype", default="bfloat16", type=click.Choice(("bfloat16", "float32")))
@click.option("--separate-cfg-infer/--joint-cfg-infer", default=None)
@click.option("--use-kv-cache/--no-kv-cache", default=None)
@click.option("--offload-kv-cache/--keep-kv-cache", default=None)
@click.option("--offload-model/--keep-model", default=None)
@click.option("--explain", is_flag=True, help="Where the chosen plan's bytes and seconds go.")
def plan(
    device: str | None,
    images: int,
    size: int,
    height: int | None,
    width: int | None,
    max_input_image_size: int,
    steps: int,
    batch: int,
    prompt_tokens: int,
    image_first: bool,
    memory: str,
    dtype: str,
    explain: bool,
    **switches: bool | None,
) -> None:
    """Predicts memory and time of a request, on this device or another, without any weights."""
    from .. import profiles
    from ..config import released_sizes
    from ..memory.autoencoder import VaeShape
    from ..memory.device import free_bytes, less_margin, parse_memory, profile_of
    from ..memory.overview import report
    from ..memory.plan import Switches, typical_workload
    from ..memory.planner import plan as plan_for
    from ..precision import Precision

    try:
        config = released_sizes()
        height, width = (
            checked_side(name, size if side is None else side, config)
            for name, side in (("height", height), ("width", width))
        )
        budget = parse_memory(memory)
        if device is None:
            from ..pipeline import _check_device

            here = _check_device(None)
            profile = profile_of(here)
            budget = free_bytes(here, profile) if budget is None else budget
        else:
            profile = profiles.load(device)
            budget = less_margin(profile.memory_bytes) if budget is None else budget
        workload = typical_workload(
            height,
            width,
            images=images,
            max_input_image_size=max_input_image_size,
            steps=steps,
            pictures=batch,
            prompt_tokens=prompt_tokens,
            image_first=image_first,
        )
        precision = Precision.of(dtype)
        decision = plan_for(
            config,
            VaeShape(),
            precision,
            workload,
            profile,
            budget,
            Switches(**switches),
            kept_bytes=0,
        )
        click.echo(report(profile, workload, decision, precision, explain))
    except (OmniGenError, OSError) as error:
        raise failure(error) from error
