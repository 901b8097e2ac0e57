"""Gradio's parts as the page uses them: uploads only, and pictures from any folder.

Import Gradio from here: it reads its settings when it is imported.
"""

from __future__ import annotations

import io
import os
from abc import ABCMeta
from base64 import b64encode
from contextlib import suppress
from pathlib import Path
from typing import Any

# By default Gradio reports each start and looks for newer versions, and the browser keeps every
# request with its pictures.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"

import gradio as gr
from gradio.data_classes import ImageData
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder, is_in_or_equal
from PIL.Image import Image

_NOT_UPLOADED = "an input image must be uploaded"


def _uploaded(self: gr.Image, file: ImageData | None) -> str | None:
    """The path of an uploaded file, whatever its content.

    The pipeline checks the content, with the same messages as elsewhere. The path is checked here:
    Gradio's own check does not run if a client omits the field that marks files.

    Raises gr.Error for a file that was not uploaded.
    """
    if file is None:
        return None
    folders = (get_upload_folder(), self.GRADIO_CACHE)
    if not file.path or not any(is_in_or_equal(file.path, folder) for folder in folders):
        raise gr.Error(_NOT_UPLOADED, print_exception=False)
    return file.path


class Blocks(gr.Blocks):
    """Opens and fetches nothing but uploads.

    Gradio would fetch any URL that a client sends as a file, and copy any file of this machine into
    the folder that it serves if it runs under another server than its own.
    """

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], *arguments: Any, **options: Any
    ) -> Any:
        if _names_others(inputs, os.path.realpath(get_upload_folder())):
            raise gr.Error(_NOT_UPLOADED, print_exception=False)
        return await super().preprocess_data(block_fn, inputs, *arguments, **options)


def _names_others(value: Any, folder: str) -> bool:
    """Whether a client's input contains a file that does not lie in a folder."""
    if isinstance(value, list):
        return any(_names_others(one, folder) for one in value)
    if not isinstance(value, dict):
        return False
    if "path" in value:
        path = value["path"]
        if not isinstance(path, str) or not os.path.realpath(path).startswith(folder + os.sep):
            return True
    return any(_names_others(one, folder) for one in value.values())


def _shown(self: gr.Image, value: Path | Image | None) -> ImageData | None:
    """A file in any folder, or an image that is only shown.

    Gradio rejects files outside the working directory, and would keep every preview.
    """
    if value is None:
        return None
    if isinstance(value, Path):
        with suppress(OSError):  # Gradio's cache folder may be full
            copy = save_file_to_cache(value, self.GRADIO_CACHE)
            return ImageData(path=copy, orig_name=value.name)
        return _inline("png", value.read_bytes())
    written = io.BytesIO()
    value.save(written, "jpeg", quality=85)
    return _inline("jpeg", written.getvalue())


def _inline(kind: str, data: bytes) -> ImageData:
    return ImageData(url=f"data:image/{kind};base64,{b64encode(data).decode()}")


# A subclass of gr.Image. For a class statement Gradio would write a .pyi file next to this one.
Picture = ABCMeta.__new__(
    type(gr.Image),
    "Picture",
    (gr.Image,),
    {
        "__module__": __name__,
        "is_template": True,  # the page shows it as Gradio's own
        "preprocess": _uploaded,
        "postprocess": _shown,
    },
)


def _sent(self: gr.Dropdown, value: Any) -> Any:
    """What was sent, on the list or not.

    The request's own checks report what is not; Gradio's refusal would put a traceback into the log
    and all that was sent into its message.
    """
    return value


# As `Picture`, of gr.Dropdown.
Choice = ABCMeta.__new__(
    type(gr.Dropdown),
    "Choice",
    (gr.Dropdown,),
    {"__module__": __name__, "is_template": True, "preprocess": _sent},
)


def cached(path: Path) -> str | None:
    """The copy of a picture that the page shows; None where there is no room for one."""
    with suppress(OSError):
        return save_file_to_cache(path, get_upload_folder())
    return None
