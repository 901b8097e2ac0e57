"""Names of the original's and of diffusers' pipelines, and their equivalents here.

Calls written for either run as they are where they can. What can't be done is refused in one line
that names what to use instead.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from abc import ABCMeta
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from .errors import ArgumentError, AttributeNameError, printable

_P = ParamSpec("_P")
_R = TypeVar("_R")
_MAX_NAME = 60  # characters of an unknown name that are shown and compared
_LISTED = 8  # arguments that a message lists at most


@dataclass(frozen=True)
class Other:
    """An argument of another pipeline's method.

    Args:
        equivalent: what to use instead, in words.
        usual: values that ask for what is done anyway. With one of them, or with None, the
            argument is accepted.
    """

    equivalent: str
    usual: tuple[Any, ...] = ()

    def asks_nothing(self, value: Any) -> bool:
        simple = isinstance(value, bool | int | float | str)
        return value is None or (simple and value in self.usual)


_SCHEDULE = (
    "give num_inference_steps, time_shift or timesteps, and a solver; to use a scheduler of "
    "diffusers, set it in a diffusers pipeline and enable that one"
)
_TEXT = "give the text as prompt: OmniGen has no separate text encoder"
_NEGATIVE = "give the text as negative_prompt"
_IMAGES = "give images as input_images, and name them in the prompt"
_START = "give the image as input_images, and strength"
_SIZES = "OmniGen has no such condition: give height and width, or max_input_image_size"
_CALLBACK = "give callback_on_step_end, called as f(pipe, step, time, {'latents': latents})"
_LORA_SCALE = "set a LoRA's strength with set_adapters(names, weights)"
_SAFETENSORS = "only safetensors files are read and written"
_COMPONENT = "a pipeline loads all of its parts from model_name; only the VAE can be another one"
_WHERE = 'give device="cuda" and memory="8GiB": the planner decides what is where'
_REVISION = "files are fetched once; give revision, cache_dir or local_files_only"

# By method: other names of its own arguments.
_ALIASES: Mapping[str, Mapping[str, str]] = {
    "from_pretrained": {"pretrained_model_name_or_path": "model_name"},
    "load_lora_weights": {"pretrained_model_name_or_path_or_dict": "path"},
    "merge_lora": {"path": "lora_path"},
}

# By method: names that it doesn't have.
ARGUMENTS: Mapping[str, Mapping[str, Other]] = {
    "__call__": {
        "sigmas": Other(_SCHEDULE),
        "eta": Other("the sampler is Euler's, without noise of its own", (0, 1)),
        "prompt_embeds": Other(_TEXT),
        "negative_prompt_embeds": Other(_NEGATIVE),
        "pooled_prompt_embeds": Other(_TEXT),
        "negative_pooled_prompt_embeds": Other(_NEGATIVE),
        "prompt_2": Other(_TEXT),
        "prompt_3": Other(_TEXT),
        "negative_prompt_2": Other(_NEGATIVE),
        "negative_prompt_3": Other(_NEGATIVE),
        "prompt_embeds_mask": Other(_TEXT),
        "negative_prompt_embeds_mask": Other(_NEGATIVE),
        "max_sequence_length": Other("prompts are read whole; the model's positions are the limit"),
        "clip_skip": Other(_TEXT),
        "image": Other(_IMAGES),
        "images": Other(_IMAGES),
        "ip_adapter_image": Other(_IMAGES),
        "ip_adapter_image_embeds": Other(_IMAGES),
        "negative_ip_adapter_image": Other(_IMAGES),
        "negative_ip_adapter_image_embeds": Other(_IMAGES),
        "control_image": Other(_IMAGES),
        "denoising_start": Other(_START),
        "denoising_end": Other("set pipe._interrupt = True in callback_on_step_end"),
        "original_size": Other(_SIZES),
        "target_size": Other(_SIZES),
        "crops_coords_top_left": Other(_SIZES),
        "negative_original_size": Other(_SIZES),
        "negative_target_size": Other(_SIZES),
        "negative_crops_coords_top_left": Other(_SIZES),
        "max_area": Other(_SIZES),
        "cfg_scale": Other("give guidance_scale"),
        "true_cfg_scale": Other("give guidance_scale"),
        "guidance_rescale": Other("give a lower guidance_scale", (0,)),
        "img_cfg_scale": Other("give img_guidance_scale"),
        "image_guidance_scale": Other("give img_guidance_scale"),
        "use_img_cfg": Other("give use_img_guidance"),
        "separate_cfg_input": Other("give separate_cfg_infer"),
        "steps": Other("give num_inference_steps"),
        "num_steps": Other("give num_inference_steps"),
        "batch_size": Other("give a list of prompts, or num_images_per_prompt"),
        "num_images": Other("give num_images_per_prompt"),
        "cross_attention_kwargs": Other(_LORA_SCALE),
        "joint_attention_kwargs": Other(_LORA_SCALE),
        "attention_kwargs": Other(_LORA_SCALE),
        "callback": Other(_CALLBACK),
        "callback_steps": Other(_CALLBACK, (1,)),
        "torch_dtype": Other("give dtype"),
        "device": Other("call pipe.to(device) first"),
        "progress_bar": Other("give progress=False to hide it"),
    },
    "from_pretrained": {
        "use_safetensors": Other(_SAFETENSORS, (True,)),
        "low_cpu_mem_usage": Other("weights are mapped, not copied", (True, False)),
        "device_map": Other(_WHERE),
        "max_memory": Other(_WHERE),
        "offload_folder": Other(_WHERE),
        "offload_state_dict": Other(_WHERE, (False,)),
        "quantization_config": Other("weights are bfloat16 or float32; memory= saves memory"),
        "custom_pipeline": Other("there is one pipeline, and no code is loaded with a model"),
        "custom_revision": Other("no code is loaded with a model"),
        "trust_remote_code": Other("no code is loaded with a model", (False,)),
        "force_download": Other(_REVISION, (False,)),
        "resume_download": Other(_REVISION, (True, False)),
        "proxies": Other("set the environment variable HTTPS_PROXY"),
        "mirror": Other("set the environment variable HF_ENDPOINT"),
        "use_auth_token": Other("give token"),
        "output_loading_info": Other("files that do not fit are always an error", (False,)),
        "transformer": Other(_COMPONENT),
        "scheduler": Other(_SCHEDULE),
        "tokenizer": Other(_COMPONENT),
        "vae": Other("give vae_path, or set pipe.vae"),
        "text_encoder": Other(_COMPONENT),
        "safety_checker": Other("there is none"),
        "feature_extractor": Other(_COMPONENT),
        "requires_safety_checker": Other("there is none", (False,)),
    },
    "load_lora_weights": {
        "low_cpu_mem_usage": Other("weights are mapped, not copied", (True, False)),
        "use_safetensors": Other(_SAFETENSORS, (True,)),
        "hotswap": Other("call unload_lora_weights first", (False,)),
        "prefix": Other("module names are recognised without it", ("transformer",)),
        "network_alphas": Other("give them as .alpha tensors of the state dict"),
        "metadata": Other("give PEFT's folder, whose adapter_config.json has it"),
        "force_download": Other(_REVISION, (False,)),
        "proxies": Other("set the environment variable HTTPS_PROXY"),
        "use_auth_token": Other("give token"),
    },
    "fuse_lora": {
        "fuse_unet": Other('give components=["transformer"]', (True, False)),
        "fuse_transformer": Other('give components=["transformer"]', (True,)),
        "fuse_text_encoder": Other("OmniGen has no text encoder", (True, False)),
    },
    "unfuse_lora": {
        "unfuse_unet": Other('give components=["transformer"]', (True, False)),
        "unfuse_transformer": Other('give components=["transformer"]', (True,)),
        "unfuse_text_encoder": Other("OmniGen has no text encoder", (True, False)),
    },
    "save_pretrained": {
        "safe_serialization": Other(_SAFETENSORS, (True,)),
        "variant": Other("weights are saved in the pipeline's dtype; name the folder after it"),
        "max_shard_size": Other("weights are one file"),
        "push_to_hub": Other("upload the folder with huggingface_hub.upload_folder", (False,)),
        "is_main_process": Other("call it in one process only", (True,)),
        "use_flashpack": Other(_SAFETENSORS, (False,)),
    },
    "__init__": dict.fromkeys(
        ("vae", "model", "device", "transformer", "scheduler", "tokenizer"),
        Other("load it with OmniGenPipeline.from_pretrained(model_name)"),
    ),
    "to": {
        "torch_device": Other("give device"),
        "torch_dtype": Other("give dtype"),
        "silence_dtype_warnings": Other("give a device or a dtype", (True, False)),
        "memory_format": Other("weights keep their layout"),
        "non_blocking": Other("give a device or a dtype", (True, False)),
    },
}

_MODEL = "the one network is pipe.transformer"
_PROCESSOR = "pipe.processor tokenizes; the call takes texts and images as they are"
_LOOP = "pipe.make_call and pipe.engine run a call step by step"
_HOOKS = "nothing is hooked: memory= of the call decides what is where"
_CONFIG = "pipe.config holds the model's sizes; save_pretrained writes the config files"

# Attributes that a pipeline doesn't have.
ATTRIBUTES: Mapping[str, str] = {
    "unet": _MODEL,
    "prior": _MODEL,
    "controlnet": _MODEL,
    "text_encoder": "OmniGen has none: its transformer reads the prompt",
    "text_encoder_2": "OmniGen has none: its transformer reads the prompt",
    "image_encoder": "OmniGen has none: pipe.vae encodes input images",
    "tokenizer": _PROCESSOR,
    "multimodal_processor": _PROCESSOR,
    "image_processor": _PROCESSOR,
    "feature_extractor": _PROCESSOR,
    "safety_checker": "there is none; images are returned as the model makes them",
    "watermark": "there is none; images are returned as the model makes them",
    "components": "all tasks share this one pipeline; diffusers can load the same folder itself",
    "parameters": "pipe.model.parameters() lists the weights",
    "encode_prompt": _PROCESSOR,
    "encode_input_images": "give them as input_images; pipe.vae encodes them",
    "vae_encode": "give images as input_images; pipe.vae encodes them",
    "move_to_device": "pipe.to(device) moves everything",
    "prepare_latents": "the call draws them from seed or generator, or takes latents",
    "check_inputs": "pipe.plan(prompt, ...) checks the arguments of a call",
    "retrieve_timesteps": "pipe.scheduler.timesteps holds those of the latest call",
    "progress_bar": "set_progress_bar_config sets its style; progress=False hides it",
    "current_timestep": "callback_on_step_end receives the time of each step",
    "do_classifier_free_guidance": "guidance always runs; pipe.guidance_scale is its scale",
    "guidance_rescale": "there is none; give a lower guidance_scale",
    "get_guidance_scale_embedding": "the model has no input for it; give guidance_scale",
    "prepare_extra_step_kwargs": "the sampler is Euler's, without noise of its own",
    "denoising_end": "set pipe._interrupt = True in callback_on_step_end",
    "clip_skip": "OmniGen has no text encoder: its transformer reads the prompt",
    "unet_name": _MODEL,
    "transformer_name": _MODEL,
    "text_encoder_name": "OmniGen has none: its transformer reads the prompt",
    "run_safety_checker": "there is none; images are returned as the model makes them",
    "decode_latents": 'pipe.vae.decode(latents) does, and the call for output_type "pil"',
    "upcast_vae": "the VAE runs in float32 unless vae_dtype says otherwise",
    "numpy_to_pil": 'output_type="pil" gives PIL images',
    "hf_device_map": _HOOKS,
    "reset_device_map": _HOOKS,
    "remove_all_hooks": _HOOKS,
    "maybe_free_model_hooks": _HOOKS,
    "model_cpu_offload_seq": _HOOKS,
    "enable_group_offload": 'memory="8GiB" streams as many layers as that amount demands',
    "enable_layerwise_casting": "weights are bfloat16 or float32; memory= saves memory",
    "enable_freeu": "FreeU is for U-Nets, and OmniGen has none",
    "disable_freeu": "FreeU is for U-Nets, and OmniGen has none",
    "fuse_qkv_projections": "q, k and v are one matrix already",
    "unfuse_qkv_projections": "q, k and v are one matrix always",
    "set_attention_slice": "attention never stores its matrix of scores",
    "set_use_memory_efficient_attention_xformers": "attention never stores its matrix of scores",
    **dict.fromkeys(
        (
            *("load_ip_adapter", "unload_ip_adapter", "set_ip_adapter_scale", "encode_image"),
            "prepare_ip_adapter_image_embeds",
        ),
        "give reference images as input_images",
    ),
    **dict.fromkeys(
        ("load_textual_inversion", "unload_textual_inversion", "maybe_convert_prompt"),
        "OmniGen's tokenizer is fixed; load_lora_weights loads LoRAs",
    ),
    **dict.fromkeys(
        (
            *("save_lora_weights", "write_lora_layers", "pack_weights", "lora_state_dict"),
            *("load_lora_into_transformer", "load_lora_into_unet", "load_lora_into_text_encoder"),
        ),
        "PEFT and diffusers write LoRAs; load_lora_weights reads them",
    ),
    **dict.fromkeys(
        (
            *("lora_scale", "fused_loras", "set_lora_device", "enable_lora_hotswap"),
            *("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs"),
        ),
        "LoRAs are merged into the weights; get_list_adapters names them, set_adapters weighs them",
    ),
    "push_to_hub": "save_pretrained, then upload with huggingface_hub.upload_folder",
    "register_modules": "from_pretrained loads all parts",
    **dict.fromkeys(
        (
            *("config_name", "has_compatibles", "ignore_for_config", "get_config_dict"),
            *("extract_init_dict", "register_to_config", "register_for_auto_class"),
        ),
        _CONFIG,
    ),
    "save_config": _CONFIG,
    "load_config": _CONFIG,
    "from_config": "from_pretrained loads a model folder",
    "to_json_string": _CONFIG,
    "to_json_file": _CONFIG,
    "from_single_file": "from_pretrained loads a model folder",
    "download": "from_pretrained fetches a hub id; huggingface_hub.snapshot_download only fetches",
    "upgrade": "one pipeline does all tasks",
    "compile": "give compile to from_pretrained on a CPU; on a GPU steps are CUDA graphs",
    "forward_with_cfg": _LOOP,
    "forward_with_separate_cfg": _LOOP,
    "eval": "the model is always in inference mode",
    "train": "this runtime does not train; train with the original or diffusers, then load a LoRA",
    "half": "float16 overflows in this model; pipe.to(torch.bfloat16) halves float32",
    "float": "pipe.to(torch.float32) converts it",
    "bfloat16": "pipe.to(torch.bfloat16) converts it",
    "cuda": 'pipe.to("cuda") moves it',
    "cpu": 'pipe.to("cpu") moves it',
}

FIXED_SCHEDULE = (
    "give solver, time_shift or timesteps to the call; to use a scheduler of diffusers, set it in "
    "a diffusers pipeline and pass that to omnigen_fast.enable"
)
# Attributes that can be read but not set.
_FIXED: Mapping[str, str] = {
    "scheduler": FIXED_SCHEDULE,
    "model": "load another pipeline with from_pretrained, or change weights in place",
    "transformer": "load another pipeline with from_pretrained, or change weights in place; no "
    "torch.compile is needed: on a GPU steps are captured as CUDA graphs, on a CPU operations are "
    "compiled (compile=True of from_pretrained)",
    "device": "call pipe.to(device)",
    "dtype": "call pipe.to(dtype), or give dtype to the call",
    "guidance_scale": "give it to the call; it stays the same in all steps",
    "_guidance_scale": "give guidance_scale to the call; it stays the same in all steps",
    "num_timesteps": "give num_inference_steps or timesteps to the call",
    "model_cpu_offload": "call enable_model_cpu_offload() or disable_model_cpu_offload()",
    "interrupt": "set pipe._interrupt = True in callback_on_step_end",
}


def named_arguments(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """A function that explains names it doesn't have, see `ARGUMENTS`.

    Raises ArgumentError where Python raises a bare TypeError.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        return function(*args, **own_names(function.__name__, signature, args, kwargs))

    return run


def own_names(
    method: str, signature: inspect.Signature, args: tuple[Any, ...], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments by the names that a method has.

    Args:
        method: its name.
        signature: its parameters, with the `self` of `args`, if any.
        args: that are given by position.
        given: by name; those of other pipelines are left out where they ask for nothing.

    Raises:
        ArgumentError: an argument is unknown, missing, or given twice.
    """
    kwargs = dict(given)
    for name, own in _ALIASES.get(method, {}).items():
        if name in kwargs and own not in kwargs:
            kwargs[own] = kwargs.pop(name)
    variable = any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values())
    for name in () if variable else kwargs.keys() - signature.parameters.keys():
        _check_unknown(method, name, kwargs.pop(name), signature)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(f"{_called(method)}: {error}") from None
    return kwargs


def _check_unknown(method: str, name: str, value: Any, signature: inspect.Signature) -> None:
    """Raises ArgumentError for a name that a method doesn't have, unless it asks for nothing."""
    other = ARGUMENTS.get(method, {}).get(name)
    if other is not None and other.asks_nothing(value):
        return
    hint = _nearest(name, signature) if other is None else other.equivalent
    raise ArgumentError(f"{_called(method)} has no argument {_cut(name)}; {hint}")


def _nearest(name: str, signature: inspect.Signature) -> str:
    """Words that lead from a misspelt name to the right one."""
    own = [name for name, one in signature.parameters.items() if one.kind is not one.VAR_POSITIONAL]
    own = [name for name in own if name not in ("self", "cls")]
    found = difflib.get_close_matches(_cut(name).lower(), own, n=1)
    if found:
        return f"did you mean {found[0]}?"
    if len(own) > _LISTED:
        return "help() of it lists its arguments"
    return f"it takes {', '.join(own) or 'none'}"


def _called(method: str) -> str:
    return {"__call__": "the call", "__init__": "OmniGenPipeline()"}.get(method, f"{method}()")


def _cut(name: str) -> str:
    return printable(name, _MAX_NAME)


def _absent(owner: str, name: str, of: Any) -> AttributeError:
    """The error for an attribute that isn't there: the equivalent, or else Python's usual text."""
    if name in ATTRIBUTES:
        return AttributeNameError(f"the pipeline has no attribute {name}; {ATTRIBUTES[name]}")
    return AttributeError(f"{owner} has no attribute {name!r}", name=name, obj=of)


class _EquivalentsOfClass(ABCMeta):
    def __getattr__(cls, name: str) -> Any:
        raise _absent(f"type object {cls.__name__!r}", name, cls)


class Equivalents(metaclass=_EquivalentsOfClass):
    """Base of a pipeline: explains attributes that other pipelines have, see `ATTRIBUTES`.

    `hasattr` is False for them, and the usual AttributeError is raised for unknown names.
    """

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self), name):  # a property failed: its own error says why
            return object.__getattribute__(self, name)
        raise _absent(f"{type(self).__name__!r} object", name, self)

    def __setattr__(self, name: str, value: Any) -> None:
        place = getattr(type(self), name, None)
        read_only = isinstance(place, property) and place.fset is None
        if read_only or name in ATTRIBUTES:
            if value is None and name in ATTRIBUTES:
                return  # such as a safety checker that is taken out
            hint = _FIXED.get(name) or ATTRIBUTES.get(name) or "it can only be read"
            raise AttributeNameError(f"the pipeline's {name} can't be set; {hint}")
        object.__setattr__(self, name, value)
