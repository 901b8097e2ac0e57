"""Request: the arguments of a call, validated once."""

from __future__ import annotations

import math
import numbers
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import LATENT_CHANNELS, TOKEN_PIXELS, VAE_SCALE, ModelConfig, tokens
from .errors import RequestError
from .fewer_steps import preset, reuse_threshold
from .images import InputImage, read_image
from .masks import Edit, read_mask
from .memory.plan import Switches
from .solvers import SOLVERS, shifted

if TYPE_CHECKING:
    import torch

# The original's built-in negative prompt.
DEFAULT_NEGATIVE_PROMPT = (
    "low quality, jpeg artifacts, ugly, duplicate, morbid, mutilated, extra fingers, "
    "mutated hands, poorly drawn hands, poorly drawn face, mutation, deformed, blurry, "
    "dehydrated, bad anatomy, bad proportions, extra limbs, cloned face, disfigured, "
    "gross proportions, malformed limbs, missing arms, missing legs, extra arms, extra legs, "
    "fused fingers, too many fingers."
)
OUTPUT_TYPES = ("pil", "pt", "np", "latent")
DEFAULT_SIDE = 1024  # height or width in pixels where a call gives None
MAX_STEPS = 1000
MAX_BLUR = 1024  # pixels
MAX_SHIFT = 100  # of the time; with more, steps near the picture take all of the way at once
MAX_GUIDANCE = 1000  # larger scales give nothing but noise in float32
MAX_IMAGES = 1024  # in one call; guards against a typo
_MAX_CHARACTERS = 1 << 20  # of a prompt; several times more than the model's positions hold
_MAX_NUMERAL = 9  # digits of an image's number in a prompt

PLACEHOLDER = re.compile(r"<\|image_(\d+)\|>")
_MALFORMED = re.compile(r"<\|image_(?!\d+\|>)[^\s<>|]{0,20}")


Interval = tuple[float, float]  # of the model's time: the first bound belongs to it, the last not


@dataclass(frozen=True)
class Guidance:
    """Scales of classifier-free guidance: text, and input images (InstructPix2Pix, 2023)."""

    text: float
    image: float
    use_image: bool
    text_interval: Interval | None = None  # outside it the scale is 1; None for all of the time
    image_interval: Interval | None = None  # likewise

    def at(self, time: float) -> Guidance:
        """The scales of a step that begins at a time from 0 (noise) to 1 (picture)."""
        text = self.text if _inside(self.text_interval, time) else 1.0
        image = self.image if _inside(self.image_interval, time) else 1.0
        return Guidance(text, image, self.use_image)


def _inside(interval: Interval | None, time: float) -> bool:
    return interval is None or interval[0] <= time < interval[1]


@dataclass(frozen=True)
class Prompt:
    """A prompt, the images that its placeholders name, and its negative prompt."""

    text: str
    images: tuple[InputImage, ...]
    negative: str


@dataclass(frozen=True)
class Request:
    """A validated call; nothing downstream checks the user's input again."""

    prompts: tuple[Prompt, ...]
    images_per_prompt: int
    height: int
    width: int
    steps: int
    guidance: Guidance
    switches: Switches  # the caller's constraints on the memory plan
    seed: int | None
    generator: Any  # None, a torch.Generator, or one for each image
    latents: Any  # None, or a tensor [images, 4, height / 8, width / 8]
    output_type: str
    solver: str = "euler"
    times: tuple[float, ...] | None = None  # see `StepSchedule`
    edit: Edit | None = None
    reuse: float = 0.0  # see `fewer_steps.reuse_threshold`

    @property
    def images(self) -> int:
        """The number of pictures to make."""
        return len(self.prompts) * self.images_per_prompt

    @property
    def noise_tokens(self) -> int:
        """Noise tokens of one picture."""
        return tokens(self.height, self.width)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return latent_shape(self.images, self.height, self.width)


def latent_shape(images: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Shape of the latents of pictures of `height` x `width` pixels."""
    return images, LATENT_CHANNELS, height // VAE_SCALE, width // VAE_SCALE


def make_request(
    config: ModelConfig,
    *,
    prompt: str | Sequence[str],
    input_images: Any,
    height: int | None,
    width: int | None,
    num_inference_steps: int,
    guidance_scale: float,
    use_img_guidance: bool,
    img_guidance_scale: float,
    max_input_image_size: int,
    separate_cfg_infer: bool | None,
    use_kv_cache: bool | None,
    offload_kv_cache: bool | None,
    offload_model: bool | None,
    use_input_image_size_as_output: bool,
    seed: int | None,
    output_type: str,
    negative_prompt: str | Sequence[str] | None,
    num_images_per_prompt: int,
    generator: Any,
    latents: torch.Tensor | None,
    guidance_interval: Sequence[float] | None = None,
    image_guidance_interval: Sequence[float] | None = None,
    solver: str = "euler",
    time_shift: float = 1.0,
    timesteps: Sequence[float] | None = None,
    mask_image: Any = None,
    mask_blur: int = 0,
    strength: float = 1.0,
    reuse: str | float = "off",
    quality: str = "exact",
) -> Request:
    """Checks every argument of a call and reads its images.

    `OmniGenPipeline.__call__` describes the arguments; those that `quality` stands for are given.

    Raises:
        RequestError: the first invalid argument: its value, what is allowed and how to fix it.
    """
    texts, image_lists = _prompts_and_images(prompt, input_images)
    counts = [sum(image is not None for image in images) for images in image_lists]
    for index, (text, count) in enumerate(zip(texts, counts)):
        _check_prompt(text, count, "prompt" if len(texts) == 1 else f"prompt[{index}]")
    negatives = _negatives(negative_prompt, len(texts))

    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        raise RequestError(
            f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {_show(output_type)}"
        )
    steps = checked_integer("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
    share = finite("strength", strength)
    if not 0 < share <= 1:
        raise RequestError(
            f"strength must be above 0 and at most 1, got {_show(strength)}; 1 keeps nothing of "
            "the input image's latents"
        )
    times = step_times(steps, time_shift, timesteps, share)
    blur = checked_integer("mask_blur", mask_blur, 0, MAX_BLUR, " pixels")
    if blur and mask_image is None:
        raise RequestError(f"mask_blur={blur} needs a mask_image")
    if mask_image is not None or share < 1:
        name = "mask_image" if share == 1 else "strength"
        if len(texts) != 1 or counts != [1]:
            raise RequestError(
                f"{name} needs one prompt with one input image, got {len(texts)} prompt(s) with "
                f"{sum(counts)} image(s)"
            )
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise RequestError(f"solver must be one of {', '.join(SOLVERS)}, got {_show(solver)}")
    preset(quality)
    threshold = reuse_threshold(reuse)
    per_prompt = checked_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
    if len(texts) * per_prompt > MAX_IMAGES:
        raise RequestError(
            f"{len(texts)} prompts with {per_prompt} images each are more than {MAX_IMAGES} "
            "pictures; make them in several calls"
        )
    guidance = Guidance(
        _scale("guidance_scale", guidance_scale),
        _scale("img_guidance_scale", img_guidance_scale),
        check_switch("use_img_guidance", use_img_guidance) and any(counts),
        _interval("guidance_interval", guidance_interval),
        _interval("image_guidance_interval", image_guidance_interval),
    )
    max_size = checked_integer("max_input_image_size", max_input_image_size, TOKEN_PIXELS, 1 << 16)
    if seed is not None:
        seed = checked_integer("seed", seed, -(1 << 63), (1 << 64) - 1)
        if generator is not None:
            raise RequestError("give seed or generator, not both")
    switches = {
        "use_kv_cache": use_kv_cache,
        "offload_kv_cache": offload_kv_cache,
        "offload_model": offload_model,
        "separate_cfg_infer": separate_cfg_infer,
    }
    given = {name: check_switch(name, v) for name, v in switches.items() if v is not None}
    if check_switch("use_input_image_size_as_output", use_input_image_size_as_output):
        if len(texts) != 1 or counts != [1]:
            raise RequestError(
                "use_input_image_size_as_output needs one prompt with one image, got "
                f"{len(texts)} prompt(s) with {sum(counts)} image(s); give height "
                "and width instead"
            )
    else:
        height = checked_side("height", DEFAULT_SIDE if height is None else height, config)
        width = checked_side("width", DEFAULT_SIDE if width is None else width, config)

    prompts = tuple(
        Prompt(
            text,
            tuple(
                read_image(
                    image,
                    max_size,
                    config.max_image_side,
                    f"input_images[{i}]" if len(texts) == 1 else f"input_images[{index}][{i}]",
                )
                for i, image in enumerate(images)
                if image is not None  # an empty slot, as forms hand them over
            ),
            negative,
        )
        for index, (text, images, negative) in enumerate(zip(texts, image_lists, negatives))
    )
    if use_input_image_size_as_output:
        height, width = prompts[0].images[0].size
    assert height is not None and width is not None
    edit = None
    if mask_image is not None or share < 1:
        (image,) = prompts[0].images
        if image.size != (height, width):
            raise RequestError(
                f"the output of {name} is as large as its input image, {image.size[1]} x "
                f"{image.size[0]} pixels after resizing, got width={width}, height={height}; give "
                "use_input_image_size_as_output=True"
            )
        mask = None
        if mask_image is not None:
            mask = read_mask(mask_image, image, max_size, config.max_image_side, blur)
        edit = Edit(image, mask)
    pictures = len(texts) * per_prompt
    _check_generator(generator, pictures)
    _check_latents(latents, latent_shape(pictures, height, width))
    return Request(
        prompts=prompts,
        images_per_prompt=per_prompt,
        height=height,
        width=width,
        steps=steps if times is None else len(times) - 1,
        guidance=guidance,
        switches=Switches(**given),
        seed=seed,
        generator=generator,
        latents=latents,
        output_type=output_type,
        solver=solver,
        times=times,
        edit=edit,
        reuse=threshold,
    )


def with_placeholders(prompt: str, images: int) -> str:
    """The prompt; images that it does not name come first, in their order."""
    if not images or PLACEHOLDER.search(prompt):
        return prompt
    tags = "".join(f"<img><|image_{i + 1}|></img>" for i in range(images))
    return f"{tags} {prompt}" if prompt.strip() else prompt


def _prompts_and_images(prompt: Any, input_images: Any) -> tuple[list[str], list[list[Any]]]:
    """The prompts and the list of images of each."""
    if isinstance(prompt, str):
        if input_images is None:
            images: list[Any] = []
        elif isinstance(input_images, list | tuple):
            images = list(input_images)
        else:
            images = [input_images]
        if any(isinstance(image, list | tuple) for image in images):
            raise RequestError(
                "input_images is a list of lists but prompt is one string; give one flat list, "
                "or a list of prompts"
            )
        return [prompt], [images]
    if not isinstance(prompt, list | tuple):
        raise RequestError(f"prompt must be a string or a list of strings, got {_kind(prompt)}")
    if not prompt:
        raise RequestError("prompt is an empty list; give at least one prompt")
    for index, text in enumerate(prompt):
        if not isinstance(text, str):
            raise RequestError(f"prompt[{index}] must be a string, got {_kind(text)}")
    if input_images is None:
        return list(prompt), [[] for _ in prompt]
    if not isinstance(input_images, list | tuple) or not all(
        images is None or isinstance(images, list | tuple) for images in input_images
    ):
        raise RequestError(
            "with a list of prompts, input_images must be a list of lists, one for each prompt "
            "([] where it has no image)"
        )
    if len(input_images) != len(prompt):
        raise RequestError(
            f"{len(prompt)} prompts but {len(input_images)} lists of input_images; give one list "
            "for each prompt ([] where it has no image)"
        )
    return list(prompt), [list(images or ()) for images in input_images]


def _check_prompt(text: str, images: int, name: str) -> None:
    if not text.strip():
        raise RequestError(f"{name} is empty; say what to draw")
    _check_text(text, name)
    # <img> and </img> are tokens like any other; only the placeholder stands for an image
    if stray := _MALFORMED.search(text):
        raise RequestError(
            f"{name} has a stray {stray.group()}; write each image as <img><|image_1|></img>"
        )
    numerals = PLACEHOLDER.findall(text)
    longest = max(map(len, numerals), default=0)
    if longest > _MAX_NUMERAL:
        raise RequestError(
            f"{name} names an image by a number of {longest} digits; number images from 1"
        )
    numbers = sorted(set(map(int, numerals)))
    if numbers and not images:
        raise RequestError(
            f"{name} names image {numbers[0]} but input_images has none for it; "
            "give the image or remove its placeholder"
        )
    if numbers != list(range(1, len(numbers) + 1)):
        raise RequestError(
            f"{name} names images {_show(numbers)}; number them 1 to {len(numbers)} without a gap"
        )
    if len(numbers) < images:
        raise RequestError(
            f"{name} has {images} image(s) but names {len(numbers)} of them; "
            f"add <img><|image_{len(numbers) + 1}|></img> where it belongs, or drop the image"
        )
    if len(numbers) > images:
        raise RequestError(
            f"{name} names image {numbers[-1]} but input_images has {images}; "
            "give the image or remove its placeholder"
        )


def _check_text(text: str, name: str) -> None:
    if len(text) > _MAX_CHARACTERS:
        raise RequestError(
            f"{name} has {len(text):,} characters, at most {_MAX_CHARACTERS:,} are read; shorten it"
        )
    try:
        text.encode()  # strings can hold lone surrogates, for example from undecodable bytes
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} holds {text[error.start]!r} at {error.start}, which is not a character; "
            "was it decoded from UTF-8?"
        ) from error


def _negatives(negative_prompt: Any, prompts: int) -> list[str]:
    if negative_prompt is None:
        return [DEFAULT_NEGATIVE_PROMPT] * prompts
    if isinstance(negative_prompt, str):
        negatives = [negative_prompt] * prompts
    elif isinstance(negative_prompt, list | tuple):
        negatives = list(negative_prompt)
    else:
        raise RequestError(
            f"negative_prompt must be a string or a list of strings, got {_kind(negative_prompt)}"
        )
    if len(negatives) != prompts:
        raise RequestError(
            f"{len(negatives)} negative prompts for {prompts} prompt(s); give one, or one for each"
        )
    for negative in negatives:
        if not isinstance(negative, str):
            raise RequestError(f"a negative prompt must be a string, got {_kind(negative)}")
        _check_text(negative, "negative_prompt")
        if tag := PLACEHOLDER.search(negative) or _MALFORMED.search(negative):
            raise RequestError(f"negative_prompt holds {tag.group()}; it can't name images")
    return negatives


def checked_side(name: str, value: Any, config: ModelConfig) -> int:
    """A height or width in pixels; raises RequestError unless the model can make it."""
    side = checked_integer(name, value, TOKEN_PIXELS, config.max_image_side, " pixels")
    if side % TOKEN_PIXELS:
        below = side - side % TOKEN_PIXELS
        raise RequestError(
            f"{name} must be a multiple of {TOKEN_PIXELS}, got {side}; "
            f"the nearest are {below} and {below + TOKEN_PIXELS}"
        )
    return side


def checked_integer(name: str, value: Any, low: int, high: int, unit: str = "") -> int:
    """The value as an int; raises RequestError unless it is a whole number in a range."""
    number: int | None
    try:
        number = operator.index(value)
    except TypeError:
        # JSON and sliders give 2.0
        whole = isinstance(value, numbers.Real) and float(value).is_integer()
        number = int(value) if whole else None
    if number is None or isinstance(value, bool):
        raise RequestError(f"{name} must be an integer, got {_show(value)}")
    if not low <= number <= high:
        raise RequestError(f"{name} must be from {low} to {high}{unit}, got {_show(number)}")
    return number


def finite(name: str, value: Any) -> float:
    """The value as a float; raises RequestError unless it is a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: torch's
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool | str):
        raise RequestError(f"{name} must be a finite number, got {_show(value)}")
    return number


def _scale(name: str, value: Any) -> float:
    number = finite(name, value)
    if abs(number) > MAX_GUIDANCE:
        raise RequestError(
            f"{name} must be from -{MAX_GUIDANCE} to {MAX_GUIDANCE}, got {_show(value)}; "
            "1 to 5 is usual"
        )
    return number


def step_times(
    steps: int, time_shift: Any, timesteps: Any = None, strength: float = 1.0
) -> tuple[float, ...] | None:
    """The times at which steps begin and the last one ends; None for equal steps from 0 on.

    Of n steps those are left out that come before a share of 1 - strength. Raises RequestError for
    times that can't be used.
    """
    times = _all_times(steps, time_shift, timesteps)
    count = steps if times is None else len(times) - 1
    # 10 * 0.7 is 7.000000000000001
    first = min(count - 1, math.floor(count * (1 - strength) + 1e-6))
    if not first:
        return times
    if times is None:
        times = tuple(step / steps for step in range(steps + 1))
    return times[first:]


def _all_times(steps: int, time_shift: Any, timesteps: Any) -> tuple[float, ...] | None:
    shift = finite("time_shift", time_shift)
    if not 1 / MAX_SHIFT <= shift <= MAX_SHIFT:
        raise RequestError(
            f"time_shift must be from {1 / MAX_SHIFT:g} to {MAX_SHIFT}, got {_show(time_shift)}; "
            "above 1 puts more steps near the noise"
        )
    if timesteps is None:
        if shift == 1:
            return None
        return (*(shifted(step / steps, shift) for step in range(steps)), 1.0)
    if shift != 1:
        raise RequestError("give time_shift or timesteps, not both")
    try:
        count = len(timesteps)
        given = [finite("timesteps", one) for one in timesteps] if count <= MAX_STEPS else []
    except (TypeError, ValueError):  # RequestError is one
        count, given = 0, []
    times = (*given, 1.0)
    # as the steps' lengths are computed: times that float32 can't tell apart give empty steps
    gaps = np.diff(np.array(times, np.float32))
    if not given or times[0] != 0 or len(given) != count or not (gaps > 0).all():
        raise RequestError(
            f"timesteps must be 1 to {MAX_STEPS} increasing times at which steps begin, from 0 "
            f"(noise) to less than 1 (picture), got {_show(timesteps)}"
        )
    return times


def _interval(name: str, value: Any) -> Interval | None:
    """Two times from 0 to 1, the first one lower."""
    if value is None:
        return None
    try:
        start, stop = (finite(name, one) for one in value)
    except (TypeError, ValueError):  # RequestError is one
        start = stop = math.nan
    if not 0 <= start < stop <= 1:
        raise RequestError(
            f"{name} must be two times (start, stop) with 0 <= start < stop <= 1, got "
            f"{_show(value)}; 0 is noise, 1 the picture"
        )
    return start, stop


def check_switch(name: str, value: Any) -> bool:
    """The value as a bool; raises RequestError unless it is one."""
    # a string such as "no" is truthy
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return bool(value)
    raise RequestError(f"{name} must be True or False, got {_show(value)}")


def _check_generator(generator: Any, images: int) -> None:
    if generator is None:
        return
    import torch

    generators = generator if isinstance(generator, list | tuple) else [generator]
    if not all(isinstance(one, torch.Generator) for one in generators):
        raise RequestError(
            f"generator must be a torch.Generator or a list of them, got {_kind(generator)}"
        )
    if isinstance(generator, list | tuple) and len(generators) != images:
        raise RequestError(f"{len(generators)} generators for {images} images; give one for each")


def _check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    if latents is None:
        return
    import torch

    if not isinstance(latents, torch.Tensor):
        raise RequestError(f"latents must be a tensor, got {_kind(latents)}")
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if latents.dtype not in dtypes or latents.layout != torch.strided or latents.is_meta:
        raise RequestError(
            "latents must be a dense floating-point tensor, got "
            f"{latents.dtype}, {latents.layout}, on {latents.device}"
        )
    if tuple(latents.shape) != shape:
        raise RequestError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
    if not torch.isfinite(latents.to(torch.float32)).all():
        raise RequestError("latents hold NaN or infinity in float32")


def _kind(value: Any) -> str:
    return type(value).__name__


def _show(value: Any) -> str:
    """A value for an error message, truncated."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of more than 4300 digits
        return f"an enormous {_kind(value)}"
    return text if len(text) <= 100 else f"{text[:97]}..."
