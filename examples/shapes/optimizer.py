"""Muon for the layers' matrices, AdamW for the rest, and the average of the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from omnigen_fast.kernels import widened
from torch import Tensor

from .network import Network

MUON_RATE = 0.01
ADAM_RATE = 1e-3
DECAY = 0.1  # of the layers' matrices, times the rate
_MOMENTUM = 0.95
_EMA = 0.998
_TOGETHER = 5  # matrices that are orthogonalized at a time


@torch.no_grad()
def orthogonalized(matrices: Tensor) -> Tensor:  # [count, rows, columns]
    """The nearest orthogonal matrices, nearly: five Newton-Schulz steps (Jordan et al., 2024)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x.to(widened.fastest(torch.bfloat16))
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(torch.float32)


class Optimizer:
    """Updates float32 masters; the network's own weights, of any dtype, are copies of them."""

    def __init__(self, network: Network) -> None:
        self._weights = {n: p for n, p in network.weights.items() if p.requires_grad}
        self.masters = {n: p.detach().float().clone() for n, p in self._weights.items()}
        self.average = {n: p.clone() for n, p in self.masters.items()}
        self._matrices = [n for n in self.masters if _is_matrix(n)]
        rest = [n for n in self.masters if not _is_matrix(n)]
        self._momentum = {n: torch.zeros_like(self.masters[n]) for n in self._matrices}
        self._adam = torch.optim.AdamW(
            [self.masters[n].requires_grad_() for n in rest],
            lr=ADAM_RATE,
            betas=(0.9, 0.98),
            weight_decay=0,
        )
        self._rest = rest
        self.steps = 0

    @torch.no_grad()
    def step(self, fraction: float, map: Callable[..., Iterable[Any]] = map) -> None:
        """One update with a `fraction` of the full learning rates; clears the gradients.

        `map` may be an executor's, to spread the work over several cores.
        """
        for name in self._rest:
            grad = self._weights[name].grad
            # None where no task of this step has the weight: no input image, for instance
            self.masters[name].grad = None if grad is None else grad.float()
        for group in self._adam.param_groups:
            group["lr"] = ADAM_RATE * fraction
        self._adam.step()
        self._muon_step(MUON_RATE * fraction, map)
        self.steps += 1
        decay = min(_EMA, self.steps / (self.steps + 10))
        masters, average = list(self.masters.values()), list(self.average.values())
        torch._foreach_lerp_(average, masters, 1 - decay)
        for name, weight in self._weights.items():
            weight.copy_(self.masters[name])
            weight.grad = None

    def _muon_step(self, rate: float, map: Callable[..., Iterable[Any]]) -> None:
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for name in self._matrices:
            grad, momentum = self._weights[name].grad.float(), self._momentum[name]
            momentum.lerp_(grad, 1 - _MOMENTUM)
            update = grad.lerp_(momentum, _MOMENTUM)
            for part, of in zip(_parts(name, update), _parts(name, self.masters[name])):
                by_shape[part.shape].append((part, of))
        groups = [
            pairs[first : first + _TOGETHER]
            for pairs in by_shape.values()
            for first in range(0, len(pairs), _TOGETHER)
        ]
        stacks = [torch.stack([update for update, _ in group]) for group in groups]
        for group, updates in zip(groups, map(orthogonalized, stacks)):
            scale = max(1, updates.shape[1] / updates.shape[2]) ** 0.5
            for update, (_, master) in zip(updates, group):
                master.mul_(1 - rate * DECAY).add_(update, alpha=-rate * scale)

    def averaged(self, network: Network) -> dict[str, Tensor]:
        """All weights of a network by their names, averaged over the latest steps."""
        return network.named() | {n.replace("/", "."): p for n, p in self.average.items()}

    def state(self) -> dict:
        """All that a resumed training needs."""
        return {
            "masters": self.masters,
            "average": self.average,
            "momentum": self._momentum,
            "adam": self._adam.state_dict(),
            "steps": self.steps,
        }

    @torch.no_grad()
    def load(self, state: dict) -> None:
        """Goes on from a `state`."""
        for mine, saved in (
            (self.masters, state["masters"]),
            (self.average, state["average"]),
            (self._momentum, state["momentum"]),
        ):
            for name, value in mine.items():
                value.copy_(saved[name])
        self._adam.load_state_dict(state["adam"])
        self.steps = state["steps"]
        for name, weight in self._weights.items():
            weight.copy_(self.masters[name])


def _is_matrix(name: str) -> bool:
    return name.startswith("layers/") and name.endswith("proj")


def _parts(name: str, matrix: Tensor) -> Iterable[Tensor]:
    """The matrices that a fused one is made of."""
    if name.endswith("qkv_proj"):
        return matrix.split(matrix.shape[1]) if matrix.shape[0] % matrix.shape[1] == 0 else [matrix]
    return matrix.chunk(2) if name.endswith("gate_up_proj") else [matrix]
