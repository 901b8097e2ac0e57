"""Holdings: weights, autoencoder, caches and captured steps, and where they are.

They are loaded, moved and freed as plans want.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from .attention import attending, attention_for
from .cache import ConditionCache
from .call import Call
from .compilation import Compilation
from .config import ModelConfig
from .errors import BusyError, OmniGenError
from .graph import StepGraphs
from .linear import Weight
from .memory.device import held_bytes
from .memory.plan import MemoryPlan
from .model import Transformer
from .packing import Pack
from .parallel.group import Group
from .parameters import layer_parts, stored_bytes
from .placement import Placement
from .precision import Precision
from .running import Running
from .streamed_cache import StreamedCache
from .streaming import HostMemory, lane_for, spread
from .surroundings import isolated
from .vae.vae import Vae
from .weights.checkpoint import Checkpoint
from .weights.lora import Loras, merged
from .weights.store import LayerStore, without_storage


class Holdings:
    """What calls with one model on one device need and leave behind.

    Args:
        checkpoint: where the weights come from.
        vae: on its device already.
        precision: of weights, arithmetic and cache.
        device: where to run.
        condition_cache_bytes: how much memory to keep for the conditions of earlier calls.
        capture_steps: whether steps are captured where they can be.
        compile: whether a CPU's operations run in C++, see `Compilation`.
        group: the ranks that carry out every call together; None for this process alone.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        vae: Vae,
        precision: Precision,
        device: torch.device,
        condition_cache_bytes: int,
        capture_steps: bool,
        compile: bool | None = None,
        group: Group | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.vae = vae
        self.device = device
        self.precision = precision
        self.loras = Loras()
        self.cache_bytes = condition_cache_bytes
        # exchanges between ranks are captured with a step, or it is not captured
        self.capture_steps = capture_steps and (group is None or group.capturable)
        self.placement = Placement(group)
        self.compilation = Compilation(compile)
        self.attention = "triton"  # or the library that computes a step's
        self.image_latents: OrderedDict[tuple[str, int | None], Tensor] = OrderedDict()
        self.host = HostMemory(device)
        self.cache = self._new_cache()
        self.streamed: StreamedCache | None = None
        self.graphs = self._new_graphs()
        self._model: Transformer | None = None
        self._store: LayerStore | None = None
        self._stale: set[str] = set()  # parameters that may not be what the adapters make of them
        self._running: list[Running] = []
        self._pack: Pack | None = None  # of the latest steps that were taken together
        self._fingerprint: tuple[tuple[tuple[int, int], ...], Tensor] | None = None

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def model(self) -> Transformer:
        """The transformer; loaded again if a change of dtype has failed."""
        if self._model is None:
            self.load(self.precision, 0)
        assert self._model is not None
        return self._model

    @property
    def store(self) -> LayerStore:
        """Which of its layers are where."""
        assert self.model is not None and self._store is not None
        return self._store

    @property
    def arrangement(self) -> MemoryPlan:
        """Where the weights are now, as a plan."""
        resident = 0 if self._store is None else self._store.resident
        plan = MemoryPlan.plain(resident)
        return replace(plan, vae_resident=self.vae.resident)

    def held_bytes(self) -> int:
        """Bytes on the device that this engine holds and that a plan's estimate includes.

        Not the crops and image latents that are kept: most are of other calls.
        """
        return held_bytes(self._kept(), self.device, weights=self._weights())

    def _weights(self) -> Iterator[Tensor]:
        if self._model is not None:
            yield from self._model.parameters()
        yield from self.vae.autoencoder.parameters()

    def _kept(self) -> Iterator[Tensor]:
        if self._store is not None:
            yield from self._store.tensors()
        yield from (self.cache.keys, self.cache.values)
        if self.streamed is not None:
            yield from self.streamed.tensors()
        yield from self.graphs.tensors()

    @isolated
    def free(self) -> None:
        """Gives up what another plan may need the memory of and no call under way uses."""
        self._pack = None
        self.image_latents.clear()
        if self._model is not None:
            self._model.forget_crops()
        if not self._running:
            self.graphs.clear()
            self.cache.clear()
            if self.streamed is not None:
                self.streamed.free()
            if self._store is not None:
                self._store.stop()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @isolated
    def forget(self) -> None:
        """Drops what is kept between calls: keys and values, image latents, positions, captures."""
        self.image_latents.clear()
        if self._model is not None:
            self._model.forget_crops()
        self.cache = self._new_cache()
        self.streamed = None
        self.graphs.clear()

    @isolated
    def release(self, nbytes: int | None = None) -> int:
        """Gives up memory of the device that the next call takes again: caches, layers, the rest.

        Args:
            nbytes: how much is wanted; None for all.

        Returns:
            Bytes that are free now; less than what is wanted if no more is held.

        Raises:
            BusyError: calls are under way.
        """
        if self._running:
            raise BusyError("a call is under way and uses the weights; finish it first")
        before = self.held_bytes()
        wanted = before if nbytes is None else nbytes
        self.forget()
        if self._store is not None and (short := wanted - before + self.held_bytes()) > 0:
            size = stored_bytes(layer_parts(self.config, self.precision))
            self._store.give_up(max(0, self._store.resident + (-short // size)))
        if nbytes is None or self.held_bytes() > max(0, before - wanted):
            if self._store is not None:
                self._store.stop()
            self._model = self._store = None
            self.vae.place(False)
        self._fingerprint = None  # what is read again is not changed
        self.free()
        return max(0, before - self.held_bytes())

    @isolated
    def load(self, precision: Precision, resident: int) -> None:
        """Reads the weights, loaded adapters included; those that were there go first."""
        assert not self._running
        attention_for(precision, self.config, self.device)  # refuses while nothing is changed
        self.graphs.clear()
        if self._store is not None:
            self._store.stop()
        self._model = self._store = None
        if precision != self.precision:
            self.cache.clear()
            self.streamed = None
        model = _load(self.checkpoint, precision, self.device, resident)
        if precision != self.precision:
            self.precision = precision
            self.cache = self._new_cache()
        self._model = model
        self._store = LayerStore(model, precision, self._read, self.host)
        self.prepare_operations()
        self.refresh(Loras().changed(self.loras))

    @isolated
    def refresh(self, parameters: Iterable[str] = ()) -> None:
        """Sets some weights, by our names, to what the loaded adapters make of them.

        If that fails, the next call or change of adapters does it first.
        """
        self._stale.update(parameters)
        if not self._stale:
            return
        self._weights_changed()
        self.store.refresh(sorted(self._stale))
        self._stale.clear()
        self._fingerprint = None

    @isolated
    def to(self, device: torch.device) -> None:
        """Moves everything to a device; what is kept is dropped."""
        attention_for(self.precision, self.config, device)
        self.host = HostMemory(device)
        self.store.to(device, self.host)
        self._fingerprint = None
        self.vae.to(device)
        self.device = device
        self.prepare_operations()
        self.graphs = self._new_graphs()
        self.forget()

    def prepare_operations(self) -> None:
        """Has the operations ready that the model runs with where it is now."""
        self.compilation.prepare(self.config, self.precision.arithmetic_dtype, self.device)
        self.attention = attention_for(self.precision, self.config, self.device)

    @contextmanager
    def operations(self) -> Iterator[None]:
        """Inside, operations are those that `prepare_operations` has made ready."""
        with self.compilation.operations(), attending(self.attention):
            yield

    @isolated
    def take_vae(self, vae: Vae) -> None:
        """Uses another VAE; what was made with the old one is dropped.

        Raises:
            OmniGenError: calls are under way.
        """
        if self._running:
            raise OmniGenError("a call is under way and uses the VAE; finish it first")
        vae.place(self.vae.resident)
        vae.to(self.device)
        self.vae = vae
        self.forget()

    def _read(self, names: Iterable[str], device: torch.device) -> Iterator[tuple[str, Weight]]:
        """Parameters with the adapters that are loaded now."""
        return merged(self.checkpoint, self.loras.applied(), self.precision, device, names)

    def _notice_changes(self) -> None:
        """Drops what depends on weights that somebody else has written to since the last call."""
        if self._running:
            return  # what they use stays; noticed by the first call after them
        before, now = self._fingerprint, self.model.fingerprint()
        self._fingerprint = now
        if before is None:
            return
        if before[0] != now[0] or not torch.equal(before[1], now[1]):
            self._weights_changed()

    def _weights_changed(self) -> None:
        """Drops the keys and values and the captures that were made with other weights."""
        self.cache.clear()
        if self.streamed is not None:
            self.streamed.clear()
        self.graphs.clear()

    def arrange(self, plan: MemoryPlan, call: Call) -> None:
        """Puts weights and caches where a plan wants them; frees first, then fills.

        Raises:
            BusyError: other calls are under way and the plan moves what they use.
        """
        here = self.arrangement
        precision = plan.precision or self.precision
        loaded = self._model is not None and precision == self.precision
        stays = loaded and (
            (plan.resident_layers, plan.vae_resident) == (here.resident_layers, here.vae_resident)
        )
        if self._running:
            if not (stays and plan.cache == "device"):
                raise BusyError(
                    "another call is under way and this one's plan moves what it uses; finish it "
                    "first"
                )
        else:
            if not stays:
                self.graphs.clear()
                self._fingerprint = None  # what moves is not changed
            steps = call.schedule.evaluations
            shape = (call.request.latent_shape, steps, replace(plan, kept_bytes=0))
            self.graphs.expect(shape if plan.capture else None)
            if plan.cache == "ring":
                self.cache.clear()
            elif self.streamed is not None:
                self.streamed.clear()
            if plan.cache == "none":
                self.cache.clear()
            if not loaded:
                self.load(precision, plan.resident_layers)
            self.vae.place(plan.vae_resident)
            self.store.arrange(plan.resident_layers)
        self.cache.budget_bytes = plan.kept_bytes

    def _streamed_cache(self) -> StreamedCache:
        if self.streamed is None:
            self.streamed = StreamedCache(
                self.config,
                self.precision.cache_dtype,
                self.device,
                self.cache_bytes,
                self.host,
                lane_for(self.device),
            )
        return self.streamed

    def _new_cache(self, layers: int | None = None) -> ConditionCache:
        # one layer that every layer overwrites is of no use to later requests
        kept_bytes = self.cache_bytes if layers is None else 0
        dtype = self.precision.cache_dtype
        return ConditionCache(self.config, dtype, self.device, kept_bytes, layers)

    def _new_graphs(self) -> StepGraphs:
        return StepGraphs.on(self.device) if self.capture_steps else StepGraphs()


def _load(
    checkpoint: Checkpoint, precision: Precision, device: torch.device, resident: int
) -> Transformer:
    """The model with `resident` layers on the device; the others have no storage."""
    config = checkpoint.config
    here = spread(resident, config.num_layers)
    weights = {
        f"layers.{layer}.{name}": value
        for layer in range(config.num_layers)
        if layer not in here
        for name, value in without_storage(config, precision).items()
    }
    names = [name for name in checkpoint.sources if name not in weights]
    return Transformer(config, weights | checkpoint.read_stored(precision, device, names))
