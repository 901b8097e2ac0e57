"""Checkpoint: a model folder in the original's layout or in diffusers', checked and read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ..config import TIME_FREQUENCIES, ModelConfig
from ..errors import CheckpointError, brief
from ..regular_files import read_json
from .files import TensorReader, WeightFiles, check_shapes, find_weights, read_headers
from .names import DIFFUSERS, ORIGINAL, Layout, TensorRows, layout_sources

_TRANSFORMER = "transformer"  # diffusers' folder of it
_CLASS = "OmniGenTransformer2DModel"  # diffusers'


@dataclass(frozen=True)
class Checkpoint:
    """A complete and consistent model folder; its weights are read on demand."""

    folder: str
    config: ModelConfig
    sources: Mapping[str, tuple[TensorRows, ...]]  # by our name
    files: Mapping[str, str]  # tensor name in the checkpoint: path of its file
    tokenizer_path: str
    vae_folder: str | None

    @classmethod
    def open(cls, path: str | os.PathLike[str], variant: str | None = None) -> Checkpoint:
        """Reads the configs and headers of a local model and checks every shape.

        Args:
            path: a folder, or a safetensors file with its config.json beside it.
            variant: of the weights' names, as "fp16" for model.fp16.safetensors.

        Raises:
            CheckpointError: a file is missing, malformed or a pickle, or tensors are missing,
                unexpected or misshapen (all named).
        """
        path = os.fspath(path)
        folder, inner = find_folders(path)
        default = ORIGINAL if folder == inner else DIFFUSERS
        shapes, files = read_headers(_find_files(path, folder, inner, variant))
        layout = layout_of(shapes, default)
        config = read_config(read_json(os.path.join(inner, "config.json")), shapes, layout)
        sources = layout_sources(config, layout)
        expected = {part.name: part.shape for parts in sources.values() for part in parts}
        check_shapes(inner, shapes, expected)
        vae = os.path.join(folder, "vae")
        return cls(
            folder,
            config,
            sources,
            files,
            find_tokenizer(folder),
            vae if os.path.isdir(vae) else None,
        )

    def read(
        self, dtype: torch.dtype, device: torch.device, names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Reads parameters by our names; all of them by default.

        On a CPU, tensors stored in `dtype` are views of the mapped file: nothing is copied, and
        untouched pages are never read. The position table always stays on the host.
        """
        wanted = self.sources if names is None else {name: self.sources[name] for name in names}
        host = torch.device("cpu")
        whole: dict[str, tuple[TensorRows, ...]] = {}
        stacked: dict[str, tuple[TensorRows, ...]] = {}
        for name, sources in wanted.items():
            (whole if len(sources) == 1 else stacked)[name] = sources
        result: dict[str, Tensor] = {}
        with TensorReader(self.files, dtype) as reader:
            for name, (source,) in whole.items():
                result[name] = reader.read(source.name, host if name == "pos_embed" else device)
            for name, sources in stacked.items():
                last = sources[-1]
                shape = (last.start + last.shape[0], *last.shape[1:])
                joined = torch.empty(shape, dtype=dtype, device=device)
                for source in sources:
                    rows = joined[source.start : source.start + source.shape[0]]
                    rows.copy_(reader.read(source.name, device))
                result[name] = joined
        return result

    def find(self, tensor: str) -> tuple[str, TensorRows] | None:
        """The parameter that holds a tensor, and the rows that it fills; None if there is none.

        Takes the names of both layouts, whichever the folder has.
        """
        return self._parameters.get(tensor)

    @cached_property
    def _parameters(self) -> dict[str, tuple[str, TensorRows]]:
        return {
            source.name: (parameter, source)
            for layout in (DIFFUSERS, ORIGINAL)
            for parameter, sources in layout_sources(self.config, layout).items()
            for source in sources
        }


def find_folders(path: str) -> tuple[str, str]:
    """A model's folder and the one with its transformer's config; only diffusers has two."""
    if os.path.isdir(os.path.join(path, _TRANSFORMER)):
        return path, os.path.join(path, _TRANSFORMER)
    inner = path if os.path.isdir(path) else os.path.dirname(path) or "."
    parent, name = os.path.split(os.path.abspath(inner))
    around = name == _TRANSFORMER and os.path.isfile(os.path.join(parent, "model_index.json"))
    return parent if around else inner, inner


def _find_files(path: str, folder: str, inner: str, variant: str | None) -> WeightFiles:
    if os.path.isfile(path):
        return WeightFiles((path,))
    stem = "model" if folder == inner else "diffusion_pytorch_model"
    return find_weights(inner, stem, variant=variant, any_name=True, convertible=True)


def find_tokenizer(folder: str) -> str:
    """Where a model folder has its tokenizer.json, or should have it."""
    usual = os.path.join(folder, "tokenizer.json")
    other = os.path.join(folder, "tokenizer", "tokenizer.json")  # diffusers
    return other if os.path.lexists(other) and not os.path.lexists(usual) else usual


def layout_of(names: Iterable[str], default: Layout) -> Layout:
    """The layout that tensor names are of."""
    held = set(names)
    for layout in (ORIGINAL, DIFFUSERS):
        if layout["pos_embed"][0] in held:
            return layout
    return default


def read_config(
    values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], layout: Layout
) -> ModelConfig:
    """The sizes of a model, some of which only its tensors state.

    Args:
        values: its config, as the original or diffusers writes it.
        shapes: of its tensors.
        layout: of their names.

    Raises:
        CheckpointError: missing or impossible values, or another model's.
    """
    kind = values.get("_class_name")
    if kind is not None and kind != _CLASS:
        raise CheckpointError(f"config: {brief(kind)} is another model; OmniGen's is {_CLASS}")
    if values.get("quantization_config") is not None:
        raise CheckpointError(
            "config: it has a quantization_config; quantized weights are not read. For float8, "
            "omnigen-fast convert writes them as bfloat16"
        )
    side = _table_side(shapes, layout["pos_embed"][0])
    diffusers = layout is DIFFUSERS or "num_layers" in values
    if diffusers and "num_hidden_layers" not in values:
        return ModelConfig.from_diffusers(values, side)
    embedder = shapes.get(f"{layout['time_embed.0'][0]}.weight", ())
    frequencies = embedder[1] if len(embedder) == 2 else TIME_FREQUENCIES
    return ModelConfig.from_phi3(values, side, frequencies)


def _table_side(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    """Tokens per side of the position table; 1 if it is missing or not 3-dimensional."""
    shape = shapes.get(name, ())
    side = isqrt(shape[1]) if len(shape) == 3 else 1
    if len(shape) == 3 and side * side != shape[1]:
        raise CheckpointError(f"{name} has {shape[1]} places, which is not a square")
    return max(1, side)
