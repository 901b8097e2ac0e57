"""The kinds of input, by name, and each one's share of a run of all."""

from __future__ import annotations

import importlib
import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

KINDS = {  # class, and share of a run of all kinds
    "checkpoints": ("checkpoints:Checkpoints", 25),
    "configs": ("configs:Configs", 25),
    "tokenizers": ("tokenizers:Tokenizers", 25),
    "loras": ("loras:Loras", 25),
    "images": ("images:Images", 100),
    "prompts": ("prompts:Prompts", 10),
    "records": ("records:Records", 10),
    "batches": ("batches:Batches", 5),
}


class Kind(ABC):
    """One kind of input. A worker makes one object of it.

    An input is a function of (kind, seed, number), with the same versions of the libraries.
    """

    most_seconds = 5.0  # that reading may take, see oracle.py
    most_bytes = 500_000_000  # memory that reading may take, beside the size of the input itself
    block = 100  # inputs between two requests that must give the same bits

    def __init__(self, folder: Path) -> None:
        """Makes the seeds in an empty folder."""
        self.folder = folder

    @abstractmethod
    def make(self, rng: random.Random, number: int) -> Any:
        """An input. Some numbers are to be run further than others, see `run`."""

    def prepare(self, case: Any) -> Any:
        """What the caller has in its hands: a folder, an open file. Neither timed nor watched."""
        return case

    @abstractmethod
    def run(self, prepared: Any, number: int) -> None:
        """Reads an input. Raises OmniGenError where it is refused."""

    def size(self, case: Any) -> int:
        """Bytes of the input."""
        return 0

    @abstractmethod
    def good(self) -> bytes:
        """The result of a request that nothing is wrong with; always the same bits."""

    def renew(self) -> None:  # noqa: B027 - inputs of most kinds change nothing
        """Forgets all that inputs may have changed."""

    def save(self, case: Any, folder: Path) -> None:
        """Writes an input to a folder, to be looked at."""
        (folder / "input.txt").write_text(ascii(case)[: 1 << 20])


# Kinds that run without torch: their workers start at once, and fork in no time.
LIGHT = {"images", "records"}


def load(name: str, folder: Path) -> Kind:
    """A kind by its name in `KINDS`, or as MODULE:CLASS."""
    module, _, kind = (KINDS[name][0] if name in KINDS else name).partition(":")
    where = f"{__name__}.{module}" if name in KINDS else module
    return getattr(importlib.import_module(where), kind)(folder)


def generator(kind: str, seed: int, number: int) -> random.Random:
    return random.Random(f"{kind} {seed} {number}")


def shares(total: int) -> dict[str, int]:
    """Inputs of each kind in a run of `total`."""
    whole = sum(share for _, share in KINDS.values())
    return {name: max(1, total * share // whole) for name, (_, share) in KINDS.items()}
