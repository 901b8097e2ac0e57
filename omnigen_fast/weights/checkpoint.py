"""Checkpoint: a model folder in the original's layout or in diffusers', checked and read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isqrt

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import CheckpointError
from .files import TensorReader, check_shapes, find_weights, read_headers, read_json
from .names import DIFFUSERS, ORIGINAL, TensorRows, layout_sources


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
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Reads the configs and headers of a local folder and checks every shape.

        Raises:
            CheckpointError: a file is missing, malformed or a pickle, or tensors are missing,
                unexpected or misshapen (all named).
        """
        folder = os.fspath(folder)
        diffusers = os.path.isdir(os.path.join(folder, "transformer"))
        weights = os.path.join(folder, "transformer") if diffusers else folder
        stem = "diffusion_pytorch_model" if diffusers else "model"
        shapes, files = read_headers(find_weights(weights, stem))
        table = "patch_embedding.pos_embed" if diffusers else "pos_embed"
        values = read_json(os.path.join(weights, "config.json"))
        read_config = ModelConfig.from_diffusers if diffusers else ModelConfig.from_phi3
        config = read_config(values, _table_side(shapes, table))
        sources = layout_sources(config, DIFFUSERS if diffusers else ORIGINAL)
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


def _table_side(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    """Tokens per side of the position table; 1 if it is missing or not 3-dimensional."""
    shape = shapes.get(name, ())
    side = isqrt(shape[1]) if len(shape) == 3 else 1
    if len(shape) == 3 and side * side != shape[1]:
        raise CheckpointError(f"{name} has {shape[1]} places, which is not a square")
    return max(1, side)
