"""Guidance, unpatchify and the Euler step, in one pass over the only copy of the latents.

    latents += length * sum_g coefficient_g * velocity_g    (Ho & Salimans, 2022; Liu et al., 2022)

A token's values are (row, column, channel) of its patch. A program takes tokens of one image and
reads its branches one after the other, so any number of them may be combined; the velocities are
neither widened, nor summed, nor laid out as an image in memory. Which step each image takes is read
on the device, so that a captured launch serves them all. `reference.guidance_step_` is the
specification.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import contract, launch


@triton.jit
def guidance_step_kernel(
    latents_ptr,
    prediction_ptr,
    coefficient_ptr,
    cu_groups_ptr,
    lengths_ptr,
    step_ptr,
    stride_prediction_group,
    stride_prediction_token,
    tokens,
    height,
    width,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    VALUES: tl.constexpr,  # PATCH * PATCH * CHANNELS, or the power of two above it
    BLOCK: tl.constexpr,  # tokens
):
    i_block, i_image = tl.program_id(0), tl.program_id(1)
    start = tl.load(cu_groups_ptr + i_image)
    stop = tl.load(cu_groups_ptr + i_image + 1)
    length = tl.load(lengths_ptr + tl.load(step_ptr + i_image))
    o_token = i_block * BLOCK + tl.arange(0, BLOCK)[:, None]
    o_value = tl.arange(0, VALUES)[None, :]
    m_value = (o_token < tokens) & (o_value < PATCH * PATCH * CHANNELS)

    b_velocity = tl.zeros([BLOCK, VALUES], tl.float32)
    prediction_ptr += start.to(tl.int64) * stride_prediction_group
    p_value = prediction_ptr + o_token * stride_prediction_token + o_value
    for i_group in range(start, stop):
        b_value = tl.load(p_value, mask=m_value, other=0.0).to(tl.float32)
        b_velocity += tl.load(coefficient_ptr + i_group) * b_value
        p_value += stride_prediction_group

    o_channel = o_value % CHANNELS
    o_y = o_token // (width // PATCH) * PATCH + o_value // (PATCH * CHANNELS)
    o_x = o_token % (width // PATCH) * PATCH + o_value // CHANNELS % PATCH
    p_image = latents_ptr + i_image.to(tl.int64) * CHANNELS * height * width
    p_latents = p_image + (o_channel * height + o_y) * width + o_x
    b_latents = tl.load(p_latents, mask=m_value)
    tl.store(p_latents, b_latents + length * b_velocity, mask=m_value)


def guidance_step_(
    latents: Tensor,  # [images, channels, height, width], float32, updated in place
    prediction: Tensor,  # [groups, tokens, patch * patch * channels], (row, column, channel)
    coefficient: Tensor,  # [groups], float32
    cu_groups: Tensor,  # [images + 1], int32
    lengths: Tensor,  # [steps], float32
    step: Tensor,  # [images], int64: the element of lengths that each image takes
    patch: int,
) -> None:
    """Launches the step; see `reference.guidance_step_`.

    Raises:
        TypeError, ValueError: see `contract.guidance_step_`.
    """
    contract.guidance_step_(
        latents, prediction, coefficient, cu_groups, lengths, step, patch, fused=True
    )
    images, channels, height, width = latents.shape
    tokens = prediction.shape[1]
    if not images or not tokens:
        return
    chosen = launch.choose("guidance_step_", prediction)
    guidance_step_kernel[(triton.cdiv(tokens, chosen.block), images)](
        latents,
        prediction,
        coefficient,
        cu_groups,
        lengths,
        step,
        prediction.stride(0),
        prediction.stride(1),
        tokens,
        height,
        width,
        CHANNELS=channels,
        PATCH=patch,
        VALUES=triton.next_power_of_2(patch * patch * channels),
        BLOCK=chosen.block,
        num_warps=chosen.num_warps,
    )
