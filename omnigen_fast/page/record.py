"""Record: the request embedded in a saved picture, and how to read one from an untrusted file.

A PNG, JPEG or WebP file holds it as JSON (see `embedded`). The text is untrusted: it is read up to
a fixed length, without decoding the picture; only known names with values of the right type are
accepted, and the pipeline checks them like any call; it never chooses which weights to load; and
recorded input images are opened only if the caller asks for it and their content is unchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import RequestError
from .embedded import MAX_BYTES, read_text, saving

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

_MAX_INPUT_BYTES = 1 << 30  # of a recorded input image
_MAX_BITS = 14_000  # of an integer; Python prints at most 4300 digits
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RecordedFile:
    """An input image, a mask or a latents file: its path and content."""

    path: str  # relative to the picture's folder
    sha256: str | None  # None if the file could not be read

    def path_from(self, picture: str | os.PathLike[str]) -> str:
        """The file's path, given the picture that refers to it."""
        return os.path.normpath(Path(picture).parent / self.path)


@dataclass(frozen=True)
class Record:
    """The request of a picture: everything that affects the result, nothing that affects speed."""

    model: str
    prompts: tuple[str, ...]
    input_images: tuple[tuple[RecordedFile, ...], ...]  # of each prompt
    negative_prompts: tuple[str, ...] | None  # None for the built-in one
    # of the call and its dtype: all RECORDED_ARGUMENTS, and those RECORDED_OPTIONS that are used
    arguments: Mapping[str, Any]
    loras: tuple[str, ...] = ()
    latents: RecordedFile | None = None
    index: int = 0  # of the picture in its call
    vae_path: str | None = None
    revision: str | None = None
    mask_image: RecordedFile | None = None
    # how the model was loaded: those of RECORDED_PRECISION that are not the defaults
    precision: Mapping[str, str] = field(default_factory=dict)
    version: str = __version__

    def text(self) -> str:
        """The JSON text to embed.

        Raises RequestError if it is too long to be read back.
        """
        fields = {
            "version": self.version,
            "model": self.model,
            "vae_path": self.vae_path,
            "revision": self.revision,
            "loras": self.loras,
            "prompt": self.prompts,
            "input_images": [list(map(vars, images)) for images in self.input_images],
            "negative_prompt": self.negative_prompts,
            **self.arguments,
            **self.precision,
            "latents": self.latents and vars(self.latents),
            "index": self.index,
        }
        if self.mask_image:
            fields["mask_image"] = vars(self.mask_image)
        text = json.dumps(fields)
        if len(text) > MAX_BYTES:
            raise RequestError(
                f"a picture carries at most {MAX_BYTES:,} bytes of request, this one has "
                f"{len(text):,}; shorten the prompt, or choose a format other than PNG"
            )
        return text

    def digest(self) -> str:
        """Identifies the request: files by their content, any version of this package."""
        record = replace(
            self,
            input_images=tuple(tuple(map(_content, images)) for images in self.input_images),
            latents=self.latents and _content(self.latents),
            version="",
        )
        return hashlib.sha256(record.text().encode()).hexdigest()

    def lines(self) -> Iterator[str]:
        """For display: one value per line, with control characters escaped."""
        rows: list[tuple[str, Any]] = [("made with", f"omnigen_fast {self.version}")]
        rows.append(("model", self.model))
        parts = (("VAE", self.vae_path), ("revision", self.revision))
        rows += [(name, value) for name, value in parts if value is not None]
        rows += [("lora", lora) for lora in self.loras]
        for prompt, images in zip(self.prompts, self.input_images):
            rows.append(("prompt", prompt))
            rows += [("input image", image.path) for image in images]
        if self.mask_image:
            rows.append(("mask image", self.mask_image.path))
        rows += [("negative prompt", text) for text in self.negative_prompts or ()]
        rows += [*self.arguments.items(), *self.precision.items()]
        if self.latents:
            rows.append(("latents", self.latents.path))
        if len(self.prompts) * self.arguments["num_images_per_prompt"] > 1:
            rows.append(("picture of the call", self.index + 1))
        for name, value in rows:
            yield f"{name:<30}  {printable(str(value))}"


def recorded_file(path: str | os.PathLike[str], folder: Path) -> RecordedFile:
    """A reference to a file, from a picture in `folder`."""
    try:
        relative = os.path.relpath(path, folder)
    except ValueError:  # another drive
        relative = os.path.abspath(path)
    try:
        return RecordedFile(relative, _sha256(path) if os.path.isfile(path) else None)
    except OSError:  # reported when the file is opened
        return RecordedFile(relative, None)


def recorded_images(
    images: Sequence[Sequence[Any]], folder: Path
) -> tuple[tuple[RecordedFile, ...], ...]:
    """References to the input images of each prompt, from a picture in `folder`."""
    return tuple(tuple(recorded_file(image, folder) for image in one) for one in images)


def png_info(record: Record) -> PngInfo:
    """The record as Pillow's `save(..., pnginfo=)` takes it."""
    return saving(record.text(), ".png")["pnginfo"]


def read_record(path: str | os.PathLike[str], name: str | None = None) -> Record:
    """Reads the request from a PNG, JPEG or WebP file.

    Args:
        path: of the file.
        name: by which messages call it; without one, its path.

    Raises:
        RequestError: another kind of file, or it carries no request or a damaged one.
    """
    shown = str(path) if name is None else name
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise RequestError(
            f"{shown} {what}; give a PNG file that omnigen-fast wrote, or a JPEG or WebP file"
        )
    with open(path, "rb") as file:
        text = read_text(file, shown)
    try:
        fields = json.loads(text, parse_constant=_no_constant)
        return _parse(fields)
    except (ValueError, RecursionError) as error:  # JSON's own errors are ValueErrors
        raise RequestError(
            f"{shown}: the request in it is damaged ({error}); give the options without --from"
        ) from error


def find_images(record: Record, picture: str | os.PathLike[str]) -> list[list[str]]:
    """Paths of the recorded input images, checked against their digests.

    Raises RequestError if one is missing or has changed.
    """
    return [[_unchanged(image, picture) for image in images] for images in record.input_images]


def find_mask(record: Record, picture: str | os.PathLike[str]) -> str | None:
    """Likewise of the recorded mask; None without one."""
    return None if record.mask_image is None else _unchanged(record.mask_image, picture)


def printable(text: str) -> str:
    """The text with control characters escaped."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


def check_unchanged(file: RecordedFile, path: str | os.PathLike[str]) -> None:
    """Raises RequestError if the file has changed since it was recorded."""
    try:
        found = _sha256(path) if os.path.isfile(path) else None
    except OSError:
        found = None
    if found != file.sha256:
        raise RequestError(f"{path} has changed since its line was read; run the batch again")


def _content(file: RecordedFile) -> RecordedFile:
    """The file under no name, unless its content is not known."""
    return file if file.sha256 is None else replace(file, path="")


def _unchanged(image: RecordedFile, picture: str | os.PathLike[str]) -> str:
    found = image.path_from(picture)
    if not os.path.isfile(found):
        problem = "is not there"
    elif os.path.getsize(found) > _MAX_INPUT_BYTES:
        problem = "is too large to be one"
    elif _sha256(found) != image.sha256:
        problem = "has changed since"
    else:
        return found
    raise RequestError(
        f"{picture} was made with the image {printable(found)}, which {problem}; give the images "
        "with --image, and a mask with --mask-image"
    )


def _sha256(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _parse(fields: Any) -> Record:
    """Raises ValueError unless it has exactly the known names, with values of the right type."""
    if not isinstance(fields, dict):
        raise ValueError("not an object")
    names = [*_TEXTS, *_LISTS, *RECORDED_ARGUMENTS, "latents", "index"]
    for name in fields:
        if name not in (*names, *RECORDED_OPTIONS, *RECORDED_PRECISION, "mask_image"):
            raise ValueError(f"unknown name {printable(repr(name)[:60])}")
    for name in names:
        if name not in fields:
            raise ValueError(f"{name} is missing")
    arguments = RECORDED_ARGUMENTS | {
        name: check for name, check in RECORDED_OPTIONS.items() if name in fields
    }
    precision = {name: fields[name] for name in RECORDED_PRECISION if name in fields}
    texts = _TEXTS | dict.fromkeys(precision, TEXT)
    for name, (kind, is_right) in (texts | _LISTS | arguments).items():
        if not is_right(fields[name]):
            raise ValueError(f"{name} must be {kind}")
    prompts, images = fields["prompt"], fields["input_images"]
    if not prompts or len(prompts) != len(images):
        raise ValueError("prompt and input_images must have one entry for each prompt")
    latents, index = fields["latents"], fields["index"]
    if not _is_integer(index) or index < 0:
        raise ValueError("index must be an integer of at least 0")
    negatives = fields["negative_prompt"]
    return Record(
        model=fields["model"],
        prompts=tuple(prompts),
        input_images=tuple(tuple(map(_parse_file, one)) for one in images),
        negative_prompts=None if negatives is None else tuple(negatives),
        arguments={name: fields[name] for name in arguments},
        loras=tuple(fields["loras"]),
        latents=None if latents is None else _parse_file(latents),
        index=index,
        vae_path=fields["vae_path"],
        revision=fields["revision"],
        mask_image=_parse_file(fields["mask_image"]) if "mask_image" in fields else None,
        precision=precision,
        version=fields["version"],
    )


def _parse_file(fields: Any) -> RecordedFile:
    if not isinstance(fields, dict) or set(fields) != {"path", "sha256"}:
        raise ValueError("a file must have path and sha256")
    path, digest = fields["path"], fields["sha256"]
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError("a file's path must be a string")
    if digest is not None and not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
        raise ValueError("a file's sha256 must be 64 hexadecimal digits")
    return RecordedFile(path, digest)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_integer(value: Any) -> bool:
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return value.bit_length() < _MAX_BITS


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_integer(value)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


Check = tuple[str, Callable[[Any], bool]]  # what a value must be, and whether it is
INTEGER: Check = ("an integer", _is_integer)
NUMBER: Check = ("a number", _is_number)
SWITCH: Check = ("true or false", _is_switch)
TEXT: Check = ("a string", _is_text)
_TEXTS: dict[str, Check] = dict.fromkeys(("version", "model"), TEXT)
_TEXTS |= dict.fromkeys(
    ("vae_path", "revision"), ("null or a string", lambda value: value is None or _is_text(value))
)
_LISTS: dict[str, Check] = {
    "loras": ("a list of strings", _is_texts),
    "prompt": ("a list of strings", _is_texts),
    "input_images": (
        "a list of lists",
        lambda value: isinstance(value, list) and all(isinstance(one, list) for one in value),
    ),
    "negative_prompt": (
        "null or a list of strings",
        lambda value: value is None or (_is_texts(value) and bool(value)),
    ),
}
_TIMES: Check = (
    "a list of numbers",
    lambda value: isinstance(value, list) and all(map(_is_number, value)),
)
# The arguments of `OmniGenPipeline.__call__` that affect the picture.
RECORDED_ARGUMENTS: dict[str, Check] = {
    "height": INTEGER,
    "width": INTEGER,
    "num_inference_steps": INTEGER,
    "guidance_scale": NUMBER,
    "use_img_guidance": SWITCH,
    "img_guidance_scale": NUMBER,
    "max_input_image_size": INTEGER,
    "use_input_image_size_as_output": SWITCH,
    "num_images_per_prompt": INTEGER,
    "seed": INTEGER,
    "dtype": TEXT,
}
# Likewise, but recorded only where they are used: a picture made without them carries none.
RECORDED_OPTIONS: dict[str, Check] = {
    "guidance_interval": _TIMES,
    "image_guidance_interval": _TIMES,
    "solver": TEXT,
    "time_shift": NUMBER,
    "timesteps": _TIMES,
    "mask_blur": INTEGER,
    "strength": NUMBER,
    "reuse": ("a name or a number", lambda value: _is_text(value) or _is_number(value)),
    "quality": TEXT,  # what it stands for is recorded too, and has the last word
}
# Of those options for which it is not None.
_DEFAULTS = {
    "solver": "euler",
    "time_shift": 1.0,
    "mask_blur": 0,
    "strength": 1.0,
    "reuse": "off",
    "quality": "exact",
}


# Arguments of `from_pretrained` that affect the picture, recorded where they are not the defaults.
RECORDED_PRECISION = {"weights": None, "compute": None, "cache": None, "vae_dtype": "float32"}


def recorded_precision(options: Mapping[str, Any]) -> dict[str, str]:
    """What a record holds of the arguments that a model is loaded with."""
    return {
        name: options[name] for name, usual in RECORDED_PRECISION.items() if options[name] != usual
    }


def recorded_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a record holds of the arguments of a call and its dtype; options may be missing."""
    plain = {name: _DEFAULTS.get(name) for name in RECORDED_OPTIONS}
    used = [one for one, default in plain.items() if arguments.get(one, default) != default]
    return {name: arguments[name] for name in (*RECORDED_ARGUMENTS, *used)}
