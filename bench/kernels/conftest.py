"""The table that the micro-benchmarks print last, and its JSON."""

from __future__ import annotations

import json
import platform

import pytest
import torch
import workload


class Report:
    """What was measured in this run, and what could not be."""

    def __init__(self) -> None:
        on_gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if on_gpu else "cpu")
        self.limits = workload.measure_limits(self.device, torch.bfloat16)
        self.rows: list[dict] = []

    def world(self) -> dict:
        """Where the numbers come from."""
        import triton

        on_gpu = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {platform.machine()}",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "dtype": "bfloat16",
            "copy_bytes_per_second": self.limits.bytes_per_second,
            "product_flops_per_second": self.limits.flops_per_second,
        }

    def lines(self) -> list[str]:
        head = ("operation", "contender", "time", "rate", "of the limit", "kernels take")
        cells = [head, *(self._cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]

    def _cells(self, row: dict) -> tuple[str, ...]:
        if row["seconds"] is None:
            return (row["case"], row["contender"], f"not measured: {row['why']}", "", "", "")
        own = [
            one["seconds"]
            for one in self.rows
            if one["case"] == row["case"] and one["contender"] == workload.KERNELS
        ]
        ratio = f"{own[0] / row['seconds']:.2f} of it" if own and own[0] else "not measured"
        if row["flops"]:
            rate = f"{row['flops'] / row['seconds'] / 1e12:.3g} TFLOP/s"
        else:
            rate = f"{row['bytes'] / row['seconds'] / 1e9:.4g} GB/s"
        return (
            row["case"],
            row["contender"],
            f"{row['seconds'] * 1e6:.1f} us ± {row['spread'] * 1e6:.1f}",
            rate,
            # what fits a CPU's caches is not bound by the copy that the limit was read from
            f"{row['floor'] / row['seconds']:.0%}" if self.device.type == "cuda" else "-",
            "" if row["contender"] == workload.KERNELS else ratio,
        )


@pytest.fixture(scope="session")
def report(request) -> Report:
    request.config.kernel_report = Report()
    return request.config.kernel_report


def pytest_terminal_summary(terminalreporter) -> None:
    report = getattr(terminalreporter.config, "kernel_report", None)
    if report:
        terminalreporter.section("kernels")
        for line in report.lines():
            terminalreporter.write_line(line)
        terminalreporter.write_line(json.dumps({**report.world(), "rows": report.rows}))
