"""Each operation's time against its limit and against the best that PyTorch has."""

from __future__ import annotations

from typing import Any

import torch

from ..kernels import workload
from .measure import Clock, sample
from .run import FAILED, NO_GPU, NO_TIME, NOT_MEASURED, OK, Run, first_line


def operations(run: Run, found: dict[str, Any]) -> None:
    """Kernels, reference, compiled reference, libraries; then the matrix products of a layer."""
    run.drop()
    clock, rows = Clock(run.device), found.setdefault("rows", [])
    torch.manual_seed(0)
    for name in workload.CASES:
        case = workload.build(name, run.device, run.sizes.operations)
        for contender in case.contenders:
            row: dict[str, Any] = {
                "case": name,
                "contender": contender,
                "bytes": case.bytes,
                "flops": case.flops,
                "limit_seconds": run.limits.floor(case),
                "needs_other_inputs": contender in case.unequal,
            }
            rows.append(row)
            _time(run, clock, case, contender, row)
        del case
        if run.on_gpu:
            torch.cuda.empty_cache()
        run.save()
    for row in _products(run, clock):
        rows.append(row)
    failed = [f"{row['case']} ({row['contender']})" for row in rows if row["status"] == FAILED]
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")


def _time(run: Run, clock: Clock, case: workload.Case, contender: str, row: dict[str, Any]) -> None:
    if not run.on_gpu and contender in (workload.KERNELS, workload.COMPILED):
        row.update(status=NOT_MEASURED, why=NO_GPU)
        return
    if run.left() < (8 if run.on_gpu else 0.2):
        row.update(status=NOT_MEASURED, why=NO_TIME)
        return
    # the reference of these reads lengths on the host
    capture = contender != workload.REFERENCE or case.name not in workload._NOT_COMPILED
    try:
        workload.check(case, contender)
        case.reset()
        budget = 0.3 if run.on_gpu else 0.01
        times, how = sample(case.contenders[contender], clock, budget, capture)
    except (RuntimeError, NotImplementedError) as error:
        if "No available kernel" in str(error):
            row.update(status=NOT_MEASURED, why="not in this build of PyTorch")
        elif contender == workload.KERNELS:
            row.update(status=FAILED, why=first_line(error))
        else:
            row.update(status=NOT_MEASURED, why=first_line(error))
        return
    except Exception as error:  # of the compiler, or a result that is wrong
        status = FAILED if contender == workload.KERNELS else NOT_MEASURED
        row.update(status=status, why=first_line(error))
        return
    row.update(times, status=OK, launched=how)
    row["share_of_limit"] = row["limit_seconds"] / times["seconds"]


def _products(run: Run, clock: Clock) -> list[dict[str, Any]]:
    """The products of a layer: what the step's matrix work could reach at best."""
    size, rows = run.sizes.operations, []
    for name, count, inputs, outputs in (
        ("qkv", size.rows, size.hidden, 3 * size.hidden),
        ("o", size.rows, size.hidden, size.hidden),
        ("gate_up", min(size.rows, 4096), size.hidden, 2 * size.inner),
        ("down", min(size.rows, 4096), size.inner, size.hidden),
    ):
        row: dict[str, Any] = {"case": f"product {name}", "contender": "torch.mm"}
        rows.append(row)
        if run.left() < (4 if run.on_gpu else 0.2):
            row.update(status=NOT_MEASURED, why=NO_TIME)
            continue
        x, weight = (
            torch.randn(shape, device=run.device).bfloat16()
            for shape in ((count, inputs), (outputs, inputs))
        )
        out = x.new_empty(count, outputs)
        flops = 2 * count * inputs * outputs
        times, how = sample(
            lambda x=x, w=weight, o=out: torch.mm(x, w.t(), out=o),
            clock,
            0.3 if run.on_gpu else 0.01,
            True,
        )
        row.update(times, status=OK, launched=how, flops=flops)
        row["share_of_limit"] = flops / times["seconds"] / run.limits.flops_per_second
    return rows
