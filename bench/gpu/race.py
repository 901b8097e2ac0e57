"""Who computes a step's attention fastest on this card: Triton, or a library of PyTorch's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..kernels import workload
from .run import NO_GPU, NO_TIME, NOT_MEASURED, OK, Run

HEAD_DIMS = (96, 64, 128)  # the real model's first
_SECONDS = 12.0  # of a race on a GPU, about


def race(run: Run, found: dict[str, Any]) -> None:
    """A row for each contender and head_dim, and the `winners` by head_dim."""
    run.drop()
    rows = found.setdefault("rows", [])
    won: dict[int, str] = {}
    found["winners"] = won
    torch.manual_seed(0)
    for head_dim in HEAD_DIMS:
        size = run.sizes.operations
        heads = max(1, size.hidden // head_dim)
        size = replace(size, heads=heads, hidden=heads * head_dim)
        case = f"attention_step, head_dim {head_dim}"
        if run.left() < (_SECONDS if run.on_gpu else 2):
            rows.append({"case": case, "status": NOT_MEASURED, "why": NO_TIME})
            continue
        raced = workload.race(run.device, size)
        for name, one in raced.items():
            row: dict[str, Any] = {"case": case, "contender": name}
            if one.seconds is None:
                row |= {"status": NOT_MEASURED, "why": one.why}
            else:
                row |= {"status": OK, "seconds": one.best, "again": max(one.seconds)}
            rows.append(row)
        if not run.on_gpu:
            row = {"case": case, "contender": "triton", "status": NOT_MEASURED, "why": NO_GPU}
            rows.append(row)
        fastest = workload.fastest(raced)
        if fastest is not None:
            won[head_dim] = fastest
        run.save()
