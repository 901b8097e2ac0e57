"""Prompts, and every other argument of a call."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import mutate, tiny
from . import Kind

_WHOLE = 5  # every so many inputs the call is made, not only checked
_MAX_TOKENS = 3000  # of a call that is made

_PIECES = (
    "a cat on a mat",
    "<img><|image_1|></img>",
    "<|image_1|>",
    "<|image_2|>",
    "<|image_0|>",
    "<|image_01|>",
    "<|image_-1|>",
    "<|image_99999999999999999999|>",
    "<|image_\uff11|>",
    "<|image_|>",
    "<|image_1",
    "<img>",
    "</img>",
    "<|user|>",
    "<|end|>\n<|assistant|>",
    "<|diffusion|>",
    "<s>",
    "</s>",
    "<unk>",
    "<0x00>",
    "\n",
    "é" * 30,
    "日本語の文章",
    "👩‍👩‍👧‍👦" * 5,
    "e" + "\u0301" * 200,
    "\u200f\u202e",
    "\ufeff",
    "\ufffe",
    "%s {0} $(true) `true` \\",
    "'\"; --",
)
# Arguments, with values that are right and values that mean something else.
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "height": (16, 32, 64, 128, 144, 1024, None, 17, 0, 16.0, "16"),
    "width": (16, 32, 64, 128, 144, 1024, None, 17, 0, 16.0, "16"),
    "num_inference_steps": (1, 2, 3, 50, 1000, 1001, 0, 2.0, True),
    "guidance_scale": (1, 0, 3.0, -2.5, 1000, 1001, "3", True, 1e-320),
    "use_img_guidance": (True, False, None, 1, "no"),
    "img_guidance_scale": (1, 0, 1.6, 1000, -1000, None),
    "max_input_image_size": (16, 32, 100, 1024, 65536, 65537, 15),
    "separate_cfg_infer": (True, False, None, 0),
    "offload_model": (True, False, None, "yes"),
    "use_kv_cache": (True, False, None, 2),
    "offload_kv_cache": (True, False, None, []),
    "use_input_image_size_as_output": (True, False, 1),
    "dtype": ("float32", "bfloat16", "float16", torch.float32, "int8", "nn", 5),
    "seed": (0, 1, -1, 2**63, 2**64 - 1, 2**64, -(2**63) - 1, None, 1.0, "1"),
    "output_type": ("pil", "pt", "np", "latent", "", "PIL", None, b"pil"),
    "negative_prompt": ("", "ugly", None, ["ugly"], ["a", "b"], "<|image_1|>", 5, "\ud800"),
    "num_images_per_prompt": (1, 2, 3, 0, 1024, 1025, 1.0, True),
    "generator": (None, "generator", ["generator"], ["generator"] * 2, 5, []),
    "latents": (None, "right", "wrong", "nan", "ints", "sparse", "meta", [[0.0]]),
    "memory": (None, "auto", "8GiB", "1MB", "8", 8, 1 << 33, "", "-1GiB", "9e999GiB", {}, "lots"),
    "guidance_interval": ((0, 1), [0.2, 0.8], None, (1, 0), (0.5,), "ab", (0, float("nan")), 5),
    "image_guidance_interval": ((0, 1), [0.2, 0.8], None, (1, 0), [], {}),
    "solver": ("euler", "heun", "midpoint", "ab2", "dpmpp2m", "dpm", None, 5),
    "time_shift": (1.0, 3, 0.5, 0, -1, float("inf"), None, "3", 1e300, 1e-300),
    "timesteps": (None, [0.0, 0.5], [0, 0.3, 0.9], [0.5, 0.2], [], [1.0], [0.0] * 5000, "abc", 1),
    "reuse": ("off", "careful", "fast", 0, 1e-3, 1000.0, -1, "no", None, float("nan"), [0.1]),
    "quality": ("exact", "high", "fast", "best", None, 5, ["high"]),
    "mask_image": ("bytes", "array", "mode F", "cut", "sliver", "bfloat16", None, 5, "nowhere.png"),
    "mask_blur": (0, 1, 8, 1 << 20, -1, 1.0, None),
    "strength": (1.0, 0.5, 0.01, 0, 2, -1, None, float("nan")),
    "return_dict": (True, False, None, "no"),
    "callback_on_step_end_tensor_inputs": (["latents"], [], [], ["latents"], "latents", None, [5]),
}


class Prompts(Kind):
    most_bytes = 1_000_000_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._model, _ = tiny.write_models(folder)
        self._pipe = tiny.load_pipe(self._model)
        self._file = io.BytesIO()
        Image.new("RGB", (20, 24), (9, 99, 199)).save(self._file, "PNG")

    def make(self, rng: random.Random, number: int) -> dict[str, Any]:
        prompts = rng.choice((1, 1, 1, 1, 2, 3))
        counts = [rng.choice((0, 0, 1, 2)) for _ in range(prompts)]
        texts = [_text(rng) if rng.random() < 0.5 else _named(rng, count) for count in counts]
        images = [[rng.choice(_IMAGES) for _ in range(count)] for count in counts]
        case: dict[str, Any] = {
            "prompt": texts[0] if prompts == 1 and rng.random() < 0.8 else texts,
            "height": rng.choice((16, 32)),
            "width": rng.choice((16, 32)),
            "num_inference_steps": rng.choice((1, 2)),
            "seed": number,
        }
        if any(counts) or rng.random() < 0.5:
            case["input_images"] = images[0] if isinstance(case["prompt"], str) else images
        for name in rng.sample(sorted(_ARGUMENTS), rng.choice((0, 0, 1, 1, 2, 4))):
            case[name] = rng.choice(_ARGUMENTS[name])
            if rng.random() < 0.3:
                case[name] = _value(rng)
        if rng.random() < 0.03:
            case[rng.choice(("prompt", "input_images"))] = _value(rng)
        return case

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        return {name: self._real(name, value, case) for name, value in case.items()}

    def run(self, prepared: dict[str, Any], number: int) -> None:
        call = dict(prepared)
        prompt = call.pop("prompt")
        self._pipe.plan(prompt, **call)
        request = self._pipe.make_call(prompt, **call).request
        if number % _WHOLE == 0:
            tokens = request.images * request.steps * request.noise_tokens
            if tokens <= _MAX_TOKENS and max(map(len, map(str, call.values()))) < 10_000:
                self._pipe(prompt, progress=False, **call)

    def good(self) -> bytes:
        self._pipe.clear_cache()
        return tiny.picture(self._pipe, dtype="float32")

    def renew(self) -> None:
        self._pipe = tiny.load_pipe(self._model)

    def _real(self, name: str, value: Any, case: dict[str, Any]) -> Any:
        """What stands for an object that can't be made beforehand."""
        if name == "generator":
            if isinstance(value, list):
                return [self._real(name, one, case) for one in value]
            return torch.Generator().manual_seed(1) if value == "generator" else value
        if name == "latents" and isinstance(value, str):
            return self._latents(value, case)
        if name == "input_images" and isinstance(value, list):
            return [self._real("image", one, case) for one in value]
        if name == "image" and isinstance(value, list):
            return [self._real("image", one, case) for one in value]
        if name in ("image", "mask_image") and isinstance(value, str):
            return self._image(value)
        return value

    def _latents(self, kind: str, case: dict[str, Any]) -> torch.Tensor:
        sides = [case.get(name) for name in ("height", "width")]
        height, width = (side // 8 if type(side) is int and 0 < side < 999 else 2 for side in sides)
        found = torch.zeros(1, 4, height, width)
        changes = {
            "wrong": lambda: found[:, :3],
            "nan": lambda: found + float("nan"),
            "ints": lambda: found.int(),
            "sparse": found.to_sparse,
            "meta": lambda: found.to("meta"),
        }
        return changes.get(kind, lambda: found)()

    def _image(self, kind: str) -> Any:
        data = self._file.getvalue()
        picture = Image.open(io.BytesIO(data))
        pixels = np.asarray(picture)
        made = {
            "bytes": lambda: data,
            "cut": lambda: data[: len(data) // 2],
            "file": lambda: io.BytesIO(data),
            "text file": lambda: io.StringIO("words"),
            "opened": lambda: picture,
            "array": lambda: pixels,
            "floats": lambda: pixels / 255,
            "tensor": lambda: torch.from_numpy(pixels.copy()).permute(2, 0, 1),
            "meta": lambda: torch.empty(3, 8, 8, device="meta"),
            "bfloat16": lambda: torch.ones(1, 3, 20, 20, dtype=torch.bfloat16),
            "complex": lambda: torch.ones(3, 20, 20, dtype=torch.complex64),
            "mode I": lambda: Image.new("I", (8, 8), 70_000),
            "mode F": lambda: Image.new("F", (8, 8), 0.5),
            "sliver": lambda: Image.new("L", (4000, 1)),
        }
        return made.get(kind, lambda: kind)()


_IMAGES = (
    *("bytes", "file", "opened", "array", "floats", "tensor") * 5,  # mostly right
    *("cut", "text file", "meta", "bfloat16", "complex", "mode I", "mode F", "sliver"),
    *("data:image/png;base64,AAAA", "https://127.0.0.1/a.png", "nowhere.png", "", "\0", "a" * 5000),
    *(None, 5, b"", {}, object, "/dev/zero", "."),
)


def _text(rng: random.Random) -> str:
    found = "".join(rng.choice(_PIECES) for _ in range(rng.choice((1, 1, 2, 3, 8))))
    kind = rng.randrange(20)
    if kind == 0:
        return rng.choice(mutate.TEXTS)
    if kind == 1:
        return found * rng.choice((100, 1000, 20_000))
    if kind <= 4:
        place = rng.randrange(len(found))
        return found[:place] + rng.choice(mutate.TEXTS) + found[place:]
    if kind <= 6:
        return mutate.octets(rng, found.encode()).decode("utf-8", "surrogateescape")
    if kind == 7:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.choice((1, 10, 3000))))
    return found


def _named(rng: random.Random, images: int) -> str:
    """A prompt that names its images as it should, whatever else it says."""
    texts = ("a cat ", "\U0010ffff", "<|user|>", "e\u0301" * 99, "\0", "日本語", "</s>", "x" * 4000)
    tags = [f"<img><|image_{i + 1}|></img>" for i in range(images)] * rng.choice((1, 1, 1, 2, 50))
    rng.shuffle(tags)
    return rng.choice(texts) + "".join(tag + rng.choice(texts) for tag in tags)


def _value(rng: random.Random) -> Any:
    """A value of any type, as JSON would bring it."""
    found = mutate.value(rng)
    return str(found) if isinstance(found, mutate.Raw) else found
