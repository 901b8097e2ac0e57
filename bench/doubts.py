"""Which cells have doubtful times: others used the machine, or the limit was measured too low."""

from __future__ import annotations

from typing import Any

LARGEST_SPREAD = 0.20  # of the median


def doubts(cell: dict[str, Any]) -> list[str]:
    """Reasons to measure a cell of a result again, each in a few words; none if it is steady.

    Spread is the distance of the extremes for pictures, which are few, and of the quartiles for
    steps.
    """
    found = []
    for name, row in cell["contenders"].items():
        if row["status"] != "ok":
            continue
        pictures, steps = row["picture"], row["step"]
        spreads = {
            "pictures": pictures["highest"] - pictures["lowest"],
            "steps": steps["spread"] if steps["samples"] > 2 else 0.0,
        }
        medians = {"pictures": pictures["seconds"], "steps": steps["seconds"]}
        found += [
            f"{name}'s {what} spread over {spreads[what] / medians[what]:.0%} of their median"
            for what in spreads
            if spreads[what] > LARGEST_SPREAD * medians[what]
        ]
        shares = [row.get(key) or 0.0 for key in ("share_of_limit", "share_of_limit_step")]
        if max(shares) > 1:
            found.append(f"{max(shares):.0%} of the limit, which was measured too low")
    return found


def raise_limit(result: dict[str, Any], flops_per_second: float) -> None:
    """Takes a higher rate of products as the limit, also for the cells that are there already."""
    limits = result["limits"]
    factor = limits["product_flops_per_second"] / flops_per_second
    if factor >= 1:
        return
    limits["product_flops_per_second"] = flops_per_second
    for cell in result["cells"]:
        ours = cell["contenders"]["omnigen_fast"]
        for key in ("share_of_limit", "share_of_limit_step"):
            if ours.get(key):
                ours[key] *= factor
