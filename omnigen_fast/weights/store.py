"""LayerStore: keeps layers on the device and streams the others to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..memory.device import on_host
from ..memory.plan import RING
from ..model import Block, Transformer
from ..parameters import ALIGNED_BYTES, layer_elements, layer_shapes
from ..streaming import HostMemory, Lane, Ring, Streamed, lane_for, spread

# (names, device) -> (name, value) pairs of parameters
Read = Callable[[Iterable[str], torch.device], Iterable[tuple[str, Tensor]]]


class LayerStore:
    """Places a model's layers on the device or the host, according to the memory plan.

    With a GPU, each streamed layer has a copy in one host buffer, page-locked if there is room. On
    a CPU, streamed layers are read from the mapped checkpoint every time, so only the ring takes
    memory.

    Args:
        model: its streamed layers have no storage (meta tensors).
        read: reads current values of parameters, adapters included.
        host: allocates the copies on the host.
        lane: runs the ring's copies; by default the device's lane.
    """

    def __init__(
        self, model: Transformer, read: Read, host: HostMemory, lane: Lane | None = None
    ) -> None:
        self._model = model
        self._read = read
        self._host = host
        self._lane = lane
        self._copies: dict[int, Tensor] = {}  # [elements] of a layer, on the host
        self._resident = frozenset(
            layer for layer, block in enumerate(model.layers) if not block.qkv_proj.is_meta
        )
        self.slots: list[Tensor] = []  # [elements] each, on the device

    @property
    def resident(self) -> int:
        """Layers on the device."""
        return len(self._resident)

    def arrange(self, resident: int) -> None:
        """Keeps `resident` layers on the device and streams the others."""
        model, layers = self._model, len(self._model.layers)
        wanted = spread(resident, layers)
        if wanted == self._resident and (model.stream is not None or resident == layers):
            return
        self.stop()
        for layer in self._resident - wanted:
            self._drop(layer)
        for layer in sorted(wanted - self._resident):
            self._bring(layer)
        if resident < layers:
            self._start([layer for layer in range(layers) if layer not in wanted])

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
            self._model.parameter(name).data = value
        for layer in copied:
            self._fill(layer, self._copies[layer])

    def stop(self) -> None:
        """Frees the ring; the streamed layers can't be used until the next `arrange`."""
        if self._model.stream is not None:
            self._model.stream.reset()
            self._model.stream = None
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
        empty = {
            name: torch.empty(shape, dtype=model.dtype, device="meta")
            for name, shape in layer_shapes(model.config).items()
        }
        model.layers[layer] = Block(empty, model.config)
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
        elements = layer_elements(config, model.dtype.itemsize)
        if not on_host(device):
            for layer in streamed:
                if layer not in self._copies:
                    copy = self._host.empty((elements,), model.dtype)
                    self._fill(layer, copy)
                    self._copies[layer] = copy
        self.slots = [model.norm.new_empty(elements) for _ in range(min(RING, len(streamed)))]
        blocks = [Block(self._views(slot), config) for slot in self.slots]
        if self._lane is None:
            self._lane = lane_for(device)
        ring = Ring(self._lane, len(self.slots), streamed, self._copy_in)
        resident = {layer: model.block(layer) for layer in self._resident}
        model.stream = Streamed(ring, blocks, resident)

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
            views[names[name]].copy_(value)

    def _views(self, buffer: Tensor) -> dict[str, Tensor]:
        """A layer's parameters in a buffer of `layer_elements`."""
        unit = ALIGNED_BYTES // buffer.element_size()
        views: dict[str, Tensor] = {}
        start = 0
        for name, shape in layer_shapes(self._model.config).items():
            size = math.prod(shape)
            views[name] = buffer[start : start + size].view(shape)
            start += -(-size // unit) * unit
        return views
