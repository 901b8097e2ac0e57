"""Lines of a batch file: what each asks for, checked, and a digest that identifies it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import RequestError, printable
from ..fewer_steps import left_to_preset
from ..image_decoder import MAX_FILE_BYTES
from ..page.record import (
    INTEGER,
    NUMBER,
    RECORDED_ARGUMENTS,
    RECORDED_OPTIONS,
    SWITCH,
    TEXT,
    Check,
    Record,
    RecordedFile,
    recorded_arguments,
    recorded_file,
)
from ..request import MAX_IMAGES, OUTPUT_TYPES

MAX_LINES = 1_000_000  # of a file; what is remembered of each takes memory
MAX_LINE_BYTES = 4 << 20  # several times the longest request that a PNG file carries
MAX_ID_BYTES = 120  # leaves room for a number, a suffix and a temporary name within 255
_BLOCK = 1 << 20

# A line's keys besides `id`. A value of null is the same as no key.
_OPTIONAL_SWITCHES = ("separate_cfg_infer", "use_kv_cache", "offload_kv_cache", "offload_model")
_PATH: Check = ("a path", lambda value: isinstance(value, str) and bool(value))
KEYS: dict[str, Check] = {
    "prompt": TEXT,
    "instruction": TEXT,  # the prompt in the original's training data
    "input_images": (
        "a path or a list of paths",
        lambda value: (
            _PATH[1](value)
            or (isinstance(value, list) and all(one is None or _PATH[1](one) for one in value))
        ),
    ),
    "negative_prompt": TEXT,
    **RECORDED_ARGUMENTS,
    **RECORDED_OPTIONS,
    "mask_image": _PATH,
    "latents": _PATH,
    "output_type": (
        f"one of {', '.join(OUTPUT_TYPES)}",
        lambda value: isinstance(value, str) and value in OUTPUT_TYPES,
    ),
    **dict.fromkeys(_OPTIONAL_SWITCHES, SWITCH),
    "memory": (
        "an amount such as 8GiB",
        lambda value: TEXT[1](value) or INTEGER[1](value),
    ),
}
_IGNORED = ("task_type", "output_image", "output_images")  # the original's training data
REFUSED_KEYS = {  # arguments of a call that a line can't have, and what to do
    "generator": "give a seed",
    "callback_on_step_end": "callbacks are for Python",
    "callback_on_step_end_tensor_inputs": "callbacks are for Python",
    "return_dict": "results are written to files",
    "progress": "give the option --quiet",
}

_FORBIDDEN = frozenset('/\\:*?"<>|')  # in names of files, here or on Windows
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³])(\..*)?", re.I)
_ADDRESS = re.compile(r"(https?|data):")


@dataclass(frozen=True)
class Job:
    """A line that can be carried out."""

    number: int  # of its line, from 1
    id: str  # names its files
    digest: str  # of what it asks for, files by their content
    record: Record  # the request; its seed is None if the line has none
    images: tuple[str, ...]  # paths, in the order of `record.input_images`
    mask: str | None  # path
    latents: str | None  # path
    settings: Mapping[str, Any]  # arguments of the call that a record does not hold

    @property
    def pictures(self) -> int:
        return self.record.arguments["num_images_per_prompt"]

    @property
    def output_type(self) -> str:
        return self.settings["output_type"]

    def shared(self) -> dict[str, Any]:
        """Arguments of the call that lines must have in common to run as one call."""
        arguments = {**self.record.arguments, **self.settings}
        del arguments["seed"]
        arguments.pop("quality", None)  # what it stands for is among them
        return {**arguments, "mask_image": self.mask}

    def files(self) -> Iterator[tuple[str, RecordedFile]]:
        """Paths of the files that the line reads, and what they were when it was read."""
        yield from zip(self.images, self.record.input_images[0])
        if self.mask is not None and self.record.mask_image is not None:
            yield self.mask, self.record.mask_image
        if self.latents is not None and self.record.latents is not None:
            yield self.latents, self.record.latents

    def with_files(self, copies: Mapping[str, str]) -> Job:
        """The same line, reading copies of its files; `copies` has their paths by the files'."""
        mask, latents = (path and copies[path] for path in (self.mask, self.latents))
        images = tuple(copies[path] for path in self.images)
        return replace(self, images=images, mask=mask, latents=latents)


@dataclass(frozen=True)
class BadLine:
    """A line that can't be carried out."""

    number: int
    id: str | None  # None if it has none that could name a file
    digest: str  # of its bytes
    error: str


@dataclass(frozen=True)
class Source:
    """How the lines of a file are read.

    Args:
        folder: that relative paths start from.
        out: folder of the pictures, which their records refer to files from.
        made_with: record of the model and its LoRAs; its other fields are not used.
        defaults: values for keys that a line does not have, for every key of `KEYS` but
            `instruction`; None where there is none. Paths are absolute.
        any_path: whether to read files outside `folder` as well.
    """

    folder: Path
    out: Path
    made_with: Record
    defaults: Mapping[str, Any]
    any_path: bool = False

    def lines(self, file: BinaryIO) -> Iterator[Job | BadLine]:
        """The lines of a file that are not blank, in order; reads one at a time.

        A file of more than `MAX_LINES` lines ends there, with a bad line that says so.
        """
        claimed = _Claimed(min(self.defaults["num_images_per_prompt"], MAX_IMAGES))
        for number, text, digest in _raw_lines(file):
            name: str | None = None
            try:
                if number > MAX_LINES:
                    raise RequestError(
                        f"a batch file has at most {MAX_LINES:,} lines; split it, the rest of "
                        "this one is not read"
                    )
                if text is None:
                    raise RequestError(
                        f"the line has more than {MAX_LINE_BYTES:,} bytes; shorten it"
                    )
                fields = _object(text)
                name = claimed.take(fields, number)
                yield self._job(number, name, fields)
            except RequestError as error:
                yield BadLine(number, name, digest, str(error))

    def _job(self, number: int, name: str, fields: Mapping[str, Any]) -> Job:
        given = _given(fields)
        values = {**self.defaults, **given}
        if "quality" in given:
            values |= left_to_preset(given)
        prompt, negative = values["prompt"], values["negative_prompt"]
        if prompt is None:
            raise RequestError("the line has no prompt; add one, or give --prompt for all lines")
        images, latents = values["input_images"] or (), values["latents"]
        mask = values["mask_image"]
        if given.get("input_images"):
            images = self._paths(given["input_images"])
        if "latents" in given:
            latents = self._path("latents", given["latents"])
        if "mask_image" in given:
            mask = self._path("mask_image", given["mask_image"])
        read = {path: self._recorded(path) for path in (*images, *filter(None, [mask, latents]))}
        record = replace(
            self.made_with,
            prompts=(prompt,),
            input_images=(tuple(read[path] for path in images),),
            negative_prompts=None if negative is None else (negative,),
            arguments=recorded_arguments(values),
            mask_image=None if mask is None else read[mask],
            latents=None if latents is None else read[latents],
        )
        _check_length(record)
        settings = {key: values[key] for key in ("output_type", "memory", *_OPTIONAL_SWITCHES)}
        digest = hashlib.sha256(f"{record.digest()} {settings['output_type']}".encode()).hexdigest()
        return Job(number, name, digest, record, tuple(images), mask, latents, settings)

    def _paths(self, given: str | list[str | None]) -> tuple[str, ...]:
        paths = [given] if isinstance(given, str) else [one for one in given if one is not None]
        if len(paths) > MAX_IMAGES:
            raise RequestError(
                f"input_images has {len(paths)} images; a prompt names at most {MAX_IMAGES}"
            )
        return tuple(self._path(f"input_images[{i}]", path) for i, path in enumerate(paths))

    def _path(self, name: str, path: str) -> str:
        """The absolute path of a file that a line names."""
        shown = printable(path, 100)
        if _ADDRESS.match(path):
            raise RequestError(f"{name} is a web address or data ({shown}); give a path")
        try:
            os.fsencode(path)
            found = os.path.abspath(self.folder / os.path.expanduser(path))
            inside = Path(os.path.realpath(found)).is_relative_to(os.path.realpath(self.folder))
        except (ValueError, OSError) as error:  # a NUL, a lone surrogate, a loop of links
            raise RequestError(f"{name}: {shown} is no path; give the path of a file") from error
        if not inside and not self.any_path:
            folder = printable(os.path.abspath(self.folder), 80)
            raise RequestError(
                f"{name}: {shown} is outside the folder {folder}; put it there, or give "
                "--any-path if you trust the batch file"
            )
        return found

    def _recorded(self, path: str) -> RecordedFile:
        folders = os.path.realpath(os.path.dirname(path)), os.path.dirname(os.path.realpath(path))
        if os.path.realpath(self.out) in folders:
            raise RequestError(
                f"{printable(path, 100)} is in the folder of the pictures, one of which might "
                "replace it; give another folder for them"
            )
        try:
            size = os.path.getsize(path) if os.path.isfile(path) else 0
        except OSError:
            size = 0  # what is wrong with it is said when it is opened
        if size > MAX_FILE_BYTES:
            raise RequestError(
                f"{printable(path, 100)} has {size:,} bytes, at most {MAX_FILE_BYTES:,} are read"
            )
        return recorded_file(path, self.out)


@dataclass
class _Claimed:
    """Which names of files the lines so far have taken."""

    usual: int  # pictures of a line that does not say how many
    pictures: dict[str, int] = field(default_factory=dict)  # by folded id

    def take(self, fields: dict[str, Any], number: int) -> str:
        """Removes a line's id from its fields, or takes its number, and claims its files.

        Raises RequestError if it can't name files, or another line's files are named so.
        """
        own = fields.pop("id", None)
        name = str(number) if own is None else _checked_id(own)
        given = fields.get("num_images_per_prompt")
        count = next((i for i in range(1, MAX_IMAGES + 1) if i == given), self.usual)
        folded = _folded(name)
        stem, _, index = folded.rpartition("-")
        numbered = index.isdecimal() and len(index) <= 4 and index == str(int(index))
        if (
            folded in self.pictures
            or (numbered and 1 < self.pictures.get(stem, 0) >= int(index))
            or (count > 1 and any(f"{folded}-{i + 1}" in self.pictures for i in range(count)))
        ):
            raise RequestError(
                f"the id {printable(repr(name), 140)} names the files of an earlier line (upper "
                "and lower case are the same); give each line its own"
            )
        self.pictures[folded] = count
        return name


def _folded(name: str) -> str:
    """Equal for names that some file system takes for the same."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _checked_id(given: Any) -> str:
    if not TEXT[1](given) and not INTEGER[1](given):
        raise RequestError(f"id must be a string or an integer, got {_show(given)}")
    name = str(given)
    shown = printable(repr(name), 140)
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise RequestError(f"id {shown} holds what is not a character") from error
    if not 0 < size <= MAX_ID_BYTES:
        raise RequestError(
            f"id must have 1 to {MAX_ID_BYTES} bytes in UTF-8, since it names a file, got {size}"
        )
    if not name.isprintable() or not _FORBIDDEN.isdisjoint(name):
        raise RequestError(
            f"id {shown} can't name a file; leave out control characters and any of "
            f"{' '.join(sorted(_FORBIDDEN))}"
        )
    if name[0] in ". -~" or name[-1] in ". ":
        raise RequestError(
            f"id {shown} can't name a file; it may not begin with a dot, a space, - or ~, nor end "
            "with a dot or a space"
        )
    if _RESERVED.fullmatch(name):
        raise RequestError(f"id {shown} is the name of a device on Windows; choose another")
    return name


def _raw_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None, str]]:
    """Number, bytes (None if they are too many) and digest of each line that is not blank."""
    number = 0
    while number <= MAX_LINES and (text := file.readline(MAX_LINE_BYTES + 1)):
        number += 1
        digest, whole = hashlib.sha256(text.rstrip(b"\r\n")), len(text) <= MAX_LINE_BYTES
        if not whole:
            while text and not text.endswith(b"\n"):
                text = file.readline(_BLOCK)
                digest.update(text)
            yield number, None, digest.hexdigest()
        elif text.strip():
            yield number, text, digest.hexdigest()


def _object(text: bytes) -> dict[str, Any]:
    """The keys of a line and their values, none of which is checked yet."""
    try:
        fields = json.loads(
            text.strip().decode("utf-8-sig"),
            parse_constant=_no_constant,
            object_pairs_hook=_no_repeats,
        )
    except (ValueError, RecursionError) as error:  # JSON's and Unicode's errors are ValueErrors
        what = str(error)
        if isinstance(error, json.JSONDecodeError):
            what = f"{error.msg}, at character {error.pos + 1}"
        raise RequestError(f"the line is not JSON: {what}") from error
    if not isinstance(fields, dict):
        raise RequestError(
            f'the line must be a JSON object such as {{"prompt": "a cat"}}, got {_show(fields)}'
        )
    return fields


def _check_keys(fields: Mapping[str, Any]) -> None:
    for key in fields:
        if key in REFUSED_KEYS:
            raise RequestError(f"a line can't have {key}; {REFUSED_KEYS[key]}")
        if key not in KEYS and key not in _IGNORED:
            near = get_close_matches(key[:60], KEYS, 1)
            way_out = f"did you mean {near[0]}?" if near else "a line has arguments of a call"
            raise RequestError(f"unknown key {_show(key)}; {way_out}")


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a line says about its request, checked by itself."""
    _check_keys(fields)
    given = {
        key: _checked(key, value)
        for key, value in fields.items()
        if value is not None and key not in _IGNORED
    }
    if "instruction" in given:
        if "prompt" in given:
            raise RequestError("the line has a prompt and an instruction; give one of them")
        given["prompt"] = given.pop("instruction")
    return given


def _check_length(record: Record) -> None:
    """Raises RequestError now if a picture can't carry the record, whatever its seed will be."""
    longest = {**record.arguments, "seed": -1 << 63}
    replace(record, arguments=longest, index=MAX_IMAGES - 1).text()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key stands in it twice")
    return fields


def _checked(key: str, value: Any) -> Any:
    """A value of the right type; equal numbers become the same one."""
    check = KEYS[key]
    kind, is_right = check
    if check is INTEGER and isinstance(value, float) and value.is_integer():
        value = int(value)
    if not is_right(value):
        raise RequestError(f"{key} must be {kind}, got {_show(value)}")
    if check is NUMBER and abs(value) < 1 << 53:
        value = float(value)
    return value


def _show(value: Any) -> str:
    """A value for an error message, truncated."""
    if isinstance(value, (list, dict)):  # may be large
        return "a list" if isinstance(value, list) else "an object"
    if isinstance(value, int) and not INTEGER[1](value):
        return "a boolean" if isinstance(value, bool) else "an enormous number"
    return printable(repr(value)[:200], 60)
