"""Other programs that make the same pictures, each behind `contenders.Contender`.

Each one computes something else in some case; it is measured where it agrees, and `suite` says what
was compared before it shows a time.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from omnigen_fast.config import ModelConfig
from omnigen_fast.errors import OmniGenError, RequestError

from ..contenders import Contender
from .model_files import Weights

NAMES = ("diffusers", "diffusers-compile", "original")


class PeerMissing(OmniGenError):
    """A peer can't run here; the message says why and what to do."""


def parse(text: str) -> tuple[str, ...]:
    """Names with commas between; `none` for no peer.

    Raises:
        RequestError: an unknown name.
    """
    if text == "none":
        return ()
    names = tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise RequestError(
            f"--peers: {', '.join(map(repr, unknown))} is not known; there are "
            f"{', '.join(NAMES)}, and none"
        )
    return names


def make(
    name: str,
    config: ModelConfig,
    weights: Weights,
    dtype: torch.dtype,
    device: torch.device,
    original_python: Path | None = None,
) -> Contender:
    """A peer with a model's weights.

    Args:
        name: one of `NAMES`.
        config: sizes of the model.
        weights: the model's, by our names.
        dtype: to compute in.
        device: to compute on.
        original_python: interpreter of the original's environment, None for that of `make peers`.

    Raises:
        PeerMissing: it is not installed, or does not start.
    """
    if name == "original":
        from .original import Original

        return Original(config, weights, dtype, device, original_python)
    if find_spec("diffusers") is None:
        raise PeerMissing("not installed; run `pip install diffusers`")
    from .diffusers import Diffusers

    try:
        return Diffusers(config, weights, dtype, device, compiled=name == "diffusers-compile")
    except ImportError as error:
        first = str(error).strip().partition("\n")[0]
        raise PeerMissing(f"this diffusers has no OmniGen: {first}") from error
