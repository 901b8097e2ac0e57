"""Times every kernel against the reference and the best of PyTorch, where it runs.

    python -m pytest bench/kernels --benchmark-only

On a GPU at the sizes of the real model in bfloat16; without one the reference alone, at small
sizes, and what needs a GPU is reported as not measured. Each contender is held to the float64
result before it is timed. A round is many calls in a row and waits for the device at its end, so
launches overlap with work as in a step.
"""

from __future__ import annotations

import functools

import pytest
import torch
import workload

ON_GPU = torch.cuda.is_available()


@functools.lru_cache(maxsize=1)  # one case's inputs at a time
def case_of(name: str) -> workload.Case:
    return workload.build(name, torch.device("cuda" if ON_GPU else "cpu"))


CONTENDERS = [
    (name, contender)
    for name in workload.CASES
    for contender in workload.contenders_of(name, ON_GPU)
]


@pytest.mark.parametrize(
    ("name", "contender"), CONTENDERS, ids=["-".join(pair) for pair in CONTENDERS]
)
def test_time(name, contender, benchmark, report):
    case = case_of(name)
    assert list(case.contenders) == workload.contenders_of(name, ON_GPU)
    row = {
        "case": name,
        "contender": contender,
        "bytes": case.bytes,
        "flops": case.flops,
        "floor": report.limits.floor(case),
        "seconds": None,
        "spread": None,
        "why": None,
    }
    report.rows.append(row)
    if not ON_GPU and contender in (workload.KERNELS, workload.COMPILED):
        row["why"] = "no GPU"
        pytest.skip("no GPU: reported as not measured")
    run = case.contenders[contender]
    try:
        workload.check(case, contender)
    except (RuntimeError, ValueError) as error:
        if not any(said in str(error) for said in workload.UNAVAILABLE):
            raise
        row["why"] = "not in this build of PyTorch"
        pytest.skip("PyTorch has no such attention here: reported as not measured")
    once = workload.seconds(run, report.device, budget=0.0)
    # a round of 20 ms hides the clock and the wait at its end
    iterations = max(1, min(200, int(0.02 / once)))
    benchmark._timer = workload.timer_of(report.device)
    benchmark.group = name
    benchmark.pedantic(run, rounds=15, iterations=iterations, warmup_rounds=2)
    row["seconds"], row["spread"] = benchmark.stats.stats.median, benchmark.stats.stats.iqr
    benchmark.extra_info |= {"floor": row["floor"], "of_the_limit": row["floor"] / row["seconds"]}
