"""ComfyUI's memory manager: a call's budget is what it has free, and it gets back what it wants."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher

from ..errors import OmniGenError
from ..memory.device import free_bytes, on_host, profile_of
from ..pipeline import OmniGenPipeline

_log = logging.getLogger("omnigen_fast")
_LEAST_BYTES = 1 << 20  # of a budget: planning with less says what is missing


class OmniGen(torch.nn.Module):
    """What ComfyUI's manager takes for the model, and names in its log; it has no weights."""


class Patcher(ModelPatcher):
    """A pipeline as ComfyUI's memory manager sees its models.

    The planner, not the manager, decides what is loaded: loading here is none, and unloading makes
    the pipeline give memory back.
    """

    def __init__(self, pipe: OmniGenPipeline) -> None:
        self._pipe = pipe
        self.wanted_bytes = 1  # of the call that comes, at its fastest
        super().__init__(OmniGen(), load_device=pipe.device, offload_device=torch.device("cpu"))

    def model_size(self) -> int:
        return max(self.wanted_bytes, self.loaded_size())

    def loaded_size(self) -> int:
        return self._pipe.engine.held_bytes()

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() else self.offload_device

    def patch_model(self, *_args: Any, **_options: Any) -> torch.nn.Module:
        return self.model

    def unpatch_model(self, *_args: Any, **_options: Any) -> None:
        """Nothing is patched."""

    def partially_load(self, *_args: Any, **_options: Any) -> int:
        return 0

    def partially_unload(self, _device: Any, memory_to_free: int = 0, **_options: Any) -> int:
        return self._release(min(int(memory_to_free), self.loaded_size()))

    def detach(self, unpatch_all: bool = True) -> torch.nn.Module:
        if unpatch_all:  # else a list drops the patcher, or nobody holds it any more
            self._release(None)
        return self.model

    def _release(self, nbytes: int | None) -> int:
        try:
            return self._pipe.release_memory(nbytes)
        except OmniGenError as error:  # from a callback of the call that runs
            _log.warning("no memory was given back: %s", error)
            return 0


def reserve(pipe: OmniGenPipeline, patcher: Patcher, cap: int | None, fastest_bytes: int) -> int:
    """Makes ComfyUI unload others for a call, and returns the call's budget in bytes.

    Args:
        pipe: that the call is of.
        patcher: its own.
        cap: the user's limit; None for none.
        fastest_bytes: what the fastest plan of `potential_budget` takes.
    """
    patcher.wanted_bytes = fastest_bytes
    model_management.load_models_gpu([patcher])
    return _budget(pipe, cap, 0)


def potential_budget(pipe: OmniGenPipeline, patcher: Patcher, cap: int | None) -> int:
    """The budget in bytes that a call has once ComfyUI has unloaded all other models."""
    others = 0
    if not on_host(pipe.device):  # elsewhere unloaded models are in the same memory
        others = sum(
            one.loaded_size()
            for one in model_management.loaded_models()
            if one is not patcher and one.load_device == pipe.device
        )
    return _budget(pipe, cap, others)


def _budget(pipe: OmniGenPipeline, cap: int | None, others: int) -> int:
    """What a plan may use: what both ComfyUI and this package take for free, and is allowed."""
    profile, held = profile_of(pipe.device), pipe.engine.held_bytes()
    ours = free_bytes(pipe.device, profile, held) + others
    # a plan counts the device's context, which is in place
    theirs = model_management.get_free_memory(pipe.device) + held + profile.context_bytes + others
    if not on_host(pipe.device):
        theirs -= model_management.extra_reserved_memory()
    return max(_LEAST_BYTES, int(min(ours, theirs, theirs if cap is None else cap)))
