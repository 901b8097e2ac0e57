"""diffusers' processor of prompts and images, with our image reading and without torchvision."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from ..config import ModelConfig, released_sizes
from ..images import normalized, read_image


@lru_cache(maxsize=2)
def processor_class(compact: bool) -> type:
    """A subclass of diffusers' processor that reads images as `read_image` does.

    Args:
        compact: make attention masks [rows, tokens], see `encoded_branches`, instead of quadratic.
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
            config = config or released_sizes()
            self._max_side = config.max_image_side
            self.collator = Collator() if compact else OmniGenCollator()

        def reset_max_image_size(self, max_image_size: int) -> None:
            self.max_image_size = max_image_size

        def process_image(self, image: Any) -> Tensor:
            found = read_image(image, self.max_image_size, self._max_side, "an input image")
            return normalized(found.pixels)

    return Processor


def provide_processor() -> None:
    """Adds the processor to diffusers' module, which lacks it without torchvision."""
    module = _pipeline_module()
    if not hasattr(module, "OmniGenMultiModalProcessor"):
        module.OmniGenMultiModalProcessor = processor_class(compact=False)


def withdraw_processor() -> None:
    """Undoes `provide_processor`."""
    module = _pipeline_module()
    found = getattr(module, "OmniGenMultiModalProcessor", None)
    if found is processor_class(compact=False):
        del module.OmniGenMultiModalProcessor


def _pipeline_module() -> Any:
    from diffusers.pipelines.omnigen import pipeline_omnigen

    return pipeline_omnigen
