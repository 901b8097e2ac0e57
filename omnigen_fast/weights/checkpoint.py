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
from ..forms import QUANTISED, Part, parts_of
from ..linear import Weight
from ..precision import Precision
from ..quantised import QuantisedWeight, parts_finite, quantised
from ..regular_files import read_json
from .files import (
    FORM_FIELD,
    PART_SUFFIXES,
    TensorReader,
    WeightFiles,
    check_dtypes,
    check_shapes,
    find_weights,
    read_headers,
    stored_form,
)
from .names import DIFFUSERS, ORIGINAL, Layout, TensorRows, layout_sources

_TRANSFORMER = "transformer"  # diffusers' folder of it
_ANY = ""  # dtype of what may be in any
_CLASS = "OmniGenTransformer2DModel"  # diffusers'


@dataclass(frozen=True)
class Checkpoint:
    """A complete and consistent model folder; its weights are read on demand."""

    folder: str
    config: ModelConfig
    sources: Mapping[str, tuple[TensorRows, ...]]  # by our name
    files: Mapping[str, str]  # tensor name in the checkpoint: path of its file
    form: str | None  # of the layers' matrices, if `convert` has quantised them; see `forms`
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
        found = _find_files(path, folder, inner, variant)
        form = stored_form(found)
        shapes, files = read_headers(found, form is not None)
        layout = layout_of(shapes, default)
        config = read_config(read_json(os.path.join(inner, "config.json")), shapes, layout)
        sources = layout_sources(config, layout)
        expected = file_parts(sources, form, _ANY)
        check_shapes(inner, shapes, {name: part.shape for name, part in expected.items()})
        if form is not None:
            check_dtypes(found, {name: part.dtype for name, part in expected.items()})
        vae = os.path.join(folder, "vae")
        return cls(
            folder,
            config,
            sources,
            files,
            form,
            find_tokenizer(folder),
            vae if os.path.isdir(vae) else None,
        )

    def read(
        self, dtype: torch.dtype, device: torch.device, names: Iterable[str] | None = None
    ) -> dict[str, Tensor]:
        """Reads plain parameters by our names; all of them by default.

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

    def read_stored(
        self, precision: Precision, device: torch.device, names: Iterable[str]
    ) -> dict[str, Weight]:
        """Reads parameters in the form that a precision stores them in.

        On a CPU, weights of a file that has them in that form are views of the mapped file.

        Raises CheckpointError if one that is quantised holds NaN or infinities.
        """
        dtype = precision.arithmetic_dtype
        plain, result = [], dict[str, Weight]()
        for name in names:
            form = form_of(name, precision)
            if is_quantised(name) and (form is not None or self.form is not None):
                if form == self.form:
                    result[name] = self._read_quantised(name, device)
                else:
                    result[name] = stored(name, self.exact(name, precision, device), precision)
            else:
                plain.append(name)
        return result | self.read(dtype, device, plain)

    def exact(self, name: str, precision: Precision, device: torch.device) -> Tensor:
        """A new tensor with a parameter in float32: what an update is added to.

        A plain one that a precision rounds is rounded before.
        """
        if is_quantised(name) and self.form is not None:
            return self._read_quantised(name, device).exact()
        dtype = precision.arithmetic_dtype
        if form_of(name, precision) is not None:
            dtype = torch.float32
        return self.read(dtype, device, [name])[name].to(torch.float32, copy=True)

    def _read_quantised(self, name: str, device: torch.device) -> QuantisedWeight:
        """A parameter of a file that has it quantised."""
        assert self.form is not None
        sources = self.sources[name]
        parts: dict[str, Tensor] = {}
        with TensorReader(self.files, None) as reader:
            for part in parts_of(self.form, sources[0].shape):
                read = [reader.read(part_name(one.name, part), device) for one in sources]
                parts[part] = read[0] if len(read) == 1 else torch.cat(read)
        if name not in self._checked:
            if not parts_finite(self.form, parts):
                raise CheckpointError(
                    f"{self.files[sources[0].name]}: {sources[0].name} or its scales hold NaN or "
                    "infinities; the file is damaged"
                )
            self._checked.add(name)
        return QuantisedWeight(self.form, sources[0].shape[1], parts)

    @cached_property
    def _checked(self) -> set[str]:
        """Quantised parameters whose values were looked at."""
        return set()

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


def is_quantised(name: str) -> bool:
    """Whether a parameter is stored in a form where weights are quantised."""
    return name.startswith("layers.") and name.rpartition(".")[2] in QUANTISED


def form_of(name: str, precision: Precision) -> str | None:
    """The form of a parameter, by our name; None for a plain one."""
    return precision.form_of(name.rpartition(".")[2]) if is_quantised(name) else None


def stored(name: str, exact: Tensor, precision: Precision) -> Weight:
    """A parameter as a precision stores it, from its value in float32."""
    form = form_of(name, precision)
    if form is not None:
        return quantised(name, exact, form)
    return exact.to(precision.arithmetic_dtype)


def part_name(tensor: str, part: str) -> str:
    """The name in a file of a part of a quantised tensor."""
    return tensor + PART_SUFFIXES[part]


def form_metadata(form: str | None) -> dict[str, str]:
    """What a header says of a form."""
    return {} if form is None else {FORM_FIELD: form}


def file_parts(
    sources: Mapping[str, tuple[TensorRows, ...]], form: str | None, dtype: str
) -> dict[str, Part]:
    """The tensors of a model's files, in order.

    Args:
        sources: the tensors of each parameter.
        form: of the layers' matrices; None for plain ones.
        dtype: of plain tensors.
    """
    expected: dict[str, Part] = {}
    for name, rows in sources.items():
        for one in rows:
            if form is None or not is_quantised(name):
                expected[one.name] = Part(one.shape, dtype)
            else:
                for part, kept in parts_of(form, one.shape).items():
                    expected[part_name(one.name, part)] = kept
    return expected


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
