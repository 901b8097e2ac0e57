"""A result in words: tables for the terminal and for Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnigen_fast.errors import RequestError

from .cases import COLUMNS
from .record import write_whole

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
_OURS = "omnigen_fast"
Rows = list[list[str]]
_LEGEND = (  # the second of tables with another program
    "GB: peak without what was allocated before; s: median (lowest to highest); share of the "
    "limit: of ours, by the operations alone, above 100 % if the measured limit was disturbed",
    "x ours: that program's time over ours, above 1 is slower",
)


def lines(result: dict[str, Any]) -> list[str]:
    """One readable page for the terminal."""
    said = ["", *_world(result), ""]
    for title, rows in _tables(result):
        said += [title, *aligned(rows), ""]
    compared = any("x ours" in line for line in said)
    return [*said, *(_LEGEND if compared else _LEGEND[:1]), *_footnotes(result)]


def markdown(result: dict[str, Any]) -> str:
    """The same page in Markdown."""
    parts = [" ".join(_world(result)), ""]
    for title, rows in _tables(result):
        parts += [title, "", *_pipes(rows), ""]
    return "\n".join([*parts, *(f"{line}  " for line in _footnotes(result))]).rstrip() + "\n"


def write_markdown(path: Path, text: str) -> None:
    """Writes a file, or replaces what stands between the marks of one that has them.

    Raises:
        RequestError: the file is there and has no marks.
        OSError: it can't be written.
    """
    if path.exists():
        before = path.read_text(encoding="utf-8")
        if BEGIN not in before or END not in before:
            raise RequestError(
                f"--md: {path} is there and has no lines {BEGIN} and {END} to write between; give "
                "another file"
            )
        head, _, rest = before.partition(BEGIN)
        tail = rest.partition(END)[2]
        text = f"{head}{BEGIN}\n{text}{END}{tail}"
    write_whole(path, text)


def aligned(rows: Rows) -> list[str]:
    """Columns under one another."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _pipes(rows: Rows) -> list[str]:
    head, *rest = rows
    marked = [head, ["---"] * len(head), *rest]
    return ["| " + " | ".join(row) + " |" for row in marked]


def _world(result: dict[str, Any]) -> list[str]:
    world = result["machine"]
    versions = ", ".join(f"{name} {one}" for name, one in world["versions"].items() if one)
    for name, peer in result["peers"].items():
        for package, one in (peer.get("versions") or {}).items():
            if package != "torch":
                versions += f", {package} {one} ({name})"
    compiled = ", operations compiled" if result.get("compiled") else ""
    limits = result.get("limits", {})
    rate = limits.get("product_flops_per_second")
    said = [
        f"{result['device']}, {world['date']}, {versions}.",
        f"Model: {result['model']}, {result['dtype']}{compiled}, {result['steps']} steps a "
        f"picture, median of {result['repeat']} after a warm-up, interleaved.",
        f"Made with `{shlex.join(result['command'])}`.",
    ]
    if rate:
        said.append(
            f"The limit is the operations of a picture over {rate / 1e12:.3g} TFLOP/s, the rate of "
            "the fastest of some large matrix products measured in the same run."
        )
    if result["state"] != "complete":
        said.append(f"The run is {result['state']}: what is missing was not measured.")
    return said


def _tables(result: dict[str, Any]) -> list[tuple[str, Rows]]:
    sizes = [cell for cell in result["cells"] if cell["setting"] == "default"]
    settings = [cell for cell in result["cells"] if cell["setting"] != "default"]
    tables = []
    if sizes:
        tables.append(("A picture, by size:", _table(sizes, "size", "picture")))
        tables.append(("A step, by size:", _table(sizes, "size", "step")))
    if settings:
        title = f"A picture of {settings[0]['size']}, by setting:"
        tables.append((title, _table(settings, "setting", "picture")))
    return tables


def _table(cells: Sequence[dict[str, Any]], key: str, what: str) -> Rows:
    columns = [one for one in COLUMNS if any(cell["column"] == one for cell in cells)]
    names = list(dict.fromkeys(name for cell in cells for name in cell["contenders"]))
    rows: Rows = [[key, "", *columns]]
    for row_name in dict.fromkeys(cell[key] for cell in cells):
        mine = {cell["column"]: cell for cell in cells if cell[key] == row_name}
        found = [mine.get(column) for column in columns]
        for name in names:
            label = row_name if name == names[0] else ""
            rows.append([label, name, *(_entry(cell, name, what) for cell in found)])
        if what == "picture" and any(cell and cell["documented"] for cell in found):
            rows.append(["", "documented", *map(_documented, found)])
        rows.append(["", "share of the limit", *(_share(cell, what) for cell in found)])
    return rows


def _entry(cell: dict[str, Any] | None, name: str, what: str) -> str:
    if cell is None:
        return "not reached"
    row = cell["contenders"].get(name, {"status": "not measured", "why": "not reached"})
    if row["status"] != "ok":
        return row["status"]
    one = row[what]
    said = f"{one['seconds']:.2f} s ({one['lowest']:.2f} to {one['highest']:.2f})"
    if what == "picture" and row.get("peak_gb") is not None:
        said = f"{row['peak_gb']:.2f} GB, {said}"
    ratio = row.get(f"{what}_ratio")
    return said if ratio is None else f"{said}, {ratio:.2f}x ours"


def _documented(cell: dict[str, Any] | None) -> str:
    if cell is None or not cell["documented"]:
        return ""
    one = cell["documented"]
    return one if isinstance(one, str) else f"{one['gb']:g} GB, {one['seconds']:g} s"


def _share(cell: dict[str, Any] | None, what: str) -> str:
    key = "share_of_limit" if what == "picture" else "share_of_limit_step"
    share = cell["contenders"][_OURS].get(key) if cell else None
    return "" if share is None else f"{share:.0%}"


def _footnotes(result: dict[str, Any]) -> list[str]:
    said = []
    for name, peer in result["peers"].items():
        if "why" in peer:
            said.append(f"{name}: {peer['status']}: {peer['why']}.")
            continue
        checks = [check for check in result["checks"] if check["peer"] == name]
        worst = max((check["difference"] for check in checks), default=None)
        cells = [cell["contenders"].get(name, {}) for cell in result["cells"]]
        apart = [cell["difference"] for cell in cells if cell.get("difference") is not None]
        if worst is not None:
            said.append(
                f"{name}: in float32 at most {worst:.0e} from ours ({len(checks)} checks), in the "
                f"cells at most {max(apart, default=0):.0e} in {result['dtype']}."
            )
    return [*said, *_reasons(result), *_warnings(result), *_beside(result)]


def _warnings(result: dict[str, Any]) -> list[str]:
    """Cells that stayed doubtful when they were measured again."""
    return [
        f"Warning: {cell['size']}, {cell['setting']}, {cell['column']}: {one}."
        for cell in result["cells"]
        for one in cell.get("warnings", ())
    ]


def _reasons(result: dict[str, Any]) -> list[str]:
    """Why cells have no time, each reason once."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for cell in result["cells"]:
        for name, row in cell["contenders"].items():
            known = "why" in result["peers"].get(name, {})
            if row["status"] not in ("ok", "not installed") and not known:
                where = f"{cell['size']}, {cell['setting']}, {cell['column']}"
                places.setdefault((name, row["status"], row.get("why", "")), []).append(where)
    return [
        f"{name}: {status}: {why} ({where[0] if len(where) == 1 else f'{len(where)} cells'})."
        for (name, status, why), where in places.items()
    ]


def _beside(result: dict[str, Any]) -> list[str]:
    """Cold start and VAE."""
    said = []
    cold = result.get("cold_start")
    if cold:
        said.append(f"Cold start: {_cold(cold)}.")
    vae = result.get("vae")
    if vae and vae["status"] == "ok":
        said.append(
            f"VAE, {vae['size']}: encode {vae['encode']['seconds']:.2f} s, decode "
            f"{vae['decode']['seconds']:.2f} s; no picture above has it."
        )
    return said


def _cold(cold: dict[str, Any]) -> str:
    if cold["status"] != "ok":
        return f"{cold['status']}: {cold['why']}"
    return (
        f"{cold['seconds']:.2f} s from the command to the first picture ({cold['size']}, VAE "
        f"included): load {cold['load_seconds']:.2f} s, picture {cold['picture_seconds']:.2f} s"
    )
