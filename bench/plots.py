"""The plots of a result, as PNG files that need no text beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omnigen_fast import profiles
from omnigen_fast.errors import OmniGenError

from .cases import COLUMNS, ORIGINAL_SIZES, Task
from .documented import DEVICES, documented_cell, picture_seconds

COLOURS = ("#1b6ca8", "#e08e45", "#7a9e48", "#9b6bb3")
_GREY = "#8c8c8c"
_STEPS = 50  # of the pictures that the original documents


def require_matplotlib() -> None:
    """Raises OmniGenError where there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise OmniGenError("--plot needs matplotlib; run `pip install matplotlib`") from error


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws all plots of a result; returns their files.

    Raises OSError where one can't be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    if any(
        row["status"] == "ok" for cell in result["cells"] for row in cell["contenders"].values()
    ):
        made.append(_sizes(result, folder / "sizes.png"))
    if result.get("profile"):
        made.append(_limits(result, folder / "limits.png"))
    predicted = _predictions()
    if predicted:
        made.append(_predicted(predicted, folder / "predicted.png"))
    return made


def _figure(width: float, height: float, rows: int, columns: int = 1, **more: Any) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height), layout="constrained", squeeze=False, **more
    )
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path, caption: str) -> Path:
    import matplotlib.pyplot as plt

    figure.supxlabel(caption, fontsize=8, color="#444444")
    # no software version or date in the file: the same data gives the same file
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return path


def _bars(
    axis: Any,
    groups: Sequence[str],
    series: dict[str, list[float | None]],
    labels: dict[str, list[str]],
    colours: dict[str, str],
) -> None:
    """Grouped bars with a text above each; a value that is None is left out."""
    width = 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        places = [group + (index - (len(series) - 1) / 2) * width for group in range(len(groups))]
        drawn = [(place, value) for place, value in zip(places, values) if value is not None]
        axis.bar(
            [place for place, _ in drawn],
            [value for _, value in drawn],
            width * 0.92,
            label=name,
            color=colours[name],
        )
        for place, value, text in zip(places, values, labels[name]):
            axis.annotate(
                text,
                (place, value or 0),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=7,
                color="black" if value is not None else _GREY,
            )
    axis.set_xticks(range(len(groups)), groups, fontsize=8)
    axis.grid(axis="y", color="#e5e5e5")
    axis.margins(y=0.15)


def _sizes(result: dict[str, Any], path: Path) -> Path:
    """Time and memory of a picture against its size and its input images."""
    cells = [cell for cell in result["cells"] if cell["setting"] == "default"]
    names = [
        name
        for name in dict.fromkeys(name for cell in cells for name in cell["contenders"])
        if any(_ok(cell, name) for cell in cells)
    ]
    groups = [f"{cell['size'].replace(', ', chr(10))}\n{cell['column']}" for cell in cells]
    colours = dict(zip(names, COLOURS))
    figure, axes = _figure(max(8.0, 1.35 * len(cells)), 7.4, 2)
    for axis, what in zip(axes.flat, ("seconds", "GB")):
        series: dict[str, list[float | None]] = {}
        labels: dict[str, list[str]] = {}
        for name in names:
            rows = [_ok(cell, name) for cell in cells]
            values = [row and _value(row, what) for row in rows]
            series[name] = values
            labels[name] = [_label(row, value, what) for row, value in zip(rows, values)]
        _bars(axis, groups, series, labels, colours)
    times, memory = axes.flat
    times.set_ylabel("seconds, lower is better")
    times.set_title(
        f"A picture of {result['steps']} steps: time (peers: how many times ours)", loc="left"
    )
    times.legend(frameon=False, fontsize=9)
    memory.set_ylabel("GB, lower is better")
    memory.set_title("Peak memory, weights included", loc="left")
    world = result["machine"]
    return _save(
        figure,
        path,
        f"{result['device']}; {result['model']}, {result['dtype']}; torch "
        f"{world['versions']['torch']}; medians of {result['repeat']}, interleaved; "
        f"{world['date']}",
    )


def _ok(cell: dict[str, Any], name: str) -> dict[str, Any] | None:
    row = cell["contenders"].get(name)
    return row if row and row["status"] == "ok" else None


def _value(row: dict[str, Any], what: str) -> float | None:
    return row["picture"]["seconds"] if what == "seconds" else row["peak_gb"]


def _label(row: dict[str, Any] | None, value: float | None, what: str) -> str:
    if row is None or value is None:
        return "not\nmeasured"
    if what == "seconds" and "picture_ratio" in row:
        return f"{row['picture_ratio']:.1f}x"
    return f"{value:.3g}"


def _limits(result: dict[str, Any], path: Path) -> Path:
    """Each operation's share of its limit, and how much of a step it is."""
    found = result["profile"]
    column, (size, steps) = found["column"], (found["size"], found["step_seconds"])
    rows = [row for row in found["operations"] if row["calls"] and row["seconds"] > 0.002 * steps]
    rows.sort(key=lambda row: row["seconds"])
    figure, axes = _figure(8, 1.6 + 0.42 * len(rows), 1)
    axis = axes[0, 0]
    shares = [row["limit_seconds"] / row["seconds"] * 100 for row in rows]
    axis.barh([row["name"] for row in rows], shares, color=COLOURS[0], height=0.7)
    for place, (row, share) in enumerate(zip(rows, shares)):
        axis.annotate(
            f"{share:.0f} %   ({row['seconds'] / steps:.0%} of the step)",
            (share, place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axis.axvline(100, color=_GREY, linestyle="--", linewidth=1)
    axis.set_xlim(0, max(140, *shares) * 1.25 if shares else 140)
    axis.set_xlabel("share of the limit, %")
    axis.set_title(f"How close each operation of a step comes to its limit: {size}, {column}")
    return _save(
        figure,
        path,
        "limit: bytes over the bandwidth of a copy or operations over the best rate of large "
        "products, both measured in the same run;\n"
        "above 100 %: the data stayed in the processor's caches. "
        f"{result['device']}; {result['model']}; {result['machine']['date']}",
    )


Prediction = tuple[str, list[str], list[float], list[Any]]


def _predictions() -> list[Prediction]:
    """(device, cells, predicted seconds, documented cells) of the documented devices.

    Like with like: the whole picture with the autoencoder, and the original's own switches, the
    KV cache on the host among them.
    """
    tasks = [
        Task(size, images, _STEPS) for size in ORIGINAL_SIZES for images in range(len(COLUMNS))
    ]
    devices = [profiles.load(name) for name in DEVICES]
    if not any(documented_cell(device, task) for device in devices for task in tasks):
        return []
    names = [f"{str(task.size).replace(', ', chr(10))}\n{COLUMNS[task.images]}" for task in tasks]
    return [
        (
            device.name,
            names,
            [picture_seconds(device, task) for task in tasks],
            [documented_cell(device, task) for task in tasks],
        )
        for device in devices
    ]


def _predicted(found: Sequence[Prediction], path: Path) -> Path:
    """Predicted against documented, for the devices that the original's guide has."""
    figure, axes = _figure(15, 4.2 * len(found), len(found))
    ours, theirs = "omnigen_fast, PREDICTED, not measured", "original, as its guide documents"
    for axis, (device, names, seconds, cells) in zip(axes.flat, found):
        documented = [cell["seconds"] if isinstance(cell, dict) else None for cell in cells]
        series: dict[str, list[float | None]] = {ours: list(seconds), theirs: documented}
        labels = {
            ours: [f"{one:.0f}" for one in seconds],
            theirs: [
                f"{one}\n({one / mine:.1f}x)" if one else str(cell or "")
                for one, mine, cell in zip(documented, seconds, cells)
            ],
        }
        _bars(axis, names, series, labels, {ours: COLOURS[0], theirs: COLOURS[1]})
        axis.set_ylabel("seconds, lower is better")
        axis.set_title(f"{device}: a picture of {_STEPS} steps, bfloat16, default settings")
        axis.legend(frameon=False, fontsize=9)
    return _save(
        figure,
        path,
        "Predicted by the planner, not measured. Both are under the original's default settings "
        "(KV cache on the host, guidance branches one by one) and with the autoencoder.\n"
        "Rates are those that others attained on the device.",
    )
