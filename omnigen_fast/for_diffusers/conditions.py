"""Conditions: the arguments of diffusers' transformer as encoded branches, without padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import PATCH, VAE_SCALE, ModelConfig
from ..errors import RequestError
from ..images import content_digest
from ..sequence import EncodedBranch


class UnusualCall(RequestError):
    """A call that OmniGen's pipeline never makes; only diffusers' own forward can run it."""


@dataclass(frozen=True)
class _EncodedImage:
    """An input image of which only the latents are known; takes the place of `InputImage`."""

    digest: str  # of the latents
    size: tuple[int, int]  # (height, width) in pixels


def call_time(timestep: int | float | Tensor) -> float:
    """The time of a call, which all its rows share.

    Raises:
        UnusualCall: they don't.
    """
    if not isinstance(timestep, Tensor):
        return float(timestep)
    values = set(timestep.float().flatten().tolist())
    if len(values) != 1:
        raise UnusualCall(f"all rows of a call must have one time, got {sorted(values)}")
    return values.pop()


def encoded_branches(
    config: ModelConfig,
    input_ids: Tensor,
    image_latents: Sequence[Tensor],
    image_sizes: Mapping[int, Sequence[Sequence[int]]],
    mask: Tensor,
    latent_shape: tuple[int, ...],
) -> tuple[list[EncodedBranch], dict[str, Tensor]]:
    """The condition of each row without padding, and the latents of all images by digest.

    Args:
        config: sizes of the model.
        input_ids: [rows, tokens], padded on the left.
        image_latents: [1, 4, height / 8, width / 8] of every image, row by row.
        image_sizes: by row, the first token of each image and the token after its last.
        mask: diffusers' [rows, T, T]; or [rows, tokens], how many tokens each token sees, 0 for
            padding.
        latent_shape: of the noise.

    Raises:
        UnusualCall: see `kv_ends`.
        RequestError: shapes that don't fit.
    """
    rows, tokens = input_ids.shape
    height, width = latent_shape[2] // PATCH, latent_shape[3] // PATCH
    noise_tokens = height * width
    if latent_shape[0] != rows or max(height, width) > config.pos_embed_size:
        raise RequestError(
            f"latents {list(latent_shape)} for {rows} rows of tokens; they need the same number of "
            f"rows, and at most {config.max_image_side} pixels a side"
        )
    if mask.ndim == 3:
        mask = kv_ends(mask, tokens, noise_tokens)
    ids, ends = input_ids.cpu().numpy(), mask.to(torch.int32).cpu().numpy()
    remaining = iter(image_latents)
    latents: dict[str, Tensor] = {}
    spans: dict[int, list[tuple[int, int, Any]]] = {}
    for row, places in image_sizes.items():
        for first, stop in places:
            one = next(remaining)[0]
            image = _encoded_image(one)
            latents[image.digest] = one
            spans.setdefault(row, []).append((first, stop, image))
    branches = []
    for row in range(rows):
        padding = int((ends[row] == 0).sum())
        length = tokens - padding
        if length + 1 + noise_tokens > config.max_position_embeddings:
            raise RequestError(
                f"{length} tokens with {noise_tokens} for the picture exceed the model's "
                f"{config.max_position_embeddings} positions; shorten the prompt, or make its "
                "images or the picture smaller"
            )
        placed = tuple((a - padding, b - padding, image) for a, b, image in spans.get(row, ()))
        token_ids, kv_end = ids[row, padding:].astype(np.int64), ends[row, padding:].copy()
        long = config.uses_long_factor(length + 1 + noise_tokens)
        shown = tuple((a, b, image.digest, image.size) for a, b, image in placed)
        key = (token_ids.tobytes(), kv_end.tobytes(), shown, long)
        branches.append(EncodedBranch(token_ids, kv_end, placed, long, key))
    return branches, latents


def _encoded_image(latents: Tensor) -> _EncodedImage:
    _, height, width = latents.shape
    digest = content_digest(latents.float().cpu().numpy())
    return _EncodedImage(digest, (VAE_SCALE * height, VAE_SCALE * width))


def kv_ends(mask: Tensor, tokens: int, noise_tokens: int) -> Tensor:
    """How many tokens of its row each token sees, 0 for padding; [rows, tokens], int32.

    Raises:
        UnusualCall: the mask does not follow OmniGen's rules.
    """
    seen = mask[:, -1, :tokens].bool()  # noise tokens see everything except padding
    places = torch.arange(tokens, device=mask.device)
    length = seen.sum(1)
    padding = tokens - length
    block = mask[:, :tokens, :tokens].bool() & seen[:, :, None]
    ends = block.sum(2)
    prefix = (places - padding[:, None])[:, None, :] < ends[:, :, None]
    wrong = (
        mask.shape[1:] != (tokens + 1 + noise_tokens,) * 2
        or not torch.equal(seen, places >= padding[:, None])
        or not torch.equal(block, prefix & seen[:, :, None] & seen[:, None, :])
        or (seen & (ends == 0)).any()
        or not torch.equal(mask[:, tokens, :tokens].bool(), seen)
        or not mask[:, tokens:, tokens].all()
        or mask[:, tokens, tokens + 1 :].any()
        or (mask[:, :tokens, tokens:].bool() & seen[:, :, None]).any()
        or not torch.equal(
            mask[:, tokens + 1 :, :tokens].bool(),
            seen[:, None, :].expand(-1, noise_tokens, -1),
        )
        or not mask[:, tokens + 1 :, tokens + 1 :].all()
    )
    if wrong:
        raise UnusualCall(
            f"the attention mask {list(mask.shape)} is not OmniGen's; use the one that the "
            "pipeline's own processor makes"
        )
    return ends.to(torch.int32)


def unfold(values: Tensor, height: int, width: int) -> Tensor:
    """Patches [rows, N, 16], each (row, column, channel), as [rows, 4, height, width]."""
    patches = values.unflatten(1, (height // PATCH, width // PATCH))
    patches = patches.unflatten(3, (PATCH, PATCH, -1)).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(len(values), -1, height, width)
