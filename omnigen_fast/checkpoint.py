"""Find, check and read weights: the original's layout and diffusers', sharded or not, and names."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig
from .errors import CheckpointError
from .model import parameter_shapes

SDXL_VAE = "stabilityai/sdxl-vae"  # what the original falls back to
SHIPPED = ("shapes",)  # models inside this package
MODEL_FILES = ("*.json", "*.safetensors", "*/*.json", "*/*.safetensors")
VAE_FILES = ("config.json", "diffusion_pytorch_model*.safetensors*")
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # in safetensors' words
# Bytes converted before a file's mapping is renewed: its pages must not pile up beside the copies.
_RENEW_BYTES = 256 << 20

# Our name: the parts of the other layout's tensors that it holds, stacked along axis 0.
_ORIGINAL = {
    "embed_tokens": ["llm.embed_tokens.weight"],
    "noise_proj": ["x_embedder.proj"],
    "image_proj": ["input_x_embedder.proj"],
    "norm": ["llm.norm.weight"],
    "modulation": ["final_layer.adaLN_modulation.1"],
    "output": ["final_layer.linear"],
    "pos_embed": ["pos_embed"],
    "time_token.0": ["time_token.mlp.0"],
    "time_token.1": ["time_token.mlp.2"],
    "time_embed.0": ["t_embedder.mlp.0"],
    "time_embed.1": ["t_embedder.mlp.2"],
    "input_norm": ["llm.layers.{}.input_layernorm.weight"],
    "qkv_proj": ["llm.layers.{}.self_attn.qkv_proj.weight"],
    "o_proj": ["llm.layers.{}.self_attn.o_proj.weight"],
    "post_norm": ["llm.layers.{}.post_attention_layernorm.weight"],
    "gate_up_proj": ["llm.layers.{}.mlp.gate_up_proj.weight"],
    "down_proj": ["llm.layers.{}.mlp.down_proj.weight"],
}
_DIFFUSERS = {
    "embed_tokens": ["embed_tokens.weight"],
    "noise_proj": ["patch_embedding.output_image_proj"],
    "image_proj": ["patch_embedding.input_image_proj"],
    "norm": ["norm.weight"],
    "modulation": ["norm_out.linear"],
    "output": ["proj_out"],
    "pos_embed": ["patch_embedding.pos_embed"],
    "time_token.0": ["time_token.linear_1"],
    "time_token.1": ["time_token.linear_2"],
    "time_embed.0": ["t_embedder.linear_1"],
    "time_embed.1": ["t_embedder.linear_2"],
    "input_norm": ["layers.{}.input_layernorm.weight"],
    "qkv_proj": [f"layers.{{}}.self_attn.to_{part}.weight" for part in "qkv"],
    "o_proj": ["layers.{}.self_attn.to_out.0.weight"],
    "post_norm": ["layers.{}.post_attention_layernorm.weight"],
    "gate_up_proj": ["layers.{}.mlp.gate_up_proj.weight"],
    "down_proj": ["layers.{}.mlp.down_proj.weight"],
}


@dataclass(frozen=True)
class Source:
    """A tensor of a file, and the rows of our parameter that it fills."""

    name: str
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that was found complete and consistent; no weight is read yet."""

    folder: str
    config: ModelConfig
    sources: Mapping[str, tuple[Source, ...]]  # by our name
    files: Mapping[str, str]  # path of each tensor's file, by the file's own name of it
    tokenizer_path: str
    vae_folder: str | None

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Reads configs and headers of a local folder and compares every shape.

        Raises:
            CheckpointError: a file is missing or malformed, is a pickle, or tensors are missing,
                unexpected or misshapen (all named).
        """
        folder = os.fspath(folder)
        diffusers = os.path.isdir(os.path.join(folder, "transformer"))
        weights = os.path.join(folder, "transformer") if diffusers else folder
        stem = "diffusion_pytorch_model" if diffusers else "model"
        shapes, files = _headers(find_weights(weights, stem))
        table = "patch_embedding.pos_embed" if diffusers else "pos_embed"
        values = read_json(os.path.join(weights, "config.json"))
        read_config = ModelConfig.from_diffusers if diffusers else ModelConfig.from_phi3
        config = read_config(values, _table_side(shapes, table))
        sources = _sources(config, _DIFFUSERS if diffusers else _ORIGINAL)
        expected = {part.name: part.shape for parts in sources.values() for part in parts}
        check_shapes(weights, shapes, expected)
        tokenizer = os.path.join(folder, "tokenizer") if diffusers else folder
        vae = os.path.join(folder, "vae")
        return cls(
            folder,
            config,
            sources,
            files,
            os.path.join(tokenizer, "tokenizer.json"),
            vae if os.path.isdir(vae) else None,
        )

    def read(
        self, dtype: torch.dtype, device: torch.device, names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Reads parameters by our names, all of them unless told.

        On a CPU, tensors that have `dtype` already are the mapped file itself: nothing is copied,
        and pages that no one touches are never read. The position table always stays on the host.
        """
        wanted = self.sources if names is None else {name: self.sources[name] for name in names}
        host = torch.device("cpu")
        whole, parts = {}, {}
        for name, sources in wanted.items():
            (whole if len(sources) == 1 else parts)[name] = sources
        result: dict[str, Tensor] = {}
        with _Reader(self.files, dtype) as reader:
            for name, (source,) in whole.items():
                result[name] = reader.read(source.name, host if name == "pos_embed" else device)
            for name, sources in parts.items():
                last = sources[-1]
                shape = (last.start + last.shape[0], *last.shape[1:])
                joined = torch.empty(shape, dtype=dtype, device=device)
                for source in sources:
                    rows = joined[source.start : source.start + source.shape[0]]
                    rows.copy_(reader.read(source.name, device))
                result[name] = joined
        return result

    def find(self, tensor: str) -> tuple[str, Source] | None:
        """Our parameter that holds a layout's tensor, and which rows of it.

        Both layouts' names are known, whichever the folder has.
        """
        return self._parameters.get(tensor)

    @cached_property
    def _parameters(self) -> dict[str, tuple[str, Source]]:
        return {
            source.name: (parameter, source)
            for names in (_DIFFUSERS, _ORIGINAL)
            for parameter, sources in _sources(self.config, names).items()
            for source in sources
        }


def resolve(
    name: str | os.PathLike[str],
    *,
    patterns: Sequence[str] = MODEL_FILES,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> str:
    """The local folder of a model: `name` itself if it is one, else fetched from the hub.

    Of the hub's files only those that match `patterns` are fetched. A name of `SHIPPED` is always
    the model inside this package; a folder of that name is given as "./shapes".

    Raises:
        CheckpointError: neither a folder nor to be had from the hub.
    """
    name = os.fspath(name)
    if name in SHIPPED:
        if os.path.isdir(name):
            warnings.warn(
                f"{name} is the model that ships with this package; for the folder here give "
                f"./{name}",
                UserWarning,
                stacklevel=3,
            )
        folder = os.path.join(os.path.dirname(os.path.abspath(__file__)), "models", name)
        if not os.path.isfile(os.path.join(folder, "model.safetensors")):
            raise CheckpointError(
                f"the model {name} is not in this copy of the package; train it with python -m "
                f"examples.{name}.train --out FOLDER and give that folder"
            )
        return folder
    if os.path.isdir(name):
        return name
    if os.path.exists(name):
        raise CheckpointError(f"{name} is a file; give the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or "\\" in name:
        raise CheckpointError(
            f"{name or 'an empty path'} does not exist; give a model folder or a hub id "
            "(owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            allow_patterns=list(patterns),
        )
    except Exception as error:  # network, permission, no such repository: all end here alike
        raise CheckpointError(
            f"{name} is no local folder, and fetching it from the hub failed: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object from a file.

    Raises CheckpointError if it is missing, malformed or not an object.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; the model folder is not complete") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def find_weights(folder: str, stem: str) -> list[str]:
    """The safetensors files of a folder: `stem`.safetensors or the shards that its index names.

    Raises:
        CheckpointError: there are none, a shard is missing, or there are only pickles.
    """
    single = os.path.join(folder, f"{stem}.safetensors")
    if os.path.isfile(single):
        return [single]
    index_path = f"{single}.index.json"
    if os.path.isfile(index_path):
        shards = read_json(index_path).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise CheckpointError(f"{index_path} has no weight_map")
        names = sorted({str(name) for name in shards.values()})
        # an index must not lead out of its folder
        bad = [name for name in names if os.path.basename(name) != name]
        if bad:
            raise CheckpointError(f"{index_path} names {bad[0]!r}, which is not a file beside it")
        missing = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
        if missing:
            raise CheckpointError(f"{folder} lacks shards: {_some(missing)}")
        return [os.path.join(folder, name) for name in names]
    pickles = sorted(
        name
        for name in (os.listdir(folder) if os.path.isdir(folder) else [])
        if name.endswith((".pt", ".bin", ".pth", ".ckpt"))
    )
    if pickles:
        raise CheckpointError(
            f"{folder} has {pickles[0]} but no {stem}.safetensors; pickles can run code and are "
            "not read. Convert one you trust: safetensors.torch.save_file(torch.load("
            f"{pickles[0]!r}, weights_only=True), '{stem}.safetensors')"
        )
    raise CheckpointError(f"{folder} has no {stem}.safetensors")


def read_tensors(
    paths: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    *,
    rename: Callable[[str], str] = lambda name: name,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, Tensor]:
    """All tensors of safetensors files, by `rename`d name.

    Raises:
        CheckpointError: a file is malformed, or its tensors are not those of `shapes`.
    """
    for path in paths:
        if not os.path.isfile(path):
            raise CheckpointError(f"{path} does not exist; the model folder is not complete")
    found, files = _headers(paths)
    if shapes is not None:
        renamed = {rename(name): shape for name, shape in found.items()}
        check_shapes(paths[0], renamed, shapes)
    with _Reader(files, dtype) as reader:
        return {rename(name): reader.read(name, device) for name in found}


def check_shapes(
    where: str,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
) -> None:
    """Raises one CheckpointError that names all missing, unexpected and misshapen tensors."""
    faults = []
    if missing := sorted(expected.keys() - found.keys()):
        faults.append(f"missing {_some(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        faults.append(f"unexpected {_some(unexpected)}")
    if misshapen := [
        f"{name} is {list(found[name])} instead of {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]:
        faults.append(f"misshapen {_some(misshapen)}")
    if faults:
        raise CheckpointError(f"{where}: {'; '.join(faults)}")


def _some(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _table_side(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    """Tokens per side of the position table; 1 where the table is missing or odd."""
    shape = shapes.get(name, ())
    side = isqrt(shape[1]) if len(shape) == 3 else 1
    if len(shape) == 3 and side * side != shape[1]:
        raise CheckpointError(f"{name} has {shape[1]} places, which is no square")
    return max(1, side)


def diffusers_sources(config: ModelConfig) -> dict[str, tuple[Source, ...]]:
    """Every parameter of ours with the tensors of diffusers' transformer that fill it."""
    return _sources(config, _DIFFUSERS)


def _sources(
    config: ModelConfig, names: Mapping[str, Sequence[str]]
) -> dict[str, tuple[Source, ...]]:
    """Every parameter of ours with the tensors of a layout that fill it."""
    kv_rows = config.num_kv_heads * config.head_dim
    sources = {}
    for parameter, shape in parameter_shapes(config).items():
        head, _, tail = parameter.partition(".")
        if head == "layers":
            layer, _, kind = tail.partition(".")
            parts = [name.format(layer) for name in names[kind]]
        elif parameter in names:
            parts = list(names[parameter])
        else:  # a weight or a bias of a named module
            module, _, kind = parameter.rpartition(".")
            parts = [f"{name}.{kind}" for name in names[module]]
        rows = [config.hidden_size, kv_rows, kv_rows] if len(parts) == 3 else [shape[0]]
        starts = [sum(rows[:i]) for i in range(len(rows))]
        sources[parameter] = tuple(
            Source(part, start, (count, *shape[1:]))
            for part, start, count in zip(parts, starts, rows)
        )
    return sources


def _headers(paths: Sequence[str]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shape and file of every tensor."""
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, str] = {}
    odd = []
    for path in paths:
        with _open(path, torch.device("cpu")) as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no dict
                header = file.get_slice(name)
                if header.get_dtype() not in _FLOATS:
                    odd.append(f"{name} holds {header.get_dtype()}")
                shapes[name] = tuple(header.get_shape())
                files[name] = path
    if odd:
        raise CheckpointError(f"{paths[0]}: {_some(odd)}, not floating-point weights")
    return shapes, files


def _open(path: str, device: torch.device) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt", device=str(device))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


class _Reader:
    """Reads tensors from several files into one dtype, file handles kept open meanwhile."""

    def __init__(self, files: Mapping[str, str], dtype: torch.dtype) -> None:
        self._files = files
        self._dtype = dtype
        self._stack = ExitStack()
        self._handles: dict[tuple[str, torch.device], Any] = {}
        self._converted_bytes = 0

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def read(self, name: str, device: torch.device) -> Tensor:
        path = self._files[name]
        if (path, device) not in self._handles:
            self._handles[path, device] = self._stack.enter_context(_open(path, device))
        tensor = self._handles[path, device].get_tensor(name)
        if tensor.dtype == self._dtype:
            return tensor
        converted = tensor.to(self._dtype)
        self._converted_bytes += tensor.nbytes
        if self._converted_bytes > _RENEW_BYTES:
            del tensor
            self._stack.close()
            self._handles.clear()
            self._converted_bytes = 0
        return converted
