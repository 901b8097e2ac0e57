"""Models and LoRAs of ComfyUI's folders, and what nodes hand on as a model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import folder_paths
from comfy import model_management

from ..errors import RequestError, brief
from ..memory.device import parse_memory
from ..memory.plan import MemoryPlan
from ..pipeline import OmniGenPipeline
from ..precision import AUTO
from ..run import auto_precision
from ..streaming import is_out_of_memory
from ..vae.preview import Preview
from ..weights.files import SHIPPED
from ..weights.lora_files import read_adapter
from .memory import Patcher, potential_budget

FOLDER = "omnigen"  # in ComfyUI's models, and its key in extra_model_paths.yaml
LORAS = "loras"
PUBLISHED = "Shitao/OmniGen-v1"
OWN = "as stored"  # of weights: the form of the file
OF_DTYPE = "dtype"  # of products and of the cache: that of the arithmetic
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SUFFIXES = (".safetensors", ".json")
_CONFIGS = ("config.json", "transformer/config.json")  # the original's layout, diffusers'


def register_folder() -> None:
    """Makes models/omnigen one of ComfyUI's model folders."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


def local_models() -> dict[str, str]:
    """Folders of models by their names, NAME or OWNER/NAME, in ComfyUI's model folders."""
    found: dict[str, str] = {}
    for root in folder_paths.get_folder_paths(FOLDER):
        for folder in _folders(root):
            for one in (folder,) if _is_model(folder) else filter(_is_model, _folders(folder)):
                found.setdefault(Path(one).relative_to(root).as_posix(), one)
    return dict(sorted(found.items()))


def _is_model(folder: str) -> bool:
    return any(os.path.isfile(os.path.join(folder, config)) for config in _CONFIGS)


def _folders(root: str) -> Iterator[str]:
    try:
        with os.scandir(root) as entries:
            yield from sorted(one.path for one in entries if one.is_dir())
    except OSError:  # not there, or not readable
        return


def model_names() -> list[str]:
    """What the list of a node offers: local models, the published one, and the bundled ones."""
    return list(dict.fromkeys((*local_models(), PUBLISHED, *SHIPPED)))


def find_model(name: str, hub_id: str = "") -> str:
    """The folder or hub id of a model in the list; `hub_id` wins unless it is empty.

    Raises RequestError for anything else: a workflow must not open any folder of the machine.
    """
    wanted = hub_id.strip()
    if wanted:
        if not _HUB_ID.fullmatch(wanted) or os.path.isdir(wanted):
            raise RequestError(
                f"hub_id must be OWNER/NAME, got {brief(wanted)}; put local models into "
                f"models/{FOLDER} and choose them by name"
            )
        return wanted
    local = local_models()
    if name in (PUBLISHED, *SHIPPED) and name not in local:
        return name
    if name not in local:
        raise RequestError(
            f"there is no model {brief(name)} in models/{FOLDER}; put its folder there, or choose "
            "another"
        )
    return local[name]


def fingerprint(path: str) -> str:
    """Another text if a LoRA's file or one of a model's folder changes."""
    found = [path] if os.path.isfile(path) else Path(path).rglob("*")
    return str(sorted((str(one), *_stamp(one)) for one in found if str(one).endswith(_SUFFIXES)))


def _stamp(path: str | Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Lora:
    """A file of a LoRA as it was when it was chosen."""

    path: str
    stamp: tuple[int, int]  # size and time: another file of that path is another LoRA

    @property
    def name(self) -> str:
        return f"{self.path} ({self.stamp[0]}, {self.stamp[1]})"


@dataclass(eq=False)
class Loaded:
    """A pipeline that several models of a workflow share: they differ in their LoRAs."""

    pipe: OmniGenPipeline
    cap: int | None  # bytes that a call may take at most; None for no limit of its own
    patcher: Patcher = field(init=False)
    _preview: Preview | None = None

    def __post_init__(self) -> None:
        self.patcher = Patcher(self.pipe)

    def preview(self) -> Preview | None:
        """Fitted to the VAE once; None where memory is too short for that."""
        if self._preview is None:
            try:
                self._preview = Preview.fit(self.pipe.vae)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
        return self._preview


@dataclass(frozen=True, eq=False)
class Model:
    """What nodes hand on: a pipeline, and the LoRAs to run it with."""

    loaded: Loaded
    loras: tuple[tuple[Lora, float], ...] = ()

    @property
    def pipe(self) -> OmniGenPipeline:
        return self.loaded.pipe

    def with_lora(self, name: str, strength: float) -> Model:
        """With one of ComfyUI's LoRAs on top; the same one twice adds up.

        Raises:
            RequestError: ComfyUI has no such file.
            CheckpointError: it is not a LoRA, or not of this model.
        """
        path = folder_paths.get_full_path(LORAS, name)
        if path is None:
            raise RequestError(f"there is no LoRA {brief(name)} in models/{LORAS}; put it there")
        lora = Lora(path, _stamp(path))
        read_adapter(path, self.pipe.engine.checkpoint)  # what is wrong with it, at its own node
        strengths = dict(self.loras)
        strengths[lora] = strengths.get(lora, 0.0) + strength
        return replace(self, loras=tuple(strengths.items()))

    def apply_loras(self) -> None:
        """Makes the pipeline's weights what these LoRAs make of them, and no others."""
        pipe = self.pipe
        wanted = {lora.name: (lora, strength) for lora, strength in self.loras}
        kept = pipe.engine.loras.names
        if gone := [name for name in kept if name not in wanted]:
            pipe.delete_adapters(gone)
        for name, (lora, strength) in wanted.items():
            if name not in kept:
                pipe.load_lora_weights(lora.path, name, weight=strength)
        if wanted:
            pipe.set_adapters(list(wanted), [strength for _, strength in wanted.values()])


def load(
    where: str,
    dtype: str,
    weights: str,
    compute: str,
    vae_dtype: str,
    memory: str,
    cache: str,
    attention: str,
) -> Model:
    """Opens a model; its layers are read by the first call, when ComfyUI has made room.

    Args:
        where: folder or hub id.
        dtype: see `OmniGenPipeline.from_pretrained`; so are the others.
        weights: likewise, or `OWN`.
        compute: likewise, or `OF_DTYPE`.
        vae_dtype: likewise.
        memory: an amount that calls may take at most, or "auto".
        cache: see `OmniGenPipeline.from_pretrained`, or `OF_DTYPE`.
        attention: likewise.
    """
    cap = parse_memory(memory)
    pipe = OmniGenPipeline.from_pretrained(
        where,
        device=model_management.get_torch_device(),
        dtype=dtype,
        weights=None if weights in (OWN, AUTO) else weights,
        compute=None if compute == OF_DTYPE else compute,
        cache=None if cache == OF_DTYPE else cache,
        attention=attention,
        vae_dtype=vae_dtype,
        memory=replace(MemoryPlan.plain(0), vae_resident=False),
    )
    loaded = Loaded(pipe, cap)
    if weights == AUTO:
        engine = pipe.engine
        budget = potential_budget(pipe, loaded.patcher, cap)
        found = auto_precision(
            engine.checkpoint, engine.vae, engine.precision, engine.device, budget
        )
        if found != engine.precision:
            with pipe.driving():
                engine.load(found, 0)
    return Model(loaded)
