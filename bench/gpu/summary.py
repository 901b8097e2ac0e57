"""The result in words, and its headline in one line of JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..kernels import workload
from .run import FAILED, OK


def headline(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers that one looks for first; what was not measured is not there."""
    parts = result["parts"]
    found: dict[str, Any] = {"state": result["state"]}
    found["parts"] = {name: part["status"] for name, part in parts.items()}
    world = parts.get("environment", {})
    for name in ("device", "copy_bytes_per_second", "product_flops_per_second"):
        if name in world:
            found[name] = world[name]
    found["failed"] = [
        f"{name}: {row.get('kernel') or row.get('check') or row.get('case')}"
        for name, part in parts.items()
        for row in part.get("rows", [])
        if row["status"] == FAILED
    ][:20]
    found["pictures"] = {
        row["case"]: {
            "step_seconds": _step(row),
            "share_of_datasheet_peak": row["share_of_datasheet_peak"],
            "share_of_measured_rate": row["share_of_measured_rate"],
            "picture_seconds": row.get("picture_seconds"),
            "peaks": row["peaks"],
        }
        for row in parts.get("pictures", {}).get("rows", [])
        if row["status"] == OK
    }
    found["kernels_share_of_limit"] = {
        row["case"]: row["share_of_limit"]
        for row in parts.get("operations", {}).get("rows", [])
        if row["status"] == OK and row["contender"] == workload.KERNELS
    }
    found["faster_than_diffusers"] = {
        row["case"]: row["ratio"]
        for row in parts.get("peer", {}).get("rows", [])
        if row["status"] == OK
    }
    return found


def _step(row: dict[str, Any]) -> float:
    return row.get("captured_step", row["eager_step"])["seconds"]


def lines(result: dict[str, Any]) -> list[str]:
    """One readable page."""
    said = [f"{result['state']}; {result.get('seconds', 0):.0f} s of {result['budget_seconds']:g}"]
    for name, part in result["parts"].items():
        why = f": {part['why']}" if "why" in part else ""
        said.append(f"{name}: {part['status']}{why} ({part.get('seconds', 0):.1f} s)")
        rows = part.get("rows", [])
        if name == "environment":
            said += _world(part)
        elif name in ("kernels", "model"):
            counts = Counter(row["status"] for row in rows)
            said.append("  checks: " + ", ".join(f"{n} {one}" for one, n in counts.items()))
            said += [f"  {_check(row)}" for row in rows if name == "model" or row["status"] != OK]
        elif name == "operations":
            said += _table([_operation(row, rows) for row in rows])
        elif name == "attention":
            said += _table([_raced(row) for row in rows])
            said += [
                f"  fastest, head_dim {dim}: {one}" for dim, one in part.get("winners", {}).items()
            ]
        elif name == "pictures":
            said += _table([_picture(row) for row in rows])
        elif name == "peer":
            said += _table([_peer(row) for row in rows])
    return said


def _world(part: dict[str, Any]) -> list[str]:
    keys = ("device", "capability", "driver", "python", "versions", "cuda", "clocks_after")
    said = [f"  {key}: {part[key]}" for key in keys if part.get(key) is not None]
    if "copy_bytes_per_second" in part:
        copy, product = part["copy_bytes_per_second"], part["product_flops_per_second"]
        said.append(f"  copy {copy / 1e9:.0f} GB/s, bfloat16 product {product / 1e12:.4g} TFLOP/s")
    return said


def _check(row: dict[str, Any]) -> str:
    name = row.get("check") or f"{row['kernel']} {row.get('dtype', '')} {row.get('shape', '')}"
    error = f", error {row['error']:.1e}" if "error" in row else ""
    plain = f" (plain PyTorch {row['plain_error']:.1e})" if "plain_error" in row else ""
    why = f", {row['why']}" if "why" in row else ""
    return f"{name}: {row['status']}{error}{plain}{why}"


def _unmeasured(*names: str, row: dict[str, Any]) -> tuple[str, ...]:
    return (*names, f"{row['status']}: {row.get('why', '')}")


def _time(one: dict[str, Any]) -> str:
    scale, unit = (1e6, "us") if one["seconds"] < 1e-2 else (1e3, "ms")
    return f"{one['seconds'] * scale:.1f} {unit} ± {one['spread'] * scale:.1f}"


def _operation(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, ...]:
    names = (row["case"], row["contender"])
    if row["status"] != OK:
        return _unmeasured(*names, row=row)
    against = ""
    if row["contender"] == workload.KERNELS:
        others = [
            one
            for one in rows
            if one["case"] == row["case"]
            and one["status"] == OK
            and one["contender"] != workload.KERNELS
            and not one["needs_other_inputs"]
        ]
        if others:
            best = min(others, key=lambda one: one["seconds"])
            against = f"{best['seconds'] / row['seconds']:.2f}x the best of PyTorch"
            against += f" ({best['contender']})"
    return (*names, _time(row), f"{row['share_of_limit']:.0%} of the limit", against)


def _raced(row: dict[str, Any]) -> tuple[str, ...]:
    names = row["case"], row.get("contender", "")
    if row["status"] != OK:
        return _unmeasured(*names, row=row)
    return (*names, f"{row['seconds'] * 1e6:.1f} us", f"again {row['again'] * 1e6:.1f} us")


def _picture(row: dict[str, Any]) -> tuple[str, ...]:
    if "eager_step" not in row or "share_of_measured_rate" not in row:
        return _unmeasured(row["case"], row=row)
    peak = row["share_of_datasheet_peak"]
    captured = f"captured {_time(row['captured_step'])}" if "captured_step" in row else ""
    peaks = row["peaks"]
    total = row.get("picture_seconds", row.get("seconds_of_the_steps_run"))
    total_said = ""
    if total is not None:
        total_said = f"{total:.2f} s for {row['steps_run']} of {row['steps_of_a_picture']} steps"
    second = row.get("second_picture")
    return (
        row["case"],
        row["status"],
        f"prefill {row['prefill']['seconds']:.3f} s",
        f"{row['tflop_per_step']:.4g} TFLOP",
        f"eager {_time(row['eager_step'])}",
        captured,
        f"{peak:.0%} of peak" if peak else "",
        f"{row['share_of_measured_rate']:.0%} of the product's rate",
        total_said,
        f"again +{second['overhead_share']:.1%}" if second else "",
        f"{peaks['allocated_gb']:.2f} / {peaks['reserved_gb']:.2f} GB" if peaks else "",
    )


def _peer(row: dict[str, Any]) -> tuple[str, ...]:
    if row["status"] != OK:
        return _unmeasured(row["case"], row=row)
    ours, theirs = _time(row["ours"]), _time(row["diffusers"])
    return (row["case"], f"ours {ours}", f"diffusers {theirs}", f"{row['ratio']:.2f}x")


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    columns = max(map(len, rows), default=0)
    widths = [
        max((len(row[i]) for row in rows if i < len(row) - 1), default=0) for i in range(columns)
    ]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in rows
    ]
