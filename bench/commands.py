"""`omnigen-fast bench` and `omnigen-fast compare`; also `python -m bench` in the repository.

Imports are lazy, so that help is fast.
"""

from __future__ import annotations

import os
import re
import sys
from datetime import date
from pathlib import Path
from typing import Any

import click

from omnigen_fast.cli.files import PATH_OR_NAME, UserPath
from omnigen_fast.errors import OmniGenError, RequestError


class _Failure(click.ClickException):
    """One line on standard error; exit status 2 for a wrong request, else 1."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.exit_code = 2 if isinstance(error, RequestError) else 1


_BUSY_SHARE = 0.5  # of the cores; above it, times are those of others too
_PATH = UserPath(path_type=Path, dir_okay=False)


@click.command()
@click.option(
    "--model",
    type=PATH_OR_NAME,
    help="Folder or hub id of a checkpoint, random:full or random:small.  "
    "[default: random:full on a GPU, else random:small]",
)
@click.option("--device", help="cuda, cuda:1, cpu, ...; the first GPU if there is one.")
@click.option("--sizes", help="Pixels of the picture / of its input images, as in 1024,1024/512.")
@click.option("--steps", type=click.IntRange(2, 1000), help="Steps per picture.  [default: 50]")
@click.option(
    "--settings",
    default="default",
    show_default=True,
    help="Memory switches, as in kv,kv+offload-kv+separate; all for the original's five rows.",
)
@click.option(
    "--peers",
    default="diffusers,original",
    show_default=True,
    help="Programs to compare with: diffusers, diffusers-compile, original; or none.",
)
@click.option(
    "--original-python", type=_PATH, help="Python interpreter of the original's environment."
)
@click.option(
    "--repeat", type=click.IntRange(1, 25), default=3, show_default=True, help="Runs per cell."
)
@click.option("--quick", is_flag=True, help="One run of the smallest size with 4 steps.")
@click.option("--profile", is_flag=True, help="Only profile: a trace, and the time of a step.")
@click.option("--json", "json_path", type=_PATH, help="Result file.  [default: in bench/results]")
@click.option(
    "--md",
    "md_path",
    type=_PATH,
    help="Markdown file for the tables; replaces the marked block, if present.",
)
@click.option(
    "--plot", type=UserPath(path_type=Path, file_okay=False), help="Folder for plots (PNG)."
)
def bench(**options: Any) -> None:
    """Benchmarks pictures and steps against other programs, in the original's tables.

    No timing is shown until outputs match ours. The result file is saved after every measurement.
    """
    try:
        status = _profile(options) if options["profile"] else _bench(options)
    except (OmniGenError, OSError) as error:
        raise _Failure(error) from error
    sys.exit(status)


def _bench(options: dict[str, Any]) -> int:
    from . import peers, report
    from .cases import COLUMNS
    from .models import is_random
    from .record import Record
    from .suite import Plan, run

    device, model = _target(options)
    is_random(model)
    sizes, settings = _sizes(options, model, device), _settings(options)
    names = peers.parse(options["peers"])
    steps = options["steps"] or (4 if options["quick"] else 50)
    if options["plot"] is not None:
        from .plots import require_matplotlib

        require_matplotlib()
    plan = Plan(
        model=model,
        device=device,
        cells=tuple((size, images) for size in sizes for images in range(len(COLUMNS))),
        steps=steps,
        settings=settings,
        peers=names,
        repeat=1 if options["quick"] else options["repeat"],
        original_python=options["original_python"],
        command=_command(),
    )
    path = options["json_path"] or _result_path(str(device), model)
    if busy := _busy():
        click.echo(busy, err=True)
    record = Record(path, {})
    status = 0
    try:
        run(plan, record, lambda line: click.echo(line, err=True))
    except KeyboardInterrupt:
        status = 130
        click.echo("interrupted; this is what was measured", err=True)
    if record.result.get("cells"):
        click.echo("\n".join(report.lines(record.result)))
    if busy:
        click.echo(busy)
    if record.lost is None:
        click.echo(f"wrote {path}")
    if status == 0 and options["md_path"] is not None:
        report.write_markdown(options["md_path"], report.markdown(record.result))
        click.echo(f"wrote {options['md_path']}")
    if status == 0 and options["plot"] is not None:
        from .plots import plot

        _add_profile(record, device, model, sizes[0])
        for made in plot(record.result, options["plot"]):
            click.echo(f"wrote {made}")
    if status == 0 and record.lost is not None:
        raise OSError(record.lost)
    failed = [
        f"{cell['size']}, {cell['setting']}, {cell['column']}: {name}"
        for cell in record.result.get("cells", [])
        for name, row in cell["contenders"].items()
        if row["status"] == "failed"
    ]
    failed += [name for name, one in record.result["peers"].items() if one["status"] == "failed"]
    if failed:
        click.echo(f"failed: {'; '.join(failed)}", err=True)
    return status or int(bool(failed))


def _busy() -> str | None:
    """A line if other programs take much of the processor, before anything is measured."""
    try:
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
    except OSError:  # unobtainable
        return None
    if load < _BUSY_SHARE * cores:
        return None
    return (
        f"The machine was busy at the start (load {load:.1f} on {cores} cores): these times are "
        "too long and ratios may be wrong; repeat this when it is idle."
    )


def _add_profile(record: Any, device: Any, model: str, size: Any) -> None:
    """Where a step's time goes, for the plot of it."""
    import torch

    from .cases import COLUMNS
    from .models import load
    from .profiler import profile

    column = COLUMNS[1]
    found = profile(load(model, torch.bfloat16, device), size, 50, (), columns=(column,))
    del found["traces"]
    record.result["profile"] = {"size": str(size), "column": column, **found["columns"][column]}
    record.save()


def _target(options: dict[str, Any]) -> tuple[Any, str]:
    """Device and model."""
    from omnigen_fast.pipeline import check_device

    device = check_device(options["device"])
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
    default = "random:full" if device.type == "cuda" else "random:small"
    return device, options["model"] or default


def _sizes(options: dict[str, Any], model: str, device: Any) -> tuple[Any, ...]:
    from .cases import CPU_SIZES, ORIGINAL_SIZES, Size, parse_sizes

    if options["sizes"]:
        return parse_sizes(options["sizes"])
    if model == "random:tiny":
        return (Size(64, 64),)
    small = model == "random:small" or device.type == "cpu"
    sizes = CPU_SIZES if small else ORIGINAL_SIZES
    return sizes[-1:] if options["quick"] else sizes


def _settings(options: dict[str, Any]) -> tuple[Any, ...]:
    from .cases import parse_settings

    return parse_settings(options["settings"])


def _command() -> tuple[str, ...]:
    """The command line, ready to be typed again."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return ("python", "-m", "bench", *sys.argv[1:])
    return (program.name, *sys.argv[1:])


def _result_path(device: str, model: str) -> Path:
    """In the repository's bench/results; outside of one, in ./bench-results."""
    from .common import RESULTS, ROOT

    folder = RESULTS if (ROOT / "pyproject.toml").is_file() else Path("bench-results")
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{os.path.basename(model)}-{device}").strip("-").lower()
    return folder / f"bench-{name}-{date.today().isoformat()}.json"


def _profile(options: dict[str, Any]) -> int:
    from .models import is_random, load
    from .profiler import profile, write

    device, model = _target(options)
    is_random(model)
    size = _sizes(options, model, device)[-1 if options["quick"] else 0]
    import torch

    path = options["json_path"] or _result_path(str(device), model).with_stem(
        f"profile-{_result_path(str(device), model).stem.removeprefix('bench-')}"
    )
    loaded = load(model, torch.bfloat16, device)
    found = profile(loaded, size, options["steps"] or 50, _command())
    for line in write(found, path):
        click.echo(line)
    return 0


@click.command()
@click.option(
    "--model", default="shapes", show_default=True, type=PATH_OR_NAME, help="As for bench."
)
@click.option("--device", help="cuda, cuda:1, cpu, ...; the first GPU if there is one.")
@click.option(
    "--a",
    "first",
    default="float32",
    show_default=True,
    help="Reference configuration: words joined by +.",
)
@click.option(
    "--b", "second", default="bfloat16", show_default=True, help="Configuration to compare."
)
@click.option(
    "--size", help="One size, as for bench --sizes.  [default: the model's own, else 256]"
)
@click.option(
    "--images", type=click.IntRange(0, 2), default=1, show_default=True, help="Input images."
)
@click.option(
    "--steps",
    type=click.IntRange(1, 1000),
    default=20,
    show_default=True,
    help="Steps per picture.",
)
@click.option(
    "--seeds", type=click.IntRange(1, 100), default=2, show_default=True, help="Pictures to make."
)
@click.option("--json", "json_path", type=_PATH, help="Result file.")
@click.option("--sheet", type=_PATH, help="PNG file with both pictures and their difference.")
def compare(**options: Any) -> None:
    """Makes the same pictures with two configurations and reports how much they differ.

    A configuration consists of words joined by +: a dtype (bfloat16, float32), how weights are
    stored (int8, fp8, nf4), what layers multiply in (compute-int8, compute-fp8), how keys and
    values are kept (cache-int8, cache-fp8), a choice of kernels (reference, triton; library, flash,
    cudnn for the attention), memory switches (kv, no-kv, offload-kv, separate, joint,
    offload-model), a solver, reuse (reuse-careful, reuse-fast) or a quality (exact, high, fast)
    with its own steps, as in bfloat16+no-kv+separate, int8 or float32+high. int8+int8 is
    int8+compute-int8.
    """
    from omnigen_fast.model_defaults import defaults_of

    from .cases import parse_sizes
    from .models import is_random

    try:
        device, model = _target(options)
        is_random(model)
        own = defaults_of(model).call.get("height", 256)
        sizes = parse_sizes(options["size"] or str(own))
        if len(sizes) != 1:
            raise RequestError(f"--size: give one size, got {options['size']!r}")
        sheet = options["sheet"]
        if sheet is not None and sheet.suffix.lower() != ".png":
            raise RequestError(f"--sheet must end in .png, got {sheet}")
        from .quality import compare as run
        from .quality import lines, parse_configuration

        pair = tuple(parse_configuration(options[one]) for one in ("first", "second"))
        found = run(
            model,
            device,
            pair,
            sizes[0],
            options["images"],
            options["steps"],
            options["seeds"],
            sheet,
        )
        found["command"] = list(_command())
        click.echo("\n".join(lines(found)))
        if options["json_path"] is not None:
            import json

            from .record import write_whole

            write_whole(options["json_path"], json.dumps(found, indent=1) + "\n")
    except (OmniGenError, OSError) as error:
        raise _Failure(error) from error
