"""Writes into the documents what commands print and results say.

    python -m bench.docs            # rewrites what is out of date
    python -m bench.docs --check    # names it instead, and fails if there is any

Two kinds of text are generated: the output below a command in a line of its own (`    $ ...`), and
tables between markers, of result files and of what the code knows; `refreshed` names them all.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omnigen_fast import fewer_steps, profiles
from omnigen_fast.memory.overview import cards
from omnigen_fast.parallel.planner import Cards, gains

from . import report, serve_load
from .common import ROOT
from .kernels import bounds

README, BENCHMARKS = ROOT / "README.md", ROOT / "docs" / "benchmarks.md"
RELIABILITY, FUZZED = ROOT / "docs" / "reliability.md", ROOT / "tests" / "fuzz" / "results.json"
FUZZ = "<!-- fuzz: begin -->", "<!-- fuzz: end -->"
SOAKED = ROOT / "tests" / "soak" / "results.json"
SOAK = "<!-- soak: begin -->", "<!-- soak: end -->"
SERVING, ERRORS = ROOT / "docs" / "serving.md", ("<!-- errors: begin -->", "<!-- errors: end -->")
FEWER, MEASURED = ROOT / "docs" / "fewer-steps.md", ROOT / "bench/results/fewer-steps.json"
CHOSEN = "<!-- presets: begin -->", "<!-- presets: end -->"
GRID = "<!-- grid: begin -->", "<!-- grid: end -->"
DISTANCE = "<!-- distance: begin -->", "<!-- distance: end -->"
RATIOS = "<!-- ratios: begin -->", "<!-- ratios: end -->"
PRECISION = ROOT / "docs" / "precision.md"
CARDS = "<!-- cards: begin -->", "<!-- cards: end -->"
_CARDS = (4, 6, 8, 12)  # GB
SHARED = ROOT / "docs" / "several-gpus.md"
GAINS = "<!-- gains: begin -->", "<!-- gains: end -->"
_SEVERAL = ((2, "rtx3090"), (2, "h100"), (8, "h100"))
_SHOWN, _COMMAND = " " * 4, "    $ "  # how output is indented, and a command
_RESULT = re.compile(r"\(\.\./(bench/results/bench-[\w.-]+\.json)\)")


def paths() -> list[Path]:
    """Every document in which something is generated."""
    return [README, *sorted((ROOT / "docs").glob("*.md"))]


def refreshed(path: Path) -> str:
    """What a document should say."""
    text = _with_output(path.read_text(encoding="utf-8"))
    if path == BENCHMARKS:
        text = _between(text, (report.BEGIN, report.END), report.markdown(result()))
        text = _between(text, (bounds.BEGIN, bounds.END), bounds.markdown())
        served = json.loads(serve_load.RESULT.read_text(encoding="utf-8"))
        text = _between(text, (serve_load.BEGIN, serve_load.END), serve_load.markdown(served))
    if path == README:
        text = _between(text, RATIOS, ratios(result()))
    if path == PRECISION:
        text = _between(text, CARDS, cards(profiles.load("rtx4060"), _CARDS))
    if path == SHARED:
        cards_of = [Cards(count, profiles.load(name)) for count, name in _SEVERAL]
        text = _between(text, GAINS, gains(cards_of))
    if path == FEWER:
        found = json.loads(MEASURED.read_text(encoding="utf-8"))
        text = _between(text, CHOSEN, presets(fewer_steps.table()["presets"], found["presets"]))
        text = _between(text, GRID, grid(found["grid"]))
        text = _between(text, DISTANCE, distance(found["distance"]))
    if path == RELIABILITY:
        text = _between(text, FUZZ, fuzzed(json.loads(FUZZED.read_text(encoding="utf-8"))))
        text = _between(text, SOAK, soaked(json.loads(SOAKED.read_text(encoding="utf-8"))))
    if path == SERVING:
        text = _between(text, ERRORS, errors())
    return text


def errors() -> str:
    """The errors of the server: a Markdown table."""
    from omnigen_fast.server.errors import KINDS

    rows = [f"| {kind.status} | `{kind.code}` | {kind.when} |" for kind in KINDS]
    return "\n".join(["| status | code | when |", "|---|---|---|", *rows])


def result() -> dict[str, Any]:
    """The measurement that the documents show."""
    found = _RESULT.search(BENCHMARKS.read_text(encoding="utf-8"))
    assert found, f"{BENCHMARKS} links to no result"
    return json.loads((ROOT / found[1]).read_text())


def ratios(found: dict[str, Any]) -> str:
    """How many times as long the peers take: a Markdown table with a row for each."""
    cells = [cell["contenders"] for cell in found["cells"]]
    lines = [
        f"Time of each program divided by ours, over {len(cells)} combinations of sizes and images "
        f"({found['device']}, {found['dtype']}, {found['steps']} steps, "
        f"{found['machine']['date']}):",
        "",
        "| | whole image | single step |",
        "| --- | --- | --- |",
    ]
    for name in found["peers"]:
        rows = [cell[name] for cell in cells if cell.get(name, {}).get("status") == "ok"]
        if rows:
            spans = [_span([row[f"{what}_ratio"] for row in rows]) for what in ("picture", "step")]
            lines.append(f"| {name} | {' | '.join(spans)} |")
    return "\n".join(lines) + "\n"


def fuzzed(found: dict[str, Any]) -> str:
    """What a long run of `make fuzz` found: a Markdown table with a row for each kind of input."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        f"Seed {found['seed']}, {found['date']}, {found['processor']}, {found['jobs']} processes, "
        f"{found['seconds'] / 60:.0f} minutes ({versions}):",
        "",
        "| kind | inputs | taken | refused | faults | slowest (s) | most memory (MB) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, kind in found["kinds"].items():
        counts = (kind[what] for what in ("inputs", "taken", "refused"))
        cells = [f"{count:,}" for count in (*counts, len(kind["faults"]))]
        cells += [f"{kind['slowest'][0]:.2f}", f"{kind['largest'][0] / 1e6:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def soaked(found: dict[str, Any]) -> str:
    """What `make soak` found: sentences, and the curve of memory as a Markdown table."""
    parts = ("mixed", "repeated", "failures", "interrupts")
    mixed, curve = found["mixed"], found["mixed"]["curve"]
    calls, failures, interrupts = (
        sum(found[part][what].values())
        for part, what in zip(parts[1:], ("calls", "tried", "tried"))
    )
    lines = [
        f"Seed {found['seed']}, {found['date']}, {found['processor']}, one thread, PyTorch "
        f"{found['torch']}: {mixed['requests']:,} mixed requests, {calls:,} calls of the six, "
        f"memory that ran out {failures:,} times, Ctrl-C {interrupts:,} times; "
        f"{sum(len(found[part]['faults']) for part in parts)} faults. In the last third of the "
        f"mixed requests, memory changed by {mixed['bytes_per_request']} bytes per request.",
        "",
        "| requests | resident (MB) | handed out (MB) | tensors | threads | files |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for point in curve[:: max(1, len(curve) // 10)]:
        memory = (f"{point[what] / 1e6:.0f}" for what in ("rss", "in_use"))
        counts = (str(point[what]) for what in ("tensors", "threads", "files"))
        lines.append(f"| {point['request']:,} | {' | '.join((*memory, *counts))} |")
    return "\n".join(lines) + "\n"


def presets(table: Mapping[str, Any], found: dict[str, Any]) -> str:
    """What each quality stands for, and what it cost and gave."""
    lines = [
        "| `quality` | steps | `solver` | `reuse` | operations | attributes | whole pictures "
        "| PSNR | SSIM |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found["rows"].items():
        chosen = table[name]
        cells = [f'`"{name}"`', str(chosen["num_inference_steps"])]
        cells += [f'`"{chosen[what]}"`' for what in ("solver", "reuse")]
        lines.append(f"| {' | '.join((*cells, *_scored(row, found['rows'])))} |")
    return "\n".join([*lines, "", _measured(found)]) + "\n"


def grid(found: dict[str, Any]) -> str:
    """Every configuration that was measured."""
    lines = [
        "| | operations | attributes | whole pictures | PSNR | SSIM | s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in found["rows"].items():
        cells = (name, *_scored(row, found["rows"]), f"{row['seconds']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _measured(found)]) + "\n"


def _scored(row: dict[str, Any], rows: dict[str, Any]) -> list[str]:
    exact = rows["exact"]
    similar = ["-", "-"]
    if row is not exact:
        similar = [f"{row['psnr']:.1f} dB", f"{row['ssim']:.3f}"]
    scores = [f"{100 * row[what]:.1f} %" for what in ("attributes", "whole")]
    return [f"1/{exact['flops'] / row['flops']:.2f}", *scores, *similar]


def distance(found: dict[str, Any]) -> str:
    """How far each solver's latents are from those of many steps."""
    lines = ["| | evaluations | distance |", "| --- | --- | --- |"]
    lines += [
        f"| {name} | {row['computed']} | {row['error']:.4f} |"
        for name, row in found["rows"].items()
    ]
    world = f"{found['date']}, {found['processor']}, PyTorch {found['torch']}"
    said = (
        f"From {found['reference']}; mean over {found['prompts']} prompts of all tasks, float32 "
        f"({world})."
    )
    return "\n".join([*lines, "", said]) + "\n"


def _measured(found: dict[str, Any]) -> str:
    return (
        f"{found['pictures_per_task']} prompts of each of {len(found['tasks'])} tasks "
        f"({', '.join(found['tasks'])}), bfloat16, one thread "
        f"({found['date']}, {found['processor']}, PyTorch {found['torch']})."
    )


def _span(values: list[float]) -> str:
    return f"{min(values):.1f}x to {max(values):.1f}x"


def _with_output(text: str) -> str:
    """A text with the output below each command that has some run anew."""
    blocks = text.split("\n\n")
    made: list[str] = []
    printing = False  # whether blocks are still the output of the last command
    for block in blocks:
        if not block.startswith(_SHOWN):
            printing = False
        elif block.startswith(_COMMAND):
            command, _, output = block.partition("\n")
            printing = bool(output.strip()) and not output.startswith(_COMMAND)
            if printing:
                block = f"{command}\n{_output(command.removeprefix(_COMMAND))}"
        elif printing:
            continue
        made.append(block)
    return "\n\n".join(made)


def _output(command: str) -> str:
    from click.testing import CliRunner

    from omnigen_fast.cli.main import main

    program, *arguments = shlex.split(command)
    assert program == "omnigen-fast", f"there is no way to run {command}"
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    lines = result.output.rstrip().splitlines()
    return "\n".join(f"{_SHOWN}{line}".rstrip() for line in lines)


def _between(text: str, marks: tuple[str, str], new: str) -> str:
    head, begin, rest = text.partition(marks[0])
    _, end, tail = rest.partition(marks[1])
    assert begin and end, f"there are no marks {marks}"
    return f"{head}{begin}\n{new}{end}{tail}"


def main() -> None:
    old = [path for path in paths() if refreshed(path) != path.read_text(encoding="utf-8")]
    check = sys.argv[1:] == ["--check"]
    if sys.argv[1:] and not check:
        sys.exit(str(__doc__).strip())
    for path in old:
        if not check:
            path.write_text(refreshed(path), encoding="utf-8")
        print(f"{path.relative_to(ROOT)} {'is out of date' if check else 'rewritten'}")
    sys.exit(int(check and bool(old)))


if __name__ == "__main__":
    main()
