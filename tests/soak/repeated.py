"""Six requests again and again, between others under other plans: one answer each."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from .mixed import LORA, References, State, WrongBits, digest, draw, load
from .requests import PALETTE, PLANS, SIX


def repeat(rng: random.Random, dtype: str, rounds: int, done: Callable[[], None]) -> int:
    """Runs each of the six requests `rounds` times in one dtype, in an order that chance decides.

    Args:
        done: called after each of them.

    Returns:
        How many calls there were, those in between included.

    Raises:
        WrongBits: an answer is not that of a fresh pipeline.
    """
    pipe, references, calls = load(dtype), References(), 0
    for _ in range(rounds):
        for name in rng.sample(list(SIX), len(SIX)):
            request, plan, with_lora = SIX[name]
            if rng.random() < 0.5:
                draw(pipe, rng.choice(list(PALETTE)), memory=rng.choice(list(PLANS.values())))
                calls += 1
            if with_lora:
                pipe.load_lora_weights(LORA, "style")
            found = digest(draw(pipe, request, memory=PLANS[plan]))
            if with_lora:
                pipe.unload_lora_weights()
            plan_used = replace(PLANS[plan], precision=None)
            if found != references.of(State(request, dtype, plan_used, float(with_lora))):
                raise WrongBits(f"{name} in {dtype}")
            calls += 1
            done()
    return calls
