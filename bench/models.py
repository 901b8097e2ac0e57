"""The model to measure: a checkpoint, or random weights of the real or a small size."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from omnigen_fast.config import ModelConfig
from omnigen_fast.errors import RequestError
from omnigen_fast.pipeline import OmniGenPipeline
from omnigen_fast.precision import Precision

from .common import TOKENIZER, full_config, random_weights, small_config, tiny_config
from .contenders import KeptVae, Ours
from .gpu.pictures import make_pipeline
from .peers.model_files import write_original

# layers of the model whose float32 results are compared
_CHECK_LAYERS = 2


_RANDOM = {
    "random:full": full_config,
    "random:small": small_config,
    "random:tiny": tiny_config,
}


@dataclass
class Model:
    """Weights by our names, and a pipeline on them."""

    name: str
    config: ModelConfig
    weights: dict[str, Tensor]
    ours: Ours
    folder: Path | None  # of a checkpoint

    def widened(
        self, storage: str | None = None, compute: str | None = None, cache: str | None = None
    ) -> Model:
        """The same values in float32, stored, multiplied and cached so."""
        weights = {name: value.float() for name, value in self.weights.items()}
        device = self.ours.pipe.device
        ours = _ours(self.config, weights, device, storage, compute, cache)
        return replace(self, weights=weights, ours=ours)

    @property
    def parameters(self) -> int:
        return sum(one.numel() for one in self.weights.values())


def is_random(name: str) -> bool:
    """Whether a name asks for random weights.

    Raises:
        RequestError: of an unknown size.
    """
    if name.startswith("random:") and name not in _RANDOM:
        raise RequestError(
            f"--model: {name!r} is not known; give a folder, a hub id, random:full or random:small"
        )
    if name in _RANDOM and not TOKENIZER.is_file():
        raise RequestError(
            f"--model {name} needs {TOKENIZER}, which only the repository holds; give a checkpoint"
        )
    return name in _RANDOM


def load(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    storage: str | None = None,
    compute: str | None = None,
    cache: str | None = None,
) -> Model:
    """Loads a model or draws its weights. Its pipeline keeps nothing between pictures.

    Args:
        name: see `is_random`.
        dtype: of the weights.
        device: where to run.
        storage: in which the pipeline keeps them, as `weights` of `from_pretrained`.
        compute: as that argument of `from_pretrained`.
        cache: likewise.

    Raises:
        RequestError, CheckpointError: there is no such model.
    """
    if is_random(name):
        config = _RANDOM[name]()
        weights = random_weights(config, dtype, device=device)
        ours = _ours(config, weights, device, storage, compute, cache)
        return Model(name, config, weights, ours, None)
    pipe = OmniGenPipeline.from_pretrained(
        name,
        device=device,
        dtype=dtype,
        condition_cache_bytes=0,
        weights=storage,
        compute=compute,
        cache=cache,
    )
    engine = pipe.engine
    engine.vae = KeptVae(device, engine.vae)
    weights = engine.checkpoint.read(dtype, device)
    return Model(name, engine.config, weights, Ours(pipe), Path(engine.checkpoint.folder))


def write_checkpoint(model: Model, folder: Path) -> None:
    """Writes a random model as a checkpoint, with the tests' small VAE."""
    shutil.copy(TOKENIZER, folder)
    shutil.copytree(TOKENIZER.parent / "vae", folder / "vae")
    write_original(folder, model.config, model.weights)


def check_model(
    config: ModelConfig, device: torch.device
) -> tuple[ModelConfig, dict[str, Tensor], Ours]:
    """A float32 model of the same widths but few layers, for comparing results."""
    config = replace(config, num_layers=min(_CHECK_LAYERS, config.num_layers))
    weights = random_weights(config, torch.float32, device=device)
    return config, weights, _ours(config, weights, device)


def _ours(
    config: ModelConfig,
    weights: dict[str, Tensor],
    device: torch.device,
    storage: str | None = None,
    compute: str | None = None,
    cache: str | None = None,
) -> Ours:
    precision = Precision.of(weights["norm"].dtype, storage, compute, cache)
    return Ours(make_pipeline(config, weights, device, 0, precision=precision))
