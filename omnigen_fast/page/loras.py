"""The LoRAs that visitors can choose from: those that the page was started with, and no others."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError, brief
from ..request import finite
from ..weights.lora import MAX_SCALE

if TYPE_CHECKING:
    from ..pipeline import OmniGenPipeline

NONE = "none"  # on the page: the model's own weights
_MAX_NAME = 60  # characters


@dataclass(frozen=True)
class Offered:
    """A LoRA that the page was started with."""

    name: str  # as the page shows it: without its folder
    source: str  # as it was given: a file, a folder or a hub id
    weight: float  # at strength 1


@dataclass(frozen=True)
class Chosen:
    """A LoRA with the weight that it acts with."""

    offered: Offered
    weight: float

    def __str__(self) -> str:
        """As the command line's --lora takes it."""
        source = self.offered.source
        return source if self.weight == 1 else f"{source}:{self.weight:g}"


class Loras:
    """Loads LoRAs, none of which acts until a call wants it.

    Args:
        pipe: that they are loaded into.
        given: file, folder or hub id of each, and its weight.
        hub: arguments for those that come from the hub.

    Raises OmniGenError for one that can't be loaded.
    """

    def __init__(
        self, pipe: OmniGenPipeline, given: Sequence[tuple[str, float]] = (), **hub: Any
    ) -> None:
        self._pipe, self._turn = pipe, threading.Lock()
        self.offered: dict[str, Offered] = {}
        for source, weight in given:
            one = Offered(self._name(source), source, weight)
            is_hub_id = source.count("/") == 1 and not os.path.exists(source)
            pipe.load_lora_weights(source, one.name, weight=weight, **(hub if is_hub_id else {}))
            self.offered[one.name] = one
        if self.offered:
            pipe.set_adapters([])

    def choice(self, name: Any, strength: Any) -> Chosen | None:
        """What a visitor has chosen; None for the model alone.

        Raises RequestError for another name, or a strength that can't be used.
        """
        if name is None or name == NONE:
            return None
        if not isinstance(name, str) or name not in self.offered:
            names = ", ".join([NONE, *self.offered])
            raise RequestError(f"the LoRA must be one of {names}, got {brief(name)}")
        offered, factor = self.offered[name], finite("LoRA strength", strength)
        weight = offered.weight * factor
        if abs(weight) > MAX_SCALE:
            raise RequestError(
                f"LoRA strength must be at most {MAX_SCALE / abs(offered.weight):g}, got {factor:g}"
            )
        return Chosen(offered, weight)

    @contextmanager
    def acting(self, chosen: Chosen | None) -> Iterator[None]:
        """One call at a time, with the weights that it wants."""
        with self._turn:
            if self.offered:
                wanted = {} if chosen is None else {chosen.offered.name: chosen.weight}
                self._pipe.set_adapters(list(wanted), list(wanted.values()))
            yield

    def _name(self, source: str) -> str:
        path = Path(source)
        name = (path.stem if path.suffix == ".safetensors" else path.name)[:_MAX_NAME]
        taken = {NONE, *self.offered}
        numbered = (f"{name} ({i})" for i in range(2, len(taken) + 3))
        return name if name and name not in taken else next(n for n in numbered if n not in taken)
