"""What the planner decides about (Workload) and what it decides (MemoryPlan)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from ..config import ModelConfig, released_sizes, tokens
from ..errors import RequestError
from ..precision import Precision
from ..schedule import StepKind, StepSchedule

RING = 2  # layers on the device at once, of streamed weights or of streamed keys and values
MLP_ROWS = 4096  # large enough for full speed, small enough to bound the memory
SHARED_TOKENS = 128  # branches that begin with this many equal tokens share keys and values
# Typical tokens of a wrapped prompt without its images, and of the built-in negative prompt.
PROMPT_TOKENS, NEGATIVE_TOKENS = 60, 121

CachePlace: TypeAlias = Literal["device", "ring", "none"]
CACHE_PLACES: tuple[CachePlace, ...] = ("device", "ring", "none")


@dataclass(frozen=True)
class Condition:
    """Branches whose keys and values are kept together.

    One branch, or two that begin with the same `shared` tokens, which are computed and kept once.
    """

    tokens: tuple[int, ...]  # of each branch, including the shared ones
    shared: int = 0

    def rows(self, steps: int) -> int:
        """Cache rows: condition, the current step's time token and those of all steps."""
        return sum(tokens + 1 + steps for tokens in self.tokens) - self.shared


@dataclass(frozen=True)
class Workload:
    """The sizes of a request: everything that its cost depends on."""

    height: int  # of the output, pixels
    width: int
    schedule: StepSchedule
    branches: tuple[tuple[int, ...], ...]  # of each picture: condition tokens of its branches
    conditions: tuple[Condition, ...]  # without repetition
    images: tuple[tuple[int, int], ...] = ()  # (height, width) of the input images to encode
    kept_latents: int = 0  # of the output's size: what an edit keeps of noise

    @property
    def steps(self) -> int:
        return len(self.schedule)

    @property
    def evaluations(self) -> int:
        """Of the velocity: steps, or more; each has its time token."""
        return self.schedule.evaluations

    def branches_of(self, kind: StepKind) -> tuple[tuple[int, ...], ...]:
        """Of each picture: condition tokens of the branches that a kind of step runs."""
        return tuple(
            tuple(one[place] for place, _ in kind.places(picture, len(one)))
            for picture, one in enumerate(self.branches)
        )

    @property
    def noise_tokens(self) -> int:
        """Of one picture: patches of 2 x 2 latents of 8 x 8 pixels."""
        return tokens(self.height, self.width)

    def cache_rows(self) -> int:
        """Rows of keys and values for all conditions."""
        return sum(condition.rows(self.evaluations) for condition in self.conditions)

    def cached_share(self) -> float:
        """The share of rows, 0 to 1, that the cache saves over all steps of a run without one.

        Conditions are computed once, and so is every step's time token. A branch that several
        pictures share is computed once, too.
        """
        noise, uncached, steps = self.noise_tokens, 0, 0
        for kind, count in self.schedule.counts.items():
            branches = [tokens for picture in self.branches_of(kind) for tokens in picture]
            if kind.computed:
                uncached += count * sum(tokens + 1 + noise for tokens in branches)
                steps += count * len(branches)
        # one cache row of each branch is a copy: the current step's time token
        filled = self.cache_rows() - sum(len(condition.tokens) for condition in self.conditions)
        computed = filled + steps * noise
        return 1 - computed / uncached


@dataclass(frozen=True)
class MemoryPlan:
    """Where weights, cache and activations live, and the sizes of the chunks they are processed in.

    Images match under all plans up to floating-point rounding: chunks change the order of sums.

    Raises RequestError for a value that no request can run with; `check` compares a plan with a
    model.
    """

    resident_layers: int  # layers whose weights stay on the device; the others are streamed
    cache: CachePlace  # keys and values: on the device, streamed, or recomputed in every step
    branches_per_pass: int | None  # None for all branches of every picture at once
    mlp_rows: int  # rows that the MLP processes at once
    vae_resident: bool  # False moves the VAE to the device only to encode and to decode
    strip_rows: int | None  # latent rows that the VAE processes at once; None for all
    capture: bool  # record a step as a CUDA graph
    kept_bytes: int  # for conditions of earlier requests
    strips_on_host: bool = False  # the VAE keeps activations on the host between strips
    precision: Precision | None = None  # None for the one that the weights are in

    def __post_init__(self) -> None:
        _check_whole("resident_layers", self.resident_layers, 0)
        if not isinstance(self.cache, str) or self.cache not in CACHE_PLACES:
            allowed = ", ".join(map(repr, CACHE_PLACES))
            raise RequestError(f"MemoryPlan: cache must be one of {allowed}, got {self.cache!r}")
        _check_whole("branches_per_pass", self.branches_per_pass, 1, "None for all branches")
        _check_whole("mlp_rows", self.mlp_rows, 1)
        _check_whole("strip_rows", self.strip_rows, 1, "None for the whole image")
        _check_whole("kept_bytes", self.kept_bytes, 0)
        if self.precision is not None and not isinstance(self.precision, Precision):
            raise RequestError(
                f"MemoryPlan: precision must be a Precision or None, got {self.precision!r}"
            )
        for name in ("vae_resident", "capture", "strips_on_host"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise RequestError(f"MemoryPlan: {name} must be True or False, got {value!r}")
        if self.capture and self.cache != "device":
            raise RequestError(
                f"MemoryPlan: capture=True needs cache='device', got cache={self.cache!r}; set "
                "capture=False to stream or recompute keys and values"
            )

    @classmethod
    def plain(cls, layers: int, kept_bytes: int = 0, capture: bool = False) -> MemoryPlan:
        """This many layers and everything else on the device, all processed at once."""
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

    def check(self, layers: int) -> None:
        """Raises RequestError if a model of this many layers can't run by this plan."""
        if self.resident_layers > layers:
            raise RequestError(
                f"MemoryPlan: resident_layers must be at most {layers}, the model's layers, got "
                f"{self.resident_layers}"
            )
        if self.capture and self.resident_layers < layers:
            raise RequestError(
                f"MemoryPlan: capture=True needs all {layers} layers resident, got "
                f"resident_layers={self.resident_layers}; a CUDA graph can't record the copies of "
                "streamed layers, so set capture=False"
            )


def _check_whole(name: str, value: object, least: int, otherwise: str = "") -> None:
    """Refuses what is not a whole number; None is allowed where it means something."""
    if value is None and otherwise:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        way = f" (or {otherwise})" if otherwise else ""
        raise RequestError(
            f"MemoryPlan: {name} must be a whole number of at least {least}{way}, got {value!r}"
        )


@dataclass(frozen=True)
class Switches:
    """What the caller has set, under the original's names; None leaves it to the planner."""

    use_kv_cache: bool | None = None
    offload_kv_cache: bool | None = None
    offload_model: bool | None = None
    separate_cfg_infer: bool | None = None

    @property
    def given(self) -> dict[str, bool]:
        """The switches that are set, by name."""
        values = {
            "use_kv_cache": self.use_kv_cache,
            "offload_kv_cache": self.offload_kv_cache,
            "offload_model": self.offload_model,
            "separate_cfg_infer": self.separate_cfg_infer,
        }
        return {name: value for name, value in values.items() if value is not None}

    def without(self, *names: str) -> Switches:
        """These switches with some left to the planner."""
        return Switches(**{name: value for name, value in self.given.items() if name not in names})

    def for_device(self, on_host: bool) -> Switches:
        """The switches that count: offloading does nothing where the host is the device."""
        return self.without("offload_kv_cache", "offload_model") if on_host else self

    def applied_to(self, plan: MemoryPlan, layers: int) -> MemoryPlan:
        """The plan with these switches, for a model of this many layers.

        A switch that streams or recomputes anything drops the plan's CUDA graph.
        """
        cache, resident, branches = plan.cache, plan.resident_layers, plan.branches_per_pass
        if self.offload_kv_cache is not None:
            cache = "ring" if self.offload_kv_cache else "device"
        if self.use_kv_cache is False:
            cache = "none"
        elif self.use_kv_cache and cache == "none":
            cache = "device"
        if self.offload_model is not None:
            resident = 0 if self.offload_model else layers
        if self.separate_cfg_infer is not None:
            branches = 1 if self.separate_cfg_infer else None
        streams = cache != "device" or self.offload_model is True
        return replace(
            plan,
            cache=cache,
            resident_layers=resident,
            branches_per_pass=branches,
            capture=plan.capture and not streams,
        )


# Wrapped around a prompt of input images alone, and around each image, in tokens (about).
_WRAPPING, _IMAGE_TAGS = 27, 3


@dataclass(frozen=True)
class Sizes:
    """Everything that the original's cost depends on, beside its switches."""

    height: int  # pixels
    width: int
    images: tuple[tuple[int, int], ...] = ()  # (height, width) of each input image, preprocessed
    steps: int = 50
    text_tokens: int = PROMPT_TOKENS  # of the wrapped prompt, without its images' own
    negative_tokens: int = NEGATIVE_TOKENS

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
    prompt_tokens: int = PROMPT_TOKENS,
    image_first: bool = False,
    config: ModelConfig | None = None,
    schedule: StepSchedule | None = None,
) -> Workload:
    """A request of different prompts of one length, each with square input images.

    Args:
        height, width: of the output, multiples of 16.
        images: how many input images each prompt has.
        max_input_image_size: their side.
        steps: Euler steps.
        pictures: how many prompts there are, with one picture each.
        prompt_tokens: of a wrapped prompt, without its images' own.
        image_first: the images come before the instruction, so that the branch of the whole prompt
            and that of the images begin alike.
        config: decides which branches take the same rotary factor; the released model's.
        schedule: instead of `steps`.
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
        schedule=schedule or StepSchedule.euler(steps),
        branches=(sizes.branches,) * pictures,
        # all prompts share the negative one
        conditions=(Condition((uncond,)), *(one for picture in conditions for one in picture)),
        images=sizes.images * pictures,
    )


def first_workload(config: ModelConfig) -> Workload:
    """What weights are placed for before there is a request: one picture of 1024 px."""
    side = min(1024, config.max_image_side)
    return typical_workload(side, side, config=config)
