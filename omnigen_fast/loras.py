"""LoraMethods: the adapters of a pipeline, with the names that diffusers gives them."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any, TypeAlias

from torch import Tensor

from .engine import Engine
from .equivalents import named_arguments
from .errors import RequestError
from .request import finite
from .run import LESS_RESIDENT, naming_memory
from .surroundings import isolated
from .weights.lora import MAX_SCALE, Loras
from .weights.lora_files import read_adapter

LoraSource: TypeAlias = str | os.PathLike[str] | Mapping[str, Tensor]
_COMPONENT = "transformer"  # diffusers' name for what carries the adapters


class LoraMethods(ABC):
    """LoRAs are always merged into the weights, so they cost no time in a step.

    Each change computes the weights that it touches from the checkpoint's own, in float32, and
    rounds them once. So whatever was loaded in whatever order leaves no trace.
    """

    engine: Engine

    @abstractmethod
    def _exclusive(self) -> AbstractContextManager[None]:
        """One call or change at a time."""

    @isolated
    @named_arguments
    def load_lora_weights(
        self,
        path: LoraSource,
        adapter_name: str | None = None,
        *,
        weight: float = 1.0,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        """Adds a LoRA to the weights; several add up. It costs no time in a step.

        Takes the files of PEFT, diffusers, kohya and ComfyUI, with the module names of the
        original or of diffusers.

        Args:
            path: a folder, a .safetensors file, a hub id (owner/name) or a state dict.
            adapter_name: to refer to it by; without it the path, or "default_0", "default_1", ...
                for a state dict.
            weight: its strength, up to 1e9.
            weight_name: the file in the folder or repository, where it can't be told.
            subfolder: where in the folder or repository.
            revision: branch, tag or commit on the hub.
            cache_dir: where hub files are kept.
            token: access token for the hub.
            local_files_only: use what was fetched before, do not ask the hub.

        Raises:
            CheckpointError: it can't be read, is not a plain LoRA or does not fit.
            RequestError: an adapter of that name is loaded, or an argument can't be used.
        """
        strength = _strength("weight", weight)
        name = _adapter_name(adapter_name)
        with self._exclusive():
            loras = self.engine.loras
            if name is None:
                name = _default_name(path, weight_name, subfolder, loras)
            loras.check_new(name)
            with naming_memory("while the LoRA is read", LESS_RESIDENT):
                adapter = read_adapter(
                    path,
                    self.engine.checkpoint,
                    weight_name=weight_name,
                    subfolder=subfolder,
                    revision=revision,
                    cache_dir=cache_dir,
                    token=token,
                    local_files_only=local_files_only,
                )
            self._set_loras(loras.with_adapter(name, adapter, strength))

    @isolated
    @named_arguments
    def merge_lora(self, lora_path: LoraSource) -> None:
        """The original's name for `load_lora_weights`; the same LoRA twice is added twice."""
        loras = self.engine.loras
        name = loras.free_name(_default_name(lora_path, None, None, loras))
        self.load_lora_weights(lora_path, name)

    @isolated
    @named_arguments
    def unload_lora_weights(self, adapter_name: str | None = None) -> None:
        """Takes one LoRA, or all, out again; the weights are the checkpoint's to the bit.

        What was fused stays until `unfuse_lora`.

        Raises:
            RequestError: there is no adapter of that name.
        """
        with self._exclusive():
            loras = self.engine.loras
            names = loras.names if adapter_name is None else _names(adapter_name)
            self._set_loras(loras.without(names))

    @isolated
    @named_arguments
    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Unloads some LoRAs.

        Raises:
            RequestError: there is no adapter of a name; none is unloaded.
        """
        names = _names(adapter_names)
        with self._exclusive():
            self._set_loras(self.engine.loras.without(names))

    @isolated
    @named_arguments
    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Makes these LoRAs active and no others; those left out stay loaded.

        Args:
            adapter_names: one, or several.
            adapter_weights: a strength for all of them, or one for each; None for 1.

        Raises:
            RequestError: there is no adapter of a name, or a strength can't be used.
        """
        names = _names(adapter_names)
        weights = _weights(adapter_weights, len(names))
        with self._exclusive():
            self._set_loras(self.engine.loras.with_active(dict(zip(names, weights))))

    def get_active_adapters(self) -> list[str]:
        """Names of the LoRAs that act, also while `disable_lora` holds them back."""
        return self.engine.loras.active

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all loaded LoRAs, as {"transformer": [...]}; empty without any."""
        names = self.engine.loras.names
        return {_COMPONENT: names} if names else {}

    @isolated
    @named_arguments
    def disable_lora(self) -> None:
        """Takes all LoRAs out of the weights until `enable_lora`, but for what was fused."""
        self._enable(False)

    @isolated
    @named_arguments
    def enable_lora(self) -> None:
        """Undoes `disable_lora`."""
        self._enable(True)

    @isolated
    @named_arguments
    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        *,
        safe_fusing: bool = False,
        adapter_names: str | Sequence[str] | None = None,
    ) -> None:
        """Keeps LoRAs in the weights at their strength times `lora_scale`, until `unfuse_lora`.

        Meanwhile `set_adapters`, `disable_lora` and `unload_lora_weights` do not touch them.

        Args:
            components: None or ["transformer"].
            lora_scale: factor on the strength of each.
            safe_fusing: for calls written for diffusers; values are always checked.
            adapter_names: which; None for all that are active.

        Raises:
            RequestError: there is nothing to fuse, or an argument can't be used.
        """
        _check_components(components)
        scale = _strength("lora_scale", lora_scale)
        names = None if adapter_names is None else _names(adapter_names)
        with self._exclusive():
            self._set_loras(self.engine.loras.with_fused(scale, names))

    @isolated
    @named_arguments
    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Undoes `fuse_lora`, to the bit; LoRAs unloaded since are gone.

        Raises:
            RequestError: `components` names something else than the transformer.
        """
        _check_components(components)
        with self._exclusive():
            self._set_loras(self.engine.loras.without_fused())

    @property
    def num_fused_loras(self) -> int:
        return sum(one.fused is not None for one in self.engine.loras.loaded)

    def _enable(self, enabled: bool) -> None:
        with self._exclusive():
            loras = self.engine.loras
            self._set_loras(Loras(loras.loaded, enabled))

    def _set_loras(self, loras: Loras) -> None:
        """Makes the weights what these adapters make of them; a failure leaves them as before."""
        engine, before = self.engine, self.engine.loras
        changed = sorted(before.changed(loras))
        with naming_memory("while the LoRAs are merged", LESS_RESIDENT):
            try:
                engine.loras = loras
                engine.refresh(changed)
            except BaseException:
                engine.loras = before
                with suppress(Exception):  # then the next call or change does it
                    engine.refresh(changed)  # all: Ctrl-C may have come when they were set
                raise


def _default_name(path: Any, weight_name: str | None, subfolder: str | None, loras: Loras) -> str:
    if not isinstance(path, str | os.PathLike):
        taken = set(loras.names)
        numbers = range(len(taken) + 1)
        return next(name for i in numbers if (name := f"default_{i}") not in taken)
    parts = [str(os.fspath(path)), subfolder, weight_name]
    return "/".join(str(part) for part in parts if part)


def _adapter_name(name: Any) -> str | None:
    if name is not None and (not isinstance(name, str) or not name):
        raise RequestError(f"adapter_name must be a text, got {type(name).__name__}")
    return name


def _names(names: Any) -> list[str]:
    found = [names] if isinstance(names, str) else names
    if not isinstance(found, list | tuple | set) or not all(isinstance(n, str) for n in found):
        raise RequestError(f"adapter names must be texts, got {type(names).__name__}")
    if len(set(found)) < len(found):
        raise RequestError("an adapter name is given twice; give each once")
    return list(found)


def _weights(weights: Any, count: int) -> list[float]:
    given = list(weights) if isinstance(weights, list | tuple) else [weights] * count
    if len(given) != count:
        raise RequestError(f"adapter_weights has {len(given)} entries for {count} adapters")
    return [_weight(one) for one in given]


def _weight(weight: Any) -> float:
    if isinstance(weight, Mapping):
        if set(weight) - {_COMPONENT}:
            raise RequestError('adapter_weights by part can only be {"transformer": a number}')
        weight = weight.get(_COMPONENT)
    return 1.0 if weight is None else _strength("adapter_weights", weight)


def _strength(name: str, value: Any) -> float:
    number = finite(name, value)
    if abs(number) > MAX_SCALE:
        raise RequestError(f"{name} must be at most {MAX_SCALE:g}, got {number:g}")
    return number


def _check_components(components: Any) -> None:
    if components not in (None, _COMPONENT, [_COMPONENT], (_COMPONENT,)):
        raise RequestError(
            'components can only be ["transformer"]: OmniGen has no other part with LoRAs'
        )
