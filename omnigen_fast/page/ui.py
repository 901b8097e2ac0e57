"""The Gradio page: its fields and buttons, and their actions through `job`."""

from __future__ import annotations

import html
import io
import os
import secrets
import shutil
import tempfile
import threading
import traceback
from abc import ABCMeta
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict
from urllib.parse import urlsplit

# Read by Gradio on import. By default it reports each start and looks for newer versions, and the
# browser keeps every request with its pictures.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"

import gradio as gr
from fastapi import FastAPI
from gradio.data_classes import ImageData
from gradio.networking import setup_tunnel
from gradio.processing_utils import save_file_to_cache
from gradio.tunneling import CURRENT_TUNNELS
from gradio.utils import get_upload_folder, is_in_or_equal
from PIL.Image import Image

from ..errors import OmniGenError, RequestError
from ..fewer_steps import QUALITIES, preset
from ..pipeline import OmniGenPipeline
from ..request import DEFAULT_NEGATIVE_PROMPT
from ..vae.preview import Preview
from ..web.hosts import Hosts
from .bodies import IMAGE, MAX_UPLOAD_BYTES, NUMBER, SWITCH, TEXT, Call, Kind, choice
from .gallery import TIPS, gallery
from .gate import Gate
from .job import TABLE_HEADERS, Fields, Finished, Job, clock, memory_table, save, sentence
from .line import Line
from .server import Server, listen

_MEMORY = ["auto", "4GiB", "6GiB", "8GiB", "12GiB", "16GiB", "24GiB"]
_MAX_QUEUE = 64  # calls that Gradio may hold for a moment; the line is ours
_MAX_TABLES = 2  # memory tables at a time: they read the images, which may be large
_WRITING_SECONDS = 4.0  # that the end waits for a picture being written
_TABLE_PATIENCE = 1.0  # seconds that a table waits for its turn
_IDLE_SECONDS = 60  # after which a session's messages that nobody fetched are dropped
_LARGEST_SEED = (1 << 53) - 1
_NOT_UPLOADED = "an input image must be uploaded"
_CSS = """
.gradio-container {max-width: 1240px !important; margin: 0 auto !important}
#status {min-height: 4.2em}
#status p {margin: 0; overflow-wrap: anywhere}
#status progress {width: 100%; height: .7em; accent-color: var(--primary-500)}
#status [role=alert] {color: #b91c1c; font-weight: 600}
.dark #status [role=alert] {color: #fca5a5}
#plans table {font-variant-numeric: tabular-nums}
#examples td:first-child {min-width: 26em; text-align: left}
footer {display: none !important}
"""


class _Hidden(TypedDict):
    """Options of an event without a spinner and without an entry in Gradio's API."""

    show_progress: Literal["hidden"]
    api_visibility: Literal["private"]


_HIDDEN: _Hidden = {"show_progress": "hidden", "api_visibility": "private"}
_FIELDS: dict[str, Kind] = {
    "prompt": TEXT,
    **dict.fromkeys(("image 1", "image 2", "image 3"), IMAGE),
    **dict.fromkeys(("height", "width", "guidance_scale", "img_guidance_scale"), NUMBER),
    **dict.fromkeys(("num_inference_steps", "seed"), NUMBER),
    "random seed": SWITCH,
    "max_input_image_size": NUMBER,
    "use_input_image_size_as_output": SWITCH,
    **dict.fromkeys(("negative_prompt", "memory", "quality"), TEXT),
}


class Page:
    """A model, the folder for its pictures, and the calls that run or wait."""

    def __init__(self, pipe: OmniGenPipeline, model: str, folder: Path) -> None:
        self._pipe, self._model, self._folder = pipe, model, folder
        self._preview = Preview.fit(pipe.vae)
        self.line = Line()
        self._tables = threading.Semaphore(_MAX_TABLES)
        self._writing = threading.Lock()

    def finish_writing(self) -> None:
        """Waits for the picture that is being written, if any; no other one is begun."""
        self._writing.acquire(timeout=_WRITING_SECONDS)

    def generate(self, request: gr.Request, *values: Any) -> Iterator[tuple[Any, ...]]:
        """Yields status, picture, seed, saved file, and the states of both buttons."""
        same = gr.skip()
        running = gr.Button(interactive=False), gr.Button(interactive=True)
        idle = gr.Button(interactive=True), gr.Button(interactive=False)
        try:
            arguments = Fields(*values).call()
            # JSON's integers end here; the request's own check reports a larger one
            seed = arguments["seed"]
            if not isinstance(seed, int) or abs(seed) > _LARGEST_SEED:
                seed = same
            job = Job(self._pipe, arguments, self._preview)
            with self.line.place(request.session_hash, job):
                for others in self.line.wait(job):
                    text = f"Waiting: {others} before this one"
                    yield _status(text), same, seed, "", *running
                if job.stopping:
                    yield _status("Stopped before it began"), same, same, "", *idle
                    return
                yield _status("Starting"), same, seed, "", *running
                for event in job.run():
                    if isinstance(event, Finished):
                        yield *self._finish(event, arguments), *idle
                    else:
                        picture = same if event.preview is None else event.preview
                        status = _status(str(event), event.done / event.steps)
                        yield status, picture, same, same, same, same
        except Exception as error:  # of any kind: shown, and the page goes on
            yield _failure(error), same, same, same, *idle

    def stop(self, request: gr.Request) -> None:
        """Stops the session's own calls."""
        self.line.stop(request.session_hash)

    def plans(self, *values: Any) -> tuple[Any, Any]:
        """The planner's table for the request, and the status."""
        if not self._tables.acquire(timeout=_TABLE_PATIENCE):
            return [], _failure(RequestError("others ask for this too; try again in a minute"))
        try:
            return memory_table(self._pipe, Fields(*values).call()), ""
        except Exception as error:  # as above
            return [], _failure(error)
        finally:
            self._tables.release()

    def _finish(self, event: Finished, arguments: dict[str, Any]) -> tuple[Any, ...]:
        if event.stopped:
            text = f"Stopped after step {event.done} of {event.steps}; nothing was saved"
            return _status(text, event.done / event.steps), event.image, gr.skip(), ""
        dtype = str(self._pipe.dtype).removeprefix("torch.")
        try:
            with self._writing:
                path = save(event.image, arguments, self._model, dtype, self._folder)
        except (OmniGenError, OSError) as error:  # the picture is shown all the same
            return _failure(error, "The picture was not saved: "), event.image, gr.skip(), ""
        text = f"Done: {event.steps} steps in {clock(event.seconds)}"
        # the file itself, so that the download carries the request
        return _status(text, 1), path, gr.skip(), str(path)

    def build(self) -> gr.Blocks:
        """Builds the page."""
        start = gallery(self._model)

        def fill(index: int) -> list[Any]:
            one = start.examples[index]
            images = one.three_images()
            return [one.prompt, *images, one.guidance_scale, one.use_input_image_size]

        def steps_of(quality: str) -> Any:
            if quality == QUALITIES[0]:
                return start.steps
            return preset(quality)["num_inference_steps"]

        side = min(start.side, self._pipe.config.max_image_side)
        with _Blocks(title="OmniGen", analytics_enabled=False) as blocks:
            gr.Markdown(f"# OmniGen\n`{self._model}` on {self._pipe.device}")
            with gr.Row():
                with gr.Column(scale=6):
                    prompt = gr.Textbox(
                        label="Prompt",
                        lines=3,
                        placeholder="A cat on a sofa, or: <img><|image_1|></img> Remove the cup.",
                        elem_id="prompt",
                    )
                    with gr.Row():
                        images = [
                            _Image(
                                label=f"Image {i}",
                                sources=["upload", "clipboard"],
                                height=210,
                                elem_id=f"image-{i}",
                            )
                            for i in (1, 2, 3)
                        ]
                    gr.Markdown(
                        "Refer to them in the prompt as: "
                        + ", ".join(f"`<img><|image_{i}|></img>`" for i in (1, 2, 3))
                    )
                    with gr.Row():
                        width = _number("Width", side, "width")
                        height = _number("Height", side, "height")
                        steps = _number("Steps", start.steps, "steps")
                        quality = gr.Dropdown(
                            list(QUALITIES),
                            value=QUALITIES[0],
                            label="Quality",
                            elem_id="quality",
                            min_width=110,
                        )
                    use_size = gr.Checkbox(
                        label="Use the input image's size", elem_id="use-input-size"
                    )
                    with gr.Row():
                        guidance = _number("Guidance scale", start.guidance_scale, "guidance", 0.1)
                        image_guidance = _number(
                            "Image guidance scale", start.img_guidance_scale, "img-guidance", 0.1
                        )
                        largest = _number("Max input image size", side, "max-input-size")
                    with gr.Row():
                        seed = _number("Seed", 0, "seed")
                        randomize = gr.Checkbox(
                            label="Random seed", value=True, elem_id="randomize", scale=2
                        )
                    with gr.Accordion("Negative prompt", open=False):
                        negative = gr.Textbox(
                            value=DEFAULT_NEGATIVE_PROMPT,
                            show_label=False,
                            container=False,
                            lines=3,
                            elem_id="negative",
                        )
                with gr.Column(scale=5):
                    with gr.Row():
                        generate = gr.Button("Generate", variant="primary", elem_id="generate")
                        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
                    status = gr.HTML(_status(""), elem_id="status")
                    result = _Image(
                        label="Picture",
                        interactive=False,
                        height=520,
                        buttons=["download", "fullscreen"],
                        elem_id="result",
                    )
                    saved = gr.Textbox(label="Saved as", interactive=False, elem_id="saved")
            with gr.Accordion("Memory", open=False, elem_id="memory-section"):
                with gr.Row():
                    memory = gr.Dropdown(
                        _MEMORY,
                        value="auto",
                        allow_custom_value=True,
                        label="How much to use",
                        info="auto: the free memory; or an amount such as 8GiB",
                        elem_id="memory",
                        scale=3,
                    )
                    plan = gr.Button("What would this request take?", elem_id="plan", scale=2)
                table = gr.Dataframe(
                    headers=TABLE_HEADERS,
                    column_widths=["10%", "15%", "15%", "60%"],
                    interactive=False,
                    elem_id="plans",
                )
            fields = [
                *(prompt, *images, height, width, guidance, image_guidance, steps, seed),
                *(randomize, largest, use_size, negative, memory, quality),
            ]
            shown = max(1, *(len(one.images) for one in start.examples))
            examples = gr.Dataset(
                components=[prompt, *images[:shown]],
                samples=[[one.prompt, *one.three_images()[:shown]] for one in start.examples],
                type="index",
                label="Examples: a click fills the fields and runs",
                elem_id="examples",
            )
            with gr.Accordion("Tips", open=False):
                gr.Markdown(TIPS)
            outputs = [status, result, seed, saved, generate, stop]
            generate.click(self.generate, fields, outputs, concurrency_limit=None, **_HIDDEN)
            filled = [prompt, *images, guidance, use_size]
            examples.click(fill, examples, filled, queue=False, **_HIDDEN).then(
                self.generate, fields, outputs, concurrency_limit=None, **_HIDDEN
            )
            stop.click(self.stop, queue=False, **_HIDDEN)
            plan.click(self.plans, fields, [table, status], concurrency_limit=None, **_HIDDEN)
            blocks.unload(self.stop)  # the page was closed
            quality.change(steps_of, quality, steps, queue=False, **_HIDDEN)
        return blocks


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


class _Blocks(gr.Blocks):
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
_Image = ABCMeta.__new__(
    type(gr.Image),
    "_Image",
    (gr.Image,),
    {
        "__module__": __name__,
        "is_template": True,  # the page shows it as Gradio's own
        "preprocess": _uploaded,
        "postprocess": _shown,
    },
)


def serve(
    model: str,
    loading: Mapping[str, Any],
    host: str,
    port: int | None,
    allowed_hosts: tuple[str, ...],
    share: bool,
    out_dir: Path,
) -> int | None:
    """Loads the model and serves the page; returns the signal that ended it.

    Args:
        model: folder or hub id.
        loading: other arguments of `from_pretrained`.
        host, port: to listen at; the first free port from 7860 on without one.
        allowed_hosts: names that are answered besides those of this machine.
        share: whether to ask for a public link.
        out_dir: folder for pictures.

    Raises OmniGenError for options that can't be used.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise OmniGenError(f"--out-dir {out_dir} is a file; give a folder")
    names = [*allowed_hosts, *([] if host in ("0.0.0.0", "::") else [host])]
    Hosts.of(names)
    with listen(host, port) as opened:
        pipe = OmniGenPipeline.from_pretrained(model, **loading)
        page = Page(pipe, model, out_dir)
        # apart from those of other programs, and gone with this one
        folder = tempfile.mkdtemp(prefix="omnigen-fast-", dir=os.environ.get("GRADIO_TEMP_DIR"))
        remove = partial(shutil.rmtree, folder, ignore_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = folder

        def end() -> None:
            page.finish_writing()
            remove()

        try:
            used = opened.getsockname()[1]
            public = _share(used) if share else None
            if public is not None:
                names.append(str(urlsplit(public).hostname))
            server = _server(page, Hosts.of(names), Path(folder), used)
            shown = f"[{host}]" if ":" in host else host
            print(f"The page is at http://{shown}:{used}/", flush=True)
            if public:
                print(f"and, for anyone who has the link, at {public}", flush=True)
            elif share:
                print("There is no public link: Gradio's server provided none", flush=True)
            return server.serve_until_told(opened, end)
        finally:
            end()
            for tunnel in CURRENT_TUNNELS:
                tunnel.kill()


def _server(page: Page, hosts: Hosts, folder: Path, port: int) -> Server:
    """The server of the page, with the gate in front of Gradio."""
    blocks = page.build().queue(max_size=_MAX_QUEUE)
    application = gr.mount_gradio_app(
        FastAPI(openapi_url=None, docs_url=None, redoc_url=None),
        blocks,
        path="/",
        footer_links=[],
        max_file_size=MAX_UPLOAD_BYTES,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        # the default theme loads its font from Google
        theme=gr.themes.Default(
            font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ),
        css=_CSS,
    )
    blocks.has_launched = True  # else Gradio checks no paths
    gate = Gate(application, hosts, _calls(blocks), page.line, folder, port)
    idle: set[str] = set()
    seconds = 0

    def every_second() -> None:
        nonlocal idle, seconds
        page.line.expire()
        seconds += 1
        if seconds % _IDLE_SECONDS == 0:
            still = idle & gate.idle()
            gate.forget(still)
            _forget(blocks, still)
            idle = gate.idle()

    return Server(gate, page.line.close, every_second)


def _calls(blocks: gr.Blocks) -> dict[int, Call]:
    """What the page's buttons send, by the number of the action."""
    fields: dict[str, dict[str, Kind]] = {"generate": _FIELDS, "plans": _FIELDS, "stop": {}}
    known = Kind(f"one of {', '.join(QUALITIES)}", lambda value: value in QUALITIES)
    fields["steps_of"] = {"quality": known}
    calls = {}
    for number, function in blocks.fns.items():
        if any(event == "unload" for _, event in function.targets):
            continue  # Gradio's own, when a page is closed
        if function.name == "fill":
            (examples,) = function.inputs
            calls[number] = Call(function.queue, {"example": choice(len(examples.samples))})
        else:
            calls[number] = Call(function.queue, fields[function.name])
    return calls


def _forget(blocks: gr.Blocks, sessions: set[str]) -> None:
    """Drops messages for sessions that never fetched them; Gradio would keep them."""
    queue = blocks._queue
    for session in sessions:
        for kept in (queue.pending_messages_per_session, queue.pending_event_ids_session):
            kept.pop(session, None)


def _share(port: int) -> str | None:
    """A public address from Gradio's server, or None."""
    try:
        return setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None)
    except Exception:  # of any kind: the page itself works without
        return None


def _number(label: str, value: float, name: str, step: float = 1) -> gr.Number:
    # without limits: the request's own checks report errors
    return gr.Number(value, label=label, step=step, elem_id=name, min_width=110)


def _status(text: str, share: float | None = None) -> str:
    bar = "" if share is None else f'<progress value="{share:.4f}" max="1"></progress>'
    return f'<p role="status">{html.escape(text)}</p>{bar}'


def _failure(error: Exception, before: str = "") -> str:
    if not isinstance(error, OmniGenError):
        traceback.print_exception(error)
    return f'<p role="alert">{html.escape(before + sentence(error))}</p>'
