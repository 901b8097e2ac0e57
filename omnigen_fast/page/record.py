"""The request that a saved picture carries, and what is believed of one that comes from elsewhere.

A PNG file holds it as JSON in one uncompressed tEXt chunk. Whoever made the file wrote that text,
so it is data and no more: it is read up to a fixed length, without decoding any picture; only
known names with values of the right type are taken, and the pipeline then checks them as it checks
every call; it never decides which weights are loaded; and the files that it names as input images
are opened only if the caller says so, and only if their content is what was recorded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .. import __version__
from ..errors import RequestError

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

KEY = "omnigen_fast"
MAX_BYTES = 1 << 20  # of the text; the longest prompt that the model takes fits in
_MAX_BITS = 14_000  # of a number: Python writes none of more than 4300 digits
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Source:
    """An input image or a file of latents: where it was and what it held."""

    path: str  # from the picture's folder
    sha256: str | None  # of the file; None if there was none that could be read


@dataclass(frozen=True)
class Record:
    """What a picture was made of: all that decides it, nothing that only decides how fast."""

    model: str
    prompts: tuple[str, ...]
    input_images: tuple[tuple[Source, ...], ...]  # of each prompt
    negative_prompts: tuple[str, ...] | None  # None for the built-in one
    arguments: Mapping[str, Any]  # of the call, see ARGUMENTS, and the dtype
    loras: tuple[str, ...] = ()
    latents: Source | None = None
    index: int = 0  # which picture of the call this is
    vae_path: str | None = None
    revision: str | None = None
    version: str = __version__

    def text(self) -> str:
        """The JSON that a file carries.

        Raises RequestError if it is longer than what is read back.
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
            "latents": self.latents and vars(self.latents),
            "index": self.index,
        }
        text = json.dumps(fields)
        if len(text) > MAX_BYTES:
            raise RequestError(
                f"a picture carries at most {MAX_BYTES:,} bytes of request, this one has "
                f"{len(text):,}; shorten the prompt, or write another format than PNG"
            )
        return text

    def lines(self) -> Iterator[str]:
        """For people: one value a line, with nothing in it that a terminal would obey."""
        rows: list[tuple[str, Any]] = [("made with", f"omnigen_fast {self.version}")]
        rows.append(("model", self.model))
        parts = (("VAE", self.vae_path), ("revision", self.revision))
        rows += [(name, value) for name, value in parts if value is not None]
        rows += [("lora", lora) for lora in self.loras]
        for prompt, images in zip(self.prompts, self.input_images):
            rows.append(("prompt", prompt))
            rows += [("input image", image.path) for image in images]
        rows += [("negative prompt", text) for text in self.negative_prompts or ()]
        rows += self.arguments.items()
        if self.latents:
            rows.append(("latents", self.latents.path))
        if len(self.prompts) * self.arguments["num_images_per_prompt"] > 1:
            rows.append(("picture of the call", self.index + 1))
        for name, value in rows:
            yield f"{name:<30}  {printable(str(value))}"


def source(path: str | os.PathLike[str], folder: Path) -> Source:
    """How a picture in a folder refers to a file."""
    try:
        relative = os.path.relpath(path, folder)
    except ValueError:  # another drive
        relative = os.path.abspath(path)
    try:
        return Source(relative, _sha256(path) if os.path.isfile(path) else None)
    except OSError:  # whoever opens it says so
        return Source(relative, None)


def sources(images: Sequence[Sequence[Any]], folder: Path) -> tuple[tuple[Source, ...], ...]:
    """How a picture in a folder refers to the input images of each prompt."""
    return tuple(tuple(source(image, folder) for image in one) for one in images)


def png_info(record: Record) -> PngInfo:
    """For `save(..., pnginfo=)`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(KEY, record.text())
    return info


def read(path: str | os.PathLike[str]) -> Record:
    """The request that a PNG file carries.

    Raises:
        RequestError: no PNG file, none in it, or damaged.
    """
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "does not exist"
        raise RequestError(f"{path} {what}; give a PNG file that omnigen-fast wrote")
    with open(path, "rb") as file:
        text = _read_text(file, str(path))
    try:
        fields = json.loads(text, parse_constant=_no_constant)
        return _parse(fields)
    except (ValueError, RecursionError) as error:  # JSON's own errors are ValueErrors
        raise RequestError(
            f"{path}: the request in it is damaged ({error}); give the options without --from"
        ) from error


def recorded_images(record: Record, path: str | os.PathLike[str]) -> list[list[str]]:
    """The input images that a file names, found from its folder and compared with its digests.

    Raises RequestError if one is gone or has changed.
    """
    return [[_unchanged(image, path) for image in images] for images in record.input_images]


def found_from(picture: str | os.PathLike[str], file: Source) -> str:
    """Where a file is that a picture refers to."""
    return os.path.normpath(Path(picture).parent / file.path)


def printable(text: str) -> str:
    """Control characters and the like written as escapes."""
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape").decode() for one in text
    )


def _unchanged(image: Source, picture: str | os.PathLike[str]) -> str:
    found = found_from(picture, image)
    if not os.path.isfile(found):
        problem = "is not there"
    elif _sha256(found) != image.sha256:
        problem = "has changed since"
    else:
        return found
    raise RequestError(
        f"{picture} was made with the input image {printable(found)}, which {problem}; "
        "give the images with --image"
    )


def _sha256(path: str | os.PathLike[str]) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_text(file: BinaryIO, name: str) -> bytes:
    """The text of our chunk; after the PNG specification, 2nd edition, chapters 5 and 11.3.4."""
    if file.read(len(_SIGNATURE)) != _SIGNATURE:
        raise RequestError(f"{name} is no PNG file; only PNG files carry their request")
    prefix = KEY.encode() + b"\0"
    while len(header := file.read(8)) == 8:
        length, kind = int.from_bytes(header[:4], "big"), header[4:]
        start = file.read(min(length, len(prefix))) if kind == b"tEXt" else b""
        if start != prefix:
            file.seek(length - len(start) + 4, os.SEEK_CUR)
            continue
        if length - len(prefix) > MAX_BYTES:
            raise RequestError(
                f"{name}: the request in it has {length - len(prefix):,} bytes, at most "
                f"{MAX_BYTES:,} are read; give the options without --from"
            )
        text, checksum = file.read(length - len(prefix)), file.read(4)
        if zlib.crc32(kind + start + text).to_bytes(4, "big") != checksum:
            raise RequestError(
                f"{name}: the request in it is damaged (checksum); copy the file again"
            )
        return text
    raise RequestError(
        f"{name} carries no request; PNG files that omnigen-fast wrote do, unless another program "
        "has saved them since"
    )


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _parse(fields: Any) -> Record:
    """Raises ValueError unless all is there and of the right type, and nothing else is."""
    if not isinstance(fields, dict):
        raise ValueError("not an object")
    names = [*_TEXTS, *_LISTS, *ARGUMENTS, "latents", "index"]
    for name in fields:
        if name not in names:
            raise ValueError(f"unknown name {printable(repr(name)[:60])}")
    for name in names:
        if name not in fields:
            raise ValueError(f"{name} is missing")
    for name, (kind, is_right) in (_TEXTS | _LISTS | ARGUMENTS).items():
        if not is_right(fields[name]):
            raise ValueError(f"{name} must be {kind}")
    prompts, images = fields["prompt"], fields["input_images"]
    if not prompts or len(prompts) != len(images):
        raise ValueError("prompt and input_images must have one entry for each prompt")
    latents, index = fields["latents"], fields["index"]
    if not _is_whole(index) or index < 0:
        raise ValueError("index must be a number from 0")
    negatives = fields["negative_prompt"]
    return Record(
        model=fields["model"],
        prompts=tuple(prompts),
        input_images=tuple(tuple(map(_source, one)) for one in images),
        negative_prompts=None if negatives is None else tuple(negatives),
        arguments={name: fields[name] for name in ARGUMENTS},
        loras=tuple(fields["loras"]),
        latents=None if latents is None else _source(latents),
        index=index,
        vae_path=fields["vae_path"],
        revision=fields["revision"],
        version=fields["version"],
    )


def _source(fields: Any) -> Source:
    if not isinstance(fields, dict) or set(fields) != {"path", "sha256"}:
        raise ValueError("a file must have path and sha256")
    path, digest = fields["path"], fields["sha256"]
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError("a file's path must be a string")
    if digest is not None and not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
        raise ValueError("a file's sha256 must be 64 hexadecimal digits")
    return Source(path, digest)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_whole(value: Any) -> bool:
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return value.bit_length() < _MAX_BITS


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or _is_whole(value)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


_Check = tuple[str, Callable[[Any], bool]]
_TEXTS: dict[str, _Check] = dict.fromkeys(("version", "model"), ("a string", _is_text))
_TEXTS |= dict.fromkeys(
    ("vae_path", "revision"), ("null or a string", lambda value: value is None or _is_text(value))
)
_LISTS: dict[str, _Check] = {
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
_WHOLE, _NUMBER, _SWITCH = (
    ("a whole number", _is_whole),
    ("a number", _is_number),
    ("true or false", _is_switch),
)
# Of a call, as `OmniGenPipeline.__call__` names them. Those that change no picture are left out.
ARGUMENTS: dict[str, _Check] = {
    "height": _WHOLE,
    "width": _WHOLE,
    "num_inference_steps": _WHOLE,
    "guidance_scale": _NUMBER,
    "use_img_guidance": _SWITCH,
    "img_guidance_scale": _NUMBER,
    "max_input_image_size": _WHOLE,
    "use_input_image_size_as_output": _SWITCH,
    "num_images_per_prompt": _WHOLE,
    "seed": _WHOLE,
    "dtype": ("a string", _is_text),
}
