"""LayerStore: keeps layers on the device and streams the others to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..config import ModelConfig
from ..linear import Weight
from ..memory.device import on_host
from ..memory.plan import RING
from ..model import Block, Expander, Transformer
from ..parameters import aligned, buffer_bytes, layer_parts, layer_shapes
from ..precision import Precision
from ..quantised import as_weight, empty_parts, parts_of_weight
from ..streaming import HostMemory, Lane, Ring, Streamed, lane_for, spread

# (names, device) -> (name, value) pairs of parameters
Read = Callable[[Iterable[str], torch.device], Iterable[tuple[str, Weight]]]


class LayerStore:
    """Places a model's layers on the device or the host, according to the memory plan.

    With a GPU, each streamed layer has a copy in one host buffer, page-locked if there is room. On
    a CPU, streamed layers are read from the mapped checkpoint every time, so only the ring takes
    memory. Quantised layers are kept and copied as they are stored, and expanded when the
    computation takes them.

    Args:
        model: its streamed layers have no storage (meta tensors).
        precision: that its weights are stored and computed in.
        read: reads current values of parameters, adapters included.
        host: allocates the copies on the host.
        lane: runs the ring's copies; by default the device's lane.
    """

    def __init__(
        self,
        model: Transformer,
        precision: Precision,
        read: Read,
        host: HostMemory,
        lane: Lane | None = None,
    ) -> None:
        self._model = model
        self._precision = precision
        self._parts = layer_parts(model.config, precision)
        self._read = read
        self._host = host
        self._lane = lane
        self._copies: dict[int, Tensor] = {}  # [bytes] of a layer, on the host
        self._resident = frozenset(
            layer for layer, block in enumerate(model.layers) if not block.qkv_proj.is_meta
        )
        self.slots: list[Tensor] = []  # [bytes] each, on the device
        self._expander: Expander | None = None

    @property
    def resident(self) -> int:
        """Layers on the device."""
        return len(self._resident)

    def arrange(self, resident: int) -> None:
        """Keeps `resident` layers on the device and streams the others."""
        model, layers = self._model, len(self._model.layers)
        wanted = spread(resident, layers)
        streams = resident < layers or self._precision.expands
        if wanted == self._resident and (model.stream is not None or not streams):
            return
        self.stop()
        for layer in self._resident - wanted:
            self._drop(layer)
        for layer in sorted(wanted - self._resident):
            self._bring(layer)
        if streams:
            self._start([layer for layer in range(layers) if layer not in wanted])

    def give_up(self, resident: int) -> None:
        """Takes layers off the device until at most `resident` are on it.

        Until the next `arrange`, which brings what it wants, the others can't be used.
        """
        self.stop()
        for layer in self._resident - spread(resident, len(self._model.layers)):
            self._drop(layer)

    def refresh(self, names: Iterable[str]) -> None:
        """Reads parameters again after their values have changed."""
        if self._model.stream is not None:
            self._model.stream.reset()  # the ring may hold old values
        here: list[str] = []
        copied: set[int] = set()
        for name in names:
            layer = int(name.split(".")[1]) if name.startswith("layers.") else None
            if layer is None or layer in self._resident:
                here.append(name)
            if layer in self._copies:
                copied.add(layer)
        for name, value in self._read(here, self._model.device):
            self._model.set_parameter(name, value)
        for layer in copied:
            self._fill(layer, self._copies[layer])

    def stop(self) -> None:
        """Frees ring and expanded layer; until the next `arrange` they can't be used."""
        if self._model.stream is not None:
            self._model.stream.reset()
            self._model.stream = None
        self.slots = []
        self._expander = None

    def tensors(self) -> Iterator[Tensor]:
        """What is held beside the model's own weights."""
        yield from self.slots
        if self._expander is not None:
            yield from self._expander.layer.parameters()

    def leave_lane(self) -> None:
        """Forgets the ring with whatever copies are under way in it."""
        self._lane = None
        self.slots = []

    def to(self, device: torch.device, host: HostMemory) -> None:
        """Moves the resident layers; the next `arrange` brings the rest."""
        self.stop()
        self._copies.clear()
        self._lane = None
        self._host = host
        self._model.move(device)

    def _drop(self, layer: int) -> None:
        model = self._model
        model.layers[layer] = Block(without_storage(model.config, self._precision), model.config)
        self._resident -= {layer}

    def _bring(self, layer: int) -> None:
        model = self._model
        if layer in self._copies:
            values = self._views(self._copies[layer].to(model.device))
        else:
            names = {f"layers.{layer}.{name}": name for name in layer_shapes(model.config)}
            values = {names[name]: value for name, value in self._read(names, model.device)}
        model.layers[layer] = Block(values, model.config)
        self._resident |= {layer}

    def _start(self, streamed: Sequence[int]) -> None:
        model = self._model
        device, config = model.device, model.config
        size = buffer_bytes(self._parts)
        if not on_host(device):
            for layer in streamed:
                if layer not in self._copies:
                    copy = self._host.empty((size,), torch.uint8)
                    self._fill(layer, copy)
                    self._copies[layer] = copy
        self.slots = [
            torch.empty(size, dtype=torch.uint8, device=device)
            for _ in range(min(RING, len(streamed)))
        ]
        blocks = [Block(self._views(slot), config) for slot in self.slots]
        if self._precision.expands:
            self._expander = Expander(self._dense())
        ring = None
        if streamed:
            if self._lane is None:
                self._lane = lane_for(device)
            ring = Ring(self._lane, len(self.slots), streamed, self._copy_in)
        resident = {layer: model.block(layer) for layer in self._resident}
        model.stream = Streamed(ring, blocks, resident, self._expander)

    def _copy_in(self, slot: int, layer: int) -> None:
        if layer in self._copies:
            self.slots[slot].copy_(self._copies[layer], non_blocking=True)
        else:
            self._fill(layer, self.slots[slot])

    def _fill(self, layer: int, buffer: Tensor) -> None:
        """Reads a layer into a host buffer."""
        views = self._views(buffer)
        names = {f"layers.{layer}.{name}": name for name in views}
        for name, value in self._read(names, torch.device("cpu")):
            kept = parts_of_weight(views[names[name]])
            for part, tensor in parts_of_weight(value).items():
                kept[part].copy_(tensor)

    def _views(self, buffer: Tensor) -> dict[str, Weight]:
        """A layer's parameters in a buffer of `buffer_bytes`."""
        shapes = layer_shapes(self._model.config)
        views: dict[str, Weight] = {}
        start = 0
        for name, parts in self._parts.items():
            tensors = {}
            for part, one in parts.items():
                held = buffer[start : start + one.nbytes]
                tensors[part] = held.view(getattr(torch, one.dtype)).view(one.shape)
                start += aligned(one.nbytes)
            views[name] = as_weight(self._precision.form_of(name), shapes[name], tensors)
        return views

    def _dense(self) -> Block:
        """A layer on the device as products take it."""
        config, device = self._model.config, self._model.device
        return Block(empty_layer(config, self._precision.expanded, device), config)


def without_storage(config: ModelConfig, precision: Precision) -> dict[str, Weight]:
    """The parameters of a layer that is not on the device, by their names in `model.Block`."""
    return empty_layer(config, precision, "meta")


def empty_layer(
    config: ModelConfig, precision: Precision, device: torch.device | str
) -> dict[str, Weight]:
    """Uninitialised parameters of a layer, by their names in `model.Block`."""
    shapes = layer_shapes(config)
    return {
        name: as_weight(precision.form_of(name), shapes[name], empty_parts(parts, device))
        for name, parts in layer_parts(config, precision).items()
    }
