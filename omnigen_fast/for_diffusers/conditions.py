"""The conditions that diffusers' loop hands over, without their padding."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import PATCH, VAE_SCALE, ModelConfig
from ..errors import RequestError
from ..sequence import EncodedBranch


@dataclass(frozen=True)
class _GivenImage:
    """An input image as diffusers' loop hands it over; stands where `InputImage` does."""

    latents: Tensor  # [4, height / 8, width / 8]
    digest: str

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return VAE_SCALE * self.latents.shape[1], VAE_SCALE * self.latents.shape[2]


def _one_time(timestep: int | float | Tensor) -> float:
    """The time of a call: that of all its rows."""
    if not isinstance(timestep, Tensor):
        return float(timestep)
    values = set(timestep.float().flatten().tolist())
    if len(values) != 1:
        raise RequestError(f"all rows of a call must have one time, got {sorted(values)}")
    return values.pop()


def _branches(
    config: ModelConfig,
    input_ids: Tensor,
    image_latents: Sequence[Tensor],
    image_sizes: Mapping[int, Sequence[Sequence[int]]],
    mask: Tensor,
    latent_shape: tuple[int, ...],
) -> list[EncodedBranch]:
    """The condition of every row, its padding left out.

    Args:
        config: sizes of the model.
        input_ids: [rows, tokens], padded on the left.
        image_latents: of all rows' images, row by row.
        image_sizes: first and past-the-last token of each image, by row.
        mask: diffusers' [rows, T, T], or [rows, tokens]: how many tokens each sees, 0 for padding.
        latent_shape: of the call.
    """
    rows, tokens = input_ids.shape
    height, width = latent_shape[2] // PATCH, latent_shape[3] // PATCH
    noise_tokens = height * width
    if latent_shape[0] != rows or max(height, width) > config.pos_embed_size:
        raise RequestError(
            f"latents {list(latent_shape)} for {rows} rows of tokens; as many rows are needed, and "
            f"at most {config.max_image_side} pixels a side"
        )
    if mask.ndim == 3:
        mask = _kv_ends(mask, tokens, noise_tokens)
    ids, ends = input_ids.cpu().numpy(), mask.to(torch.int32).cpu().numpy()
    images = iter(image_latents)
    spans: dict[int, list[tuple[int, int, Any]]] = {}
    for row, places in image_sizes.items():
        for first, stop in places:
            spans.setdefault(row, []).append((first, stop, _given_image(next(images))))
    branches = []
    for row in range(rows):
        padding = int((ends[row] == 0).sum())
        length = tokens - padding
        if length + 1 + noise_tokens > config.max_position_embeddings:
            raise RequestError(
                f"{length} tokens with {noise_tokens} for the picture are more than the model's "
                f"{config.max_position_embeddings} positions"
            )
        placed = tuple((a - padding, b - padding, image) for a, b, image in spans.get(row, ()))
        token_ids, kv_end = ids[row, padding:].astype(np.int64), ends[row, padding:].copy()
        long = config.uses_long_factor(length + 1 + noise_tokens)
        shown = tuple((a, b, image.digest, image.size) for a, b, image in placed)
        key = (token_ids.tobytes(), kv_end.tobytes(), shown, long)
        branches.append(EncodedBranch(token_ids, kv_end, placed, long, key))
    return branches


def _given_image(latents: Tensor) -> _GivenImage:
    content = latents[0].float().cpu().numpy()
    digest = hashlib.blake2b(repr(content.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(content))
    return _GivenImage(latents[0], digest.hexdigest())


def _kv_ends(mask: Tensor, tokens: int, noise_tokens: int) -> Tensor:
    """[rows, tokens], int32: how many tokens of its own row each sees, 0 for padding.

    Raises:
        RequestError: a mask that OmniGen's rules do not make.
    """
    seen = mask[:, -1, :tokens].bool()  # a noise token sees all but the padding
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
        raise RequestError(
            f"an attention mask {list(mask.shape)} that is not OmniGen's; give the one that "
            "the pipeline's own processor makes"
        )
    return ends.to(torch.int32)


def _unfold(values: Tensor, height: int, width: int) -> Tensor:
    """[rows, 4, height, width] of patches [rows, N, 16], each (row, column, channel)."""
    patches = values.unflatten(1, (height // PATCH, width // PATCH))
    patches = patches.unflatten(3, (PATCH, PATCH, -1)).permute(0, 5, 1, 3, 2, 4)
    return patches.reshape(len(values), -1, height, width)
