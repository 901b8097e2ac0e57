"""`omnigen-fast batch`: makes the pictures of a file of requests, and goes on where it stopped."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from ..batch.lines import KEYS, Job, Source
from ..batch.results import Results, check_table, write_table
from ..errors import OmniGenError, RequestError
from ..page.record import RECORDED_PRECISION, Record, recorded_precision
from ..whole_files import remove_left
from .config_file import quality_values
from .failure import failure
from .files import SUFFIXES, UserPath, make_folder, save_result
from .generate import generate, load_pipeline, model_values, parse_loras
from .sizes import chosen_sides

if TYPE_CHECKING:
    from ..batch.on_ray import Cluster
    from ..pipeline import OmniGenPipeline

# options of generate
_NOT_SHARED = {"out", "picture", "trusts_images", "prompt_file", "opens"}


@click.command()
@click.argument("file", metavar="FILE.jsonl", type=UserPath(path_type=Path))
@click.argument("out", metavar="FOLDER", type=UserPath(path_type=Path))
@click.option(
    "--image-folder",
    type=UserPath(exists=True, file_okay=False, path_type=Path),
    help="Folder that paths in the file start from.  [default: the file's]",
)
@click.option(
    "--any-path",
    is_flag=True,
    help="Also read files outside that folder. Only for batch files that you trust.",
)
@click.option("--retry-failed", is_flag=True, help="Try lines again that failed before.")
@click.option(
    "--results",
    "table",
    metavar="FILE.parquet",
    type=UserPath(path_type=Path),
    help="In the end, also write what became of each line as a table.",
)
@click.option(
    "--ray",
    "address",
    metavar="ADDRESS",
    help="Run on a Ray cluster: its address, auto, or local for one on this machine.",
)
@click.option(
    "--ray-actors",
    "actors",
    type=click.IntRange(1),
    help="How many models to keep there.  [default: one per GPU, or per machine without any]",
)
@click.pass_context
def batch(
    context: click.Context,
    file: Path,
    out: Path,
    image_folder: Path | None,
    any_path: bool,
    retry_failed: bool,
    table: Path | None,
    address: str | None,
    actors: int | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Makes the pictures that FILE.jsonl asks for, in FOLDER.

    Each line is a JSON object: a prompt, input_images, and any other argument of a call; an id
    names its picture. Options apply to all lines that do not say otherwise. FOLDER/results.jsonl
    says what became of each line. The same command goes on after an interruption, and does nothing
    twice. The exit status is 0 if every line is done, and 1 if some failed.
    """
    try:
        if sys.stdout is None:  # a file would be opened in its place, and get what libraries print
            raise OSError("standard output is closed; redirect it, for example to /dev/null")
        options |= quality_values(context) | model_values(context, options["model"])
        size, aspect = options.pop("size"), options.pop("aspect")
        options |= chosen_sides(context, size, aspect, options["height"])
        loras, defaults = parse_loras(options["lora"]), _defaults(options)
        cluster = _cluster(address, actors, options["device"])
        if table is not None:
            check_table(table)
        with _opened(file) as lines_file, _results(out) as results:
            if os.path.samestat(os.fstat(lines_file.fileno()), os.stat(results.path)):
                raise RequestError(f"{file} is where the results go; give another folder")
            remove_left(out)
            source = Source(
                folder=image_folder or file.parent,
                out=out,
                made_with=_made_with(options),
                defaults=defaults,
                any_path=any_path,
            )
            counts = _run(source, lines_file, results, options, loras, quiet, retry_failed, cluster)
            if table is not None:
                write_table(results.entries(), table)
        click.echo(_summary(counts, results.path))
    except KeyboardInterrupt:
        click.echo("interrupted; the same command goes on from here", err=True)
        sys.exit(128 + signal.SIGINT)
    except (OmniGenError, OSError) as error:
        raise failure(error) from error
    sys.exit(1 if counts["failed"] else 0)


# what `generate` takes for one request is what lines take if they do not say otherwise
batch.params += [option for option in generate.params if option.name not in _NOT_SHARED]


def _run(
    source: Source,
    file: BinaryIO,
    results: Results,
    options: dict[str, Any],
    loras: list[tuple[str, float]],
    quiet: bool,
    retry_failed: bool,
    cluster: Cluster | None,
) -> Counter[str]:
    from ..batch import on_ray, run
    from ..progress import progress_bar

    load = partial(_load, options, loras)
    count = None if quiet else _count_lines(file)
    with progress_bar(not quiet, {"total": count, "unit": "line"}) as bar:

        def advanced(_status: str) -> None:
            bar.update()

        if cluster is not None:
            load, path = partial(_load, *_absolute(options, loras)), Path(file.name)
            return on_ray.run(load, source, path, results, _save, cluster, retry_failed, advanced)
        lines, save = source.lines(file), partial(_save, source.out)
        return run.run(
            cache(load), lines, results, save, retry_failed=retry_failed, advanced=advanced
        )


def _load(options: dict[str, Any], loras: list[tuple[str, float]]) -> OmniGenPipeline:
    names = ["device", "dtype", "attention", "compile", "revision", "cache_dir"]
    names += ["local_files_only", "memory", *RECORDED_PRECISION]
    chosen = {name: options[name] for name in names}
    return load_pipeline(options["model"], options["vae_path"], loras, **chosen)


def _absolute(
    options: dict[str, Any], loras: list[tuple[str, float]]
) -> tuple[dict[str, Any], list[tuple[str, float]]]:
    """What `_load` takes, where another working directory changes nothing."""

    def absolute(name: str | None) -> str | None:
        return os.path.abspath(name) if name and os.path.exists(name) else name

    paths = {name: absolute(options[name]) for name in ("model", "vae_path", "cache_dir")}
    return {**options, **paths}, [(absolute(lora) or lora, weight) for lora, weight in loras]


def _save(folder: Path, job: Job, result: Any, record: Record) -> list[Path]:
    name = job.id + SUFFIXES[job.output_type][0]
    return save_result(result, job.output_type, folder / name, record)


def _cluster(address: str | None, actors: int | None, device: str | None) -> Cluster | None:
    if address is None:
        if actors is not None:
            raise RequestError("--ray-actors is for a batch on Ray; give --ray as well")
        return None
    from ..batch.on_ray import Cluster

    return Cluster(address, actors, device)


def _opened(file: Path) -> BinaryIO:
    if not file.is_file():
        what = "is not a regular file" if file.exists() else "does not exist"
        raise RequestError(f"{file} {what}; give a file with a JSON object on each line")
    return open(file, "rb")


def _results(folder: Path) -> Results:
    make_folder(folder, "FOLDER")
    return Results(folder)


def _count_lines(file: BinaryIO) -> int:
    """About as many lines as there are; leaves the file at its start."""
    count = 0
    while block := file.read(1 << 20):
        count += block.count(b"\n")
    file.seek(0)
    return max(count, 1)


def _made_with(options: dict[str, Any]) -> Record:
    return Record(
        model=options["model"],
        prompts=(),
        input_images=(),
        negative_prompts=None,
        arguments={},
        loras=options["lora"],
        vae_path=options["vae_path"],
        revision=options["revision"],
        precision=recorded_precision(options),
    )


def _defaults(options: dict[str, Any]) -> dict[str, Any]:
    """Values for what lines leave out."""
    for name in ("prompt", "negative_prompt", "seed"):
        if len(options[name]) > 1:
            option = name.replace("_", "-")
            raise RequestError(f"--{option} is for all lines; give it once, or in the lines")
    defaults = {name: options[name] for name in KEYS if name in options}
    for name in ("prompt", "negative_prompt", "seed"):
        defaults[name] = next(iter(options[name]), None)
    defaults["input_images"] = tuple(map(os.path.abspath, options["input_images"]))
    files = {name: options[name] for name in ("latents", "mask_image")}
    return {**defaults, **{name: path and os.path.abspath(path) for name, path in files.items()}}


def _summary(counts: Counter[str], path: Path) -> str:
    done = f"{counts['done'] + counts['kept']} done"
    if counts["kept"]:
        done += f" ({counts['kept']} of them before)"
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    return f"{done}{failed}: {path}"
