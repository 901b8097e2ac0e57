"""What the planner decides about (Workload) and what it decides (MemoryPlan)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from ..config import ModelConfig, released_sizes, tokens

RING = 2  # layers of streamed weights, or of streamed keys and values, that are on the device
MLP_ROWS = 4096  # large enough that a product loses nothing, small enough to bound its memory
SHARED_TOKENS = 128  # branches that begin with so many equal tokens share their keys and values


@dataclass(frozen=True)
class Condition:
    """Branches whose keys and values are kept together.

    One branch, or two that begin with the same `shared` tokens, which are computed and kept once.
    """

    tokens: tuple[int, ...]  # of each branch, the shared ones included
    shared: int = 0

    def rows(self, steps: int) -> int:
        """Cache rows: condition, the current step's time token and those of all steps."""
        return sum(tokens + 1 + steps for tokens in self.tokens) - self.shared


@dataclass(frozen=True)
class Workload:
    """The sizes of a request, all that its cost depends on."""

    height: int  # of the output, pixels
    width: int
    steps: int
    branches: tuple[tuple[int, ...], ...]  # of each picture: condition tokens of its branches
    conditions: tuple[Condition, ...]  # without repetition
    images: tuple[tuple[int, int], ...] = ()  # (height, width) of the input images to encode

    @property
    def noise_tokens(self) -> int:
        """Of one picture: patches of 2 x 2 latents of 8 x 8 pixels."""
        return tokens(self.height, self.width)

    def cache_rows(self) -> int:
        """Rows of keys and values that all conditions need."""
        return sum(condition.rows(self.steps) for condition in self.conditions)

    def cached_share(self) -> float:
        """Of the rows that all steps of a run without a cache compute, those that are kept, 0 to 1.

        Conditions are computed once, and so is every step's time token; branches that other
        pictures share count where they are kept.
        """
        branches = [tokens for picture in self.branches for tokens in picture]
        uncached = self.steps * sum(tokens + 1 + self.noise_tokens for tokens in branches)
        # a cache row for each branch is the current step's time token: a copy
        filled = self.cache_rows() - sum(len(condition.tokens) for condition in self.conditions)
        computed = filled + self.steps * self.noise_tokens * len(branches)
        return 1 - computed / uncached


@dataclass(frozen=True)
class MemoryPlan:
    """Where everything lives and in what portions it is worked off; no value of it changes a bit
    of what is computed, but for the order in which sums are taken.
    """

    resident_layers: int  # layers whose weights stay on the device; the others are streamed
    cache: Literal["device", "ring", "none"]  # keys and values: there, streamed, or recomputed
    branches_per_pass: int | None  # None for all branches of every picture at once
    mlp_rows: int  # rows of the MLP's widest product
    vae_resident: bool  # or moved to the device to encode and to decode
    strip_rows: int | None  # latent rows that the VAE works off at once; None for all
    capture: bool  # record a step as a CUDA graph
    kept_bytes: int  # for conditions of earlier requests
    strips_on_host: bool = False  # what the VAE keeps between strips is on the host

    @classmethod
    def plain(cls, layers: int, kept_bytes: int = 0, capture: bool = False) -> MemoryPlan:
        """Everything on the device and at once."""
        return cls(
            resident_layers=layers,
            cache="device",
            branches_per_pass=None,
            mlp_rows=MLP_ROWS,
            vae_resident=True,
            strip_rows=None,
            capture=capture,
            kept_bytes=kept_bytes,
        )


@dataclass(frozen=True)
class Switches:
    """What the caller has fixed, under the original's names; None leaves it to the planner."""

    use_kv_cache: bool | None = None
    offload_kv_cache: bool | None = None
    offload_model: bool | None = None
    separate_cfg_infer: bool | None = None

    def applied_to(self, plan: MemoryPlan, layers: int) -> MemoryPlan:
        """The plan with what is fixed here, for a model of so many layers."""
        changes: dict[str, Any] = {}
        if self.offload_kv_cache is not None:
            changes["cache"] = "ring" if self.offload_kv_cache else "device"
        if self.use_kv_cache is not None and not (self.use_kv_cache and plan.cache != "none"):
            changes["cache"] = "device" if self.use_kv_cache else "none"
        if self.offload_model is not None:
            changes["resident_layers"] = 0 if self.offload_model else layers
        if self.separate_cfg_infer is not None:
            changes["branches_per_pass"] = 1 if self.separate_cfg_infer else None
        return replace(plan, **changes)


# Wrapped around a prompt of input images alone, and around each image, in tokens (about).
_WRAPPING, _IMAGE_TAGS = 27, 3


@dataclass(frozen=True)
class Sizes:
    """All that the original's cost depends on, beside its switches.

    `text_tokens` are those of the wrapped prompt without its images' own; `negative_tokens` about
    those of the built-in negative prompt.
    """

    height: int  # pixels
    width: int
    images: tuple[tuple[int, int], ...] = ()  # (height, width) of each input image, preprocessed
    steps: int = 50
    text_tokens: int = 60
    negative_tokens: int = 121

    @property
    def noise_tokens(self) -> int:
        return tokens(self.height, self.width)

    @property
    def image_tokens(self) -> int:
        return sum(tokens(*image) for image in self.images)

    @property
    def branches(self) -> tuple[int, ...]:
        """Condition tokens of cond, uncond and, with images, img-cond."""
        cond = self.text_tokens + self.image_tokens
        if not self.images:
            return cond, self.negative_tokens
        tags = _WRAPPING + _IMAGE_TAGS * len(self.images)
        return cond, self.negative_tokens, tags + self.image_tokens


_BEFORE_IMAGES = 15  # tokens of the prompt's wrapping and the first image's tag (about)


def typical_workload(
    height: int,
    width: int,
    *,
    images: int = 0,
    max_input_image_size: int = 1024,
    steps: int = 50,
    pictures: int = 1,
    prompt_tokens: int = 60,
    image_first: bool = False,
    config: ModelConfig | None = None,
) -> Workload:
    """A request of different prompts of one length, each with square input images.

    Args:
        height, width: of the output, multiples of 16.
        images: how many input images each prompt has.
        max_input_image_size: their side.
        steps: Euler steps.
        pictures: how many prompts there are, with a picture each.
        prompt_tokens: of a wrapped prompt, without its images' own.
        image_first: whether the images stand in front of the instruction, so that the branches of
            prompt and images begin alike.
        config: decides which branches take the same rotary factor; the released model's.
    """
    config = config or released_sizes()
    side = max_input_image_size // 16 * 16
    sizes = Sizes(height, width, ((side, side),) * images, steps, prompt_tokens)
    cond, uncond, *rest = sizes.branches
    conditions = [(Condition((cond,)), *(Condition((one,)) for one in rest))] * pictures
    if images and image_first:
        image = rest[0]
        same_factor = config.uses_long_factor(cond + 1 + sizes.noise_tokens) == (
            config.uses_long_factor(image + 1 + sizes.noise_tokens)
        )
        shared = min(_BEFORE_IMAGES + sizes.image_tokens + 3 * (images - 1), cond, image)
        if same_factor and shared >= SHARED_TOKENS:
            conditions = [(Condition((cond, image), shared),)] * pictures
    return Workload(
        height=height,
        width=width,
        steps=steps,
        branches=(sizes.branches,) * pictures,
        # the negative prompt is one for all
        conditions=(Condition((uncond,)), *(one for picture in conditions for one in picture)),
        images=sizes.images * pictures,
    )
