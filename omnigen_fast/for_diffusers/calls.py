"""Calls of an enabled pipeline: the original's names are taken, or their equivalents named."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from ..equivalents import Other, own_names
from ..errors import ArgumentError, AttributeNameError, RequestError, printable
from ..request import checked_integer

_OURS = "omnigen_fast.OmniGenPipeline takes it"
_PEFT = (
    "diffusers' OmniGen loads no LoRAs: inject PEFT's layers into pipe.transformer, or use "
    "omnigen_fast.OmniGenPipeline"
)
_OURS_ALONE = "omnigen_fast.OmniGenPipeline has it"

# Arguments of the original and of this package that diffusers' call does not have.
_ARGUMENTS: Mapping[str, Other] = {
    "use_img_guidance": Other(_OURS, (True,)),
    "use_kv_cache": Other(f"keys and values are always kept here; {_OURS}", (True,)),
    "offload_kv_cache": Other(f"keys and values stay on the device here; {_OURS}", (False,)),
    "separate_cfg_infer": Other(f"guidance branches run together here; {_OURS}", (False,)),
    "offload_model": Other("call pipe.enable_model_cpu_offload()", (False,)),
    "negative_prompt": Other(_OURS),
    "memory": Other(_OURS),
    "progress": Other("call pipe.set_progress_bar_config(disable=True)", (True,)),
}
# Attributes of the original and of this package that diffusers' pipeline does not have.
_ATTRIBUTES: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("load_lora_weights", "merge_lora", "unload_lora_weights", "delete_adapters"),
            *("set_adapters", "get_active_adapters", "get_list_adapters", "fuse_lora"),
            *("unfuse_lora", "enable_lora", "disable_lora", "num_fused_loras"),
        ),
        _PEFT,
    ),
    **dict.fromkeys(
        (
            *("plan", "make_call", "engine", "last_plan", "last_report", "clear_cache"),
            "release_memory",
        ),
        _OURS_ALONE,
    ),
    "summary": "call omnigen_fast.summary(pipe)",
    "model": "the transformer is pipe.transformer",
    "processor": "it is pipe.multimodal_processor",
    "unet": "the transformer is pipe.transformer",
    "disable_model_cpu_offload": "call pipe.remove_all_hooks(), then pipe.to(device)",
    "enable_vae_slicing": "call pipe.vae.enable_slicing()",
    "disable_vae_slicing": "call pipe.vae.disable_slicing()",
    "enable_vae_tiling": "call pipe.vae.enable_tiling()",
    "disable_vae_tiling": "call pipe.vae.disable_tiling()",
}


@functools.lru_cache(maxsize=8)
def enabled_class(base: type) -> type:
    """A subclass of a diffusers pipeline, of the same name, that explains what the base lacks.

    Its call also takes `seed`, and those arguments of the original that ask for what is done
    anyway.
    """

    class Enabled(base):
        @functools.wraps(base.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            signature = inspect.signature(super().__call__)
            given = own_names("__call__", signature, args, _translated(self, kwargs))
            return super().__call__(*args, **given)

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name not in _ATTRIBUTES:
                    raise
            raise AttributeNameError(
                f"diffusers' pipeline has no attribute {name}; {_ATTRIBUTES[name]}"
            )

    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        setattr(Enabled, name, getattr(base, name))
    return Enabled


def _translated(pipe: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call as diffusers names them.

    Raises RequestError for those that can't be used; says what to do.
    """
    arguments: dict[str, Any] = {}
    for name, value in given.items():
        other = _ARGUMENTS.get(name)
        if other is None:
            arguments[name] = value
        elif not other.asks_nothing(value):
            raise ArgumentError(f"diffusers' call has no argument {name}; {other.equivalent}")
    if arguments.get("timesteps") is not None:
        raise RequestError(
            "diffusers' OmniGen can't take timesteps: its call also gives sigmas to the scheduler, "
            "which takes one of them; set pipe.scheduler instead"
        )
    _check_dtype(pipe, arguments.pop("dtype", None))
    seed = arguments.pop("seed", None)
    if seed is not None:
        if arguments.get("generator") is not None:
            raise RequestError("give seed or generator, not both")
        number = checked_integer("seed", seed, -(1 << 63), (1 << 64) - 1)
        arguments["generator"] = torch.Generator(pipe._execution_device).manual_seed(number)
    return arguments


def _check_dtype(pipe: Any, dtype: Any) -> None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (None, pipe.transformer.dtype) or (dtype is not None and found is None):
        raise RequestError(
            f"the pipeline is {str(pipe.transformer.dtype).removeprefix('torch.')}, not "
            f"{printable(str(dtype), 60)}; call pipe.to(dtype) first"
        )
