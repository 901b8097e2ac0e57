"""The page: its fields and buttons, and what each of them does."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypedDict

from PIL import Image

from ..fewer_steps import QUALITIES
from ..model_defaults import read_defaults
from ..request import DEFAULT_NEGATIVE_PROMPT
from .actions import NAMES, Actions
from .bodies import IMAGE, NUMBER, SWITCH, TEXT, Call, Kind, choice
from .components import Blocks, Choice, Picture, gr
from .gallery import TIPS, Example, Gallery, gallery
from .job import MAX_PICTURES
from .loras import NONE

_HERE = Path(__file__).parent
_MEMORY = ["auto", "4GiB", "6GiB", "8GiB", "12GiB", "16GiB", "24GiB"]
_CARRIERS = [".png", ".jpg", ".jpeg", ".webp"]  # of a request
_THUMBNAIL = 96  # pixels
_LEGEND = """
From the fastest plan to the smallest. *chosen*: what Generate would run now; *fits*: less memory,
more time; *too large*: more than is free, or than you allow. GB is the predicted peak of the
device's memory, s the predicted time. *Streamed*: copied to the device while a step runs. *KV
cache*: keys and values of prompt and input images, computed once for all steps. *Passes of N*: N
guidance branches at a time. *MLP N*: N rows at a time. *Strips of N*: the autoencoder works on N
rows at a time. *Captured*: steps are replayed as a CUDA graph.
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
    "mask": IMAGE,
    **dict.fromkeys(("mask_blur", "pictures"), NUMBER),
    **dict.fromkeys(("seeds", "LoRA"), TEXT),
    "LoRA strength": NUMBER,
}
CSS = (_HERE / "page.css").read_text(encoding="utf-8")
_MASK = """
<p id="mask-hint">Give image 1, and it can be painted on here.</p>
<div id="mask-tools" hidden>
  <label>Brush <input id="mask-brush" type="range" min="1" max="40" value="12"></label>
  <button type="button" id="mask-erase" aria-pressed="false">Erase</button>
  <button type="button" id="mask-undo">Undo</button>
  <button type="button" id="mask-clear">Clear</button>
</div>
<div id="mask-stage" hidden>
  <img id="mask-image" alt="">
  <canvas id="mask-canvas" tabindex="0" role="application"
    aria-label="Mask over image 1: arrow keys move the brush, the space bar paints"></canvas>
  <div id="mask-cursor" hidden></div>
</div>
"""


def build(actions: Actions) -> gr.Blocks:
    """Builds the page."""
    pipe = actions.pipe
    start = _start(actions)
    with Blocks(title="OmniGen", analytics_enabled=False) as blocks:
        gr.HTML(_heading(actions), elem_id="heading")
        with gr.Row(elem_id="layout"):
            with gr.Column(elem_id="ask"):
                prompt = gr.Textbox(
                    label="Prompt",
                    lines=3,
                    placeholder="A cat on a sofa, or: <img><|image_1|></img> Remove the cup.",
                    elem_id="prompt",
                )
                with gr.Row(elem_id="run"):
                    generate = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
                gr.HTML('<div id="notice" role="alert"></div>', elem_id="notice-block")
                status = gr.HTML('<p role="status"></p>', elem_id="status")
                if words := read_defaults(pipe.engine.checkpoint.folder).vocabulary:
                    text = f"<b>Fixed vocabulary.</b> {html.escape(words)}"
                    gr.HTML(f"<p>{text}</p>", elem_id="vocabulary")
                with gr.Row(elem_id="images"):
                    images = [
                        Picture(
                            label=f"Image {i}",
                            sources=["upload", "clipboard"],
                            height=150,
                            placeholder="Choose or drop",
                            elem_id=f"image-{i}",
                            min_width=90,
                        )
                        for i in (1, 2, 3)
                    ]
                with gr.Accordion("Mask", open=False, elem_id="mask-section"):
                    gr.HTML(_MASK, elem_id="mask-editor")
                    blur = _number("Seam in pixels", 0, "mask-blur")
            with gr.Column(elem_id="answer"):
                result = Picture(
                    label="Picture",
                    interactive=False,
                    height=480,
                    buttons=["download", "fullscreen"],
                    elem_id="result",
                )
                saved = gr.Textbox(label="Saved as", interactive=False, elem_id="saved")
                gr.HTML('<div id="pictures"></div>', elem_id="pictures-block")
            with gr.Column(elem_id="settings"):
                with gr.Row():
                    width = _number("Width", start.side, "width")
                    height = _number("Height", start.side, "height")
                use_size = gr.Checkbox(label="Use the input image's size", elem_id="use-input-size")
                with gr.Row():
                    steps = _number("Steps", start.steps, "steps")
                    quality = _choice("Quality", QUALITIES, "quality")
                with gr.Row():
                    pictures = _number(f"Pictures (up to {MAX_PICTURES})", 1, "pictures-count")
                    seed = _number("Seed", 0, "seed")
                with gr.Row():
                    randomize = gr.Checkbox(
                        label="Random seed", value=True, elem_id="randomize", min_width=110
                    )
                    seeds = gr.Textbox(
                        label="Or a list of seeds",
                        placeholder="1, 2, 3",
                        elem_id="seeds",
                        min_width=110,
                    )
                with gr.Row():
                    guidance = _number("Guidance scale", start.guidance_scale, "guidance", 0.1)
                    image_guidance = _number(
                        "Image guidance scale", start.img_guidance_scale, "img-guidance", 0.1
                    )
                largest = _number("Max input image size", start.side, "max-input-size")
                offered = [NONE, *actions.loras.offered]
                with gr.Row(visible=len(offered) > 1):
                    lora = _choice("LoRA", offered, "lora")
                    strength = _number("LoRA strength", 1, "lora-strength", 0.1)
                with gr.Accordion("Negative prompt", open=False, elem_id="negative-section"):
                    negative = gr.Textbox(
                        value=DEFAULT_NEGATIVE_PROMPT,
                        label="Negative prompt",
                        lines=3,
                        elem_id="negative",
                    )
                with gr.Accordion("Memory", open=False, elem_id="memory-section"):
                    memory = gr.Dropdown(
                        _MEMORY,
                        value="auto",
                        allow_custom_value=True,
                        label="How much to use",
                        info=_about_memory(actions.limit),
                        elem_id="memory",
                    )
                    plan = gr.Button("What would this request take?", elem_id="plan")
                    table = gr.HTML(elem_id="plans")
                    gr.Markdown(_LEGEND, elem_id="legend")
                load = gr.UploadButton(
                    "Load settings from a picture", file_types=_CARRIERS, elem_id="load"
                )
        gr.HTML(_examples(start.examples), elem_id="examples")
        with gr.Accordion("Tips", open=False, elem_id="tips"):
            gr.Markdown(TIPS)
        mask = Picture(visible=False)
        made = gr.Textbox(visible="hidden", elem_id="made")
        chosen = gr.Number(visible=False)
        use, settings, fill = (
            gr.Button(visible="hidden", elem_id=f"do-{name}")
            for name in ("use", "settings", "fill")
        )
        fields = [
            *(prompt, *images, height, width, guidance, image_guidance, steps, seed),
            *(randomize, largest, use_size, negative, memory, quality),
            *(mask, blur, pictures, seeds, lora, strength),
        ]
        outputs = [status, result, seed, saved, generate, stop, made]
        limits = {"concurrency_limit": None, **_HIDDEN}
        send = "(...values) => omnigen.send(values)"
        generate.click(actions.generate, fields, outputs, js=send, **limits)
        fill.click(
            partial(actions.example, start),
            chosen,
            [prompt, *images, guidance, use_size],
            js="() => [omnigen.chosen]",
            queue=False,
            **_HIDDEN,
        ).then(None, js="() => omnigen.toTheTop()", **_HIDDEN)
        stop.click(actions.stop, queue=False, **_HIDDEN)
        plan.click(actions.plans, fields, [table, status], js=send, **limits)
        blocks.unload(actions.stop)  # the page was closed
        quality.input(partial(actions.steps_of, start), quality, steps, queue=False, **_HIDDEN)
        load.upload(actions.load, load, [status, *fields], **limits).then(
            None, js="() => omnigen.toTheTop()", **_HIDDEN
        )
        named = [prompt, *images]
        for i, image in enumerate(images, 1):
            for event, act in ((image.upload, "uploaded"), (image.clear, "cleared")):
                event(None, named, named, js=f"(...v) => omnigen.{act}({i}, v)", **_HIDDEN)
        images[0].change(None, images[0], js="(image) => omnigen.maskOf(image)", **_HIDDEN)
        made.change(None, made, js="(text) => omnigen.made(text)", **_HIDDEN)
        use.click(None, named, named, js="(...v) => omnigen.asInput(v)", **_HIDDEN)
        settings.click(None, fields, fields, js="(...v) => omnigen.settings(v)", **_HIDDEN)
        changes = [field.change for field in fields if field is not mask]
        keep = "(...values) => omnigen.keep(values)"
        gr.on(changes, None, fields, js=keep, **_HIDDEN)
        restore = "(...values) => omnigen.restore(values)"
        blocks.load(None, fields, fields, js=restore, **_HIDDEN)
    return blocks


def theme() -> gr.Theme:
    """Gradio's, without the font that it loads from Google, and with enough contrast."""
    plain = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    dark, darker = "*primary_700", "*primary_800"
    return plain.set(
        button_primary_background_fill=dark,
        button_primary_background_fill_dark=dark,
        button_primary_background_fill_hover=darker,
        button_primary_background_fill_hover_dark=darker,
    )


def head(actions: Actions) -> str:
    """The page's script, and what it needs to know."""
    names = json.dumps([actions.model, *actions.loras.offered, *NAMES])
    known = {"names": NAMES, "key": hashlib.sha256(names.encode()).hexdigest()[:16]}
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    return f"<script>const OMNIGEN = {json.dumps(known)};\n{script}</script>"


def calls(blocks: gr.Blocks, examples: int) -> dict[int, Call]:
    """What the page's buttons send, by the number of the action."""
    known = Kind(f"one of {', '.join(QUALITIES)}", lambda value: value in QUALITIES)
    fields: dict[str, Mapping[str, Kind]] = {
        "generate": _FIELDS,
        "plans": _FIELDS,
        "stop": {},
        "load": {"picture": IMAGE},
        "steps_of": {"quality": known},
        "example": {"example": choice(examples)},
    }
    found = {}
    for number, function in blocks.fns.items():
        if function.fn is None or any(event == "unload" for _, event in function.targets):
            continue  # of the browser alone, or Gradio's own when a page is closed
        action = getattr(function.fn, "func", function.fn)
        found[number] = Call(function.queue, fields[action.__name__])
    return found


def _start(actions: Actions) -> Gallery:
    """What the page starts with: the model's own settings, where it has some."""
    start, own = gallery(actions.model), actions.pipe.defaults
    return replace(
        start,
        side=min(int(own.get("height", start.side)), actions.pipe.config.max_image_side),
        steps=int(own.get("num_inference_steps", start.steps)),
        guidance_scale=own.get("guidance_scale", start.guidance_scale),
        img_guidance_scale=own.get("img_guidance_scale", start.img_guidance_scale),
    )


def _heading(actions: Actions) -> str:
    precision = actions.pipe.engine.precision
    parts = [f"<code>{html.escape(actions.model)}</code> on {actions.pipe.device}"]
    parts += [f"{actions.dtype}, weights in {precision.storage}"]
    return f"<h1>OmniGen</h1><p>{', '.join(parts)}</p>"


def _about_memory(limit: int | None) -> str:
    most = f", {limit / (1 << 30):.3g} GiB at most" if limit else ""
    return f"auto: the free memory{most}; or an amount such as 8GiB"


def _number(label: str, value: float, name: str, step: float = 1) -> gr.Number:
    # without limits: the request's own checks report errors
    return gr.Number(value, label=label, step=step, elem_id=name, min_width=110)


def _choice(label: str, values: Any, name: str) -> gr.Dropdown:
    return Choice(list(values), value=values[0], label=label, elem_id=name, min_width=110)


def _examples(examples: tuple[Example, ...]) -> str:
    """A list of buttons: a click fills the fields."""
    items = []
    for i, one in enumerate(examples):
        pictures = "".join(f'<img src="{_thumbnail(path)}" alt="">' for path in one.images)
        text = f"<span>{html.escape(one.prompt)}</span>"
        items.append(f'<li><button type="button" data-example="{i}">{pictures}{text}</button></li>')
    return f"<h2>Examples: a click fills the fields</h2><ul>{''.join(items)}</ul>"


def _thumbnail(path: Path) -> str:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    written = io.BytesIO()
    small.save(written, "jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}"
