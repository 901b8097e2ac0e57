"""What copies and products reach on this machine: measured once for the tests of a process.

The largest products take more than a minute of a core, and tests look at no number closely.
"""

from __future__ import annotations

from functools import cache
from unittest import mock

import torch

from bench.kernels import workload

_measure = workload.measure_limits


@cache
def measured_limits(device: torch.device, dtype: torch.dtype) -> workload.Limits:
    """Instead of `workload.measure_limits`: of a smaller product."""
    with mock.patch.dict(workload._PRODUCTS, {"cpu": [(256, 256, 256)]}):
        return _measure(device, dtype)
