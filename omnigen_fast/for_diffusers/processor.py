"""diffusers' processor of prompts and images, without torchvision."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..config import TOKEN_PIXELS, ModelConfig
from ..images import read_image


@lru_cache(maxsize=2)
def _processor_class(compact: bool) -> type:
    """diffusers' processor with this project's reading of images, so without torchvision.

    `compact`: its attention mask is [rows, tokens], see `_branches`, not quadratic.
    """
    from diffusers.pipelines.omnigen.processor_omnigen import (
        OmniGenCollator,
        OmniGenMultiModalProcessor,
    )

    class Collator(OmniGenCollator):
        def create_mask(self, attention_mask: Tensor, num_tokens_for_output_images: list) -> tuple:
            kv_end = attention_mask.cumsum(1) * attention_mask
            return kv_end, [None] * len(attention_mask)

        def adjust_attention_for_input_images(self, attention_mask: Tensor, image_sizes: dict):
            for row, places in image_sizes.items():
                for first, stop in places:
                    attention_mask[row, first:stop] = attention_mask[row, stop - 1].clone()
            return attention_mask

        def create_position(self, attention_mask: Tensor, num_tokens_for_output_images: list):
            return (attention_mask.cumsum(1) - 1).clamp(min=0)

    class Processor(OmniGenMultiModalProcessor):
        def __init__(
            self, text_tokenizer: Any, max_image_size: int = 1024, config: ModelConfig | None = None
        ) -> None:
            self.text_tokenizer = text_tokenizer
            self.max_image_size = max_image_size
            # 192: the released model's
            self._max_side = TOKEN_PIXELS * 192 if config is None else config.max_image_side
            self.collator = Collator() if compact else OmniGenCollator()

        def reset_max_image_size(self, max_image_size: int) -> None:
            self.max_image_size = max_image_size

        def process_image(self, image: Any) -> Tensor:
            found = read_image(image, self.max_image_size, self._max_side, "an input image")
            pixels = torch.from_numpy(found.pixels).to(torch.float32)
            return pixels.permute(2, 0, 1) / 255 * 2 - 1

    return Processor


def _provide_processor() -> None:
    """Gives diffusers' module the name that it lacks without torchvision."""
    from diffusers.pipelines.omnigen import pipeline_omnigen

    if not hasattr(pipeline_omnigen, "OmniGenMultiModalProcessor"):
        pipeline_omnigen.OmniGenMultiModalProcessor = _processor_class(compact=False)


def _withdraw_processor() -> None:
    from diffusers.pipelines.omnigen import pipeline_omnigen

    found = getattr(pipeline_omnigen, "OmniGenMultiModalProcessor", None)
    if found is _processor_class(compact=False):
        del pipeline_omnigen.OmniGenMultiModalProcessor
