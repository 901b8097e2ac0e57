"""The nodes, in ComfyUI's V3 schema; `omnigen-fast comfyui install` makes ComfyUI load them."""

from __future__ import annotations

from typing import Any

import folder_paths
import numpy as np
import torch
from comfy import model_management
from comfy_api.latest import ComfyExtension, io

from ..fewer_steps import QUALITIES
from ..forms import FORMS
from ..images import to_rgb
from ..memory.overview import report
from ..page.demo import INPUTS
from ..precision import ATTENTIONS, AUTO, CACHED, COMPUTES
from ..request import DEFAULT_NEGATIVE_PROMPT, MAX_BLUR, MAX_STEPS
from .call import call_arguments, comfy_images
from .memory import potential_budget, reserve
from .models import (
    LORAS,
    OF_DTYPE,
    OWN,
    Model,
    find_model,
    fingerprint,
    load,
    local_models,
    model_names,
    register_folder,
)
from .watch import Watch

CATEGORY = "OmniGen"
IMAGES = 3  # inputs of a node
_SIDE = 3072  # pixels that the released model's position table covers
_DTYPES = ["bfloat16", "float32"]
_MODEL = io.Custom("OMNIGEN_FAST_MODEL")


class LoadModel(io.ComfyNode):
    """Opens a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OmniGenFastLoadModel",
            display_name="OmniGen: Load Model",
            category=CATEGORY,
            description="Opens an OmniGen model. Its layers are read by the first image.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=model_names(),
                    tooltip="A folder in models/omnigen, the published model (a download of "
                    "15.5 GB), or the small one that comes with omnigen_fast.",
                ),
                io.String.Input(
                    "hub_id",
                    default="",
                    tooltip="Another model on the hub, as OWNER/NAME, instead of the list.",
                ),
                io.Combo.Input(
                    "weights",
                    options=[OWN, AUTO, "bfloat16", *FORMS],
                    default=OWN,
                    tooltip="How the layers are stored. auto: the least change with all of them "
                    "on the device.",
                ),
                io.Combo.Input(
                    "compute",
                    options=[OF_DTYPE, *COMPUTES],
                    default=OF_DTYPE,
                    tooltip=f"What the layers multiply in: {OF_DTYPE}, or 8 bits for speed.",
                ),
                io.Combo.Input(
                    "dtype", options=_DTYPES, default="bfloat16", tooltip="Of the arithmetic."
                ),
                io.Combo.Input(
                    "vae_dtype", options=_DTYPES, default="float32", tooltip="Of the autoencoder."
                ),
                io.String.Input(
                    "memory",
                    default="auto",
                    tooltip="How much of the device's memory to use at most: an amount such as "
                    "8GiB, or auto for what ComfyUI has free.",
                ),
                # optional: workflows from before these two were there have neither
                io.Combo.Input(
                    "cache",
                    options=[OF_DTYPE, *CACHED],
                    default=OF_DTYPE,
                    optional=True,
                    tooltip="How the condition's keys and values are kept: in "
                    f"{OF_DTYPE}, or in 8 bits for half the memory.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(ATTENTIONS),
                    default=AUTO,
                    optional=True,
                    tooltip="Who computes that of a step: triton, this package's kernels; flash or "
                    "cudnn, PyTorch's; auto: who was fastest on this card, triton where that was "
                    "not measured.",
                ),
            ],
            outputs=[_MODEL.Output(display_name="model")],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, **_others: Any) -> Any:
        """A local model whose files have changed is opened again."""
        folder = local_models().get(model)
        return folder and fingerprint(folder)

    @classmethod
    def execute(
        cls,
        model: str,
        hub_id: str,
        weights: str,
        compute: str,
        dtype: str,
        vae_dtype: str,
        memory: str,
        cache: str = OF_DTYPE,
        attention: str = AUTO,
    ) -> io.NodeOutput:
        where = find_model(model, hub_id)
        return io.NodeOutput(
            load(where, dtype, weights, compute, vae_dtype, memory, cache, attention)
        )


class LoadLora(io.ComfyNode):
    """Adds a LoRA to a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OmniGenFastLora",
            display_name="OmniGen: LoRA",
            category=CATEGORY,
            description="Merges a LoRA into the weights; a chain of these adds up.",
            inputs=[
                _MODEL.Input("model"),
                io.Combo.Input("lora", options=folder_paths.get_filename_list(LORAS)),
                io.Float.Input("strength", default=1.0, min=-100.0, max=100.0, step=0.05),
            ],
            outputs=[_MODEL.Output(display_name="model")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str, **_others: Any) -> Any:
        """A file that has changed is read again."""
        path = folder_paths.get_full_path(LORAS, lora)
        return path and fingerprint(path)

    @classmethod
    def execute(cls, model: Model, lora: str, strength: float) -> io.NodeOutput:
        return io.NodeOutput(model.with_lora(lora, strength))


def _request_inputs() -> list[Any]:
    """Inputs that decide what a call costs."""
    return [
        _MODEL.Input("model"),
        io.String.Input(
            "prompt",
            multiline=True,
            default="",
            tooltip="Refer to images where they belong: <img><|image_1|></img>. Images that it "
            "does not name come first.",
        ),
        *(
            io.Image.Input(
                f"image_{number}",
                optional=True,
                tooltip="Of a batch, each image makes a picture of its own.",
            )
            for number in range(1, IMAGES + 1)
        ),
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip="What may change of image_1; the rest stays as it is, to the pixel.",
        ),
        *(
            io.Int.Input(side, default=1024, min=16, max=_SIDE, step=16)
            for side in ("width", "height")
        ),
        io.Boolean.Input(
            "use_input_image_size",
            default=False,
            tooltip="The size of the one input image instead; always so with a mask, or a "
            "strength below 1.",
        ),
        io.Int.Input(
            "max_input_image_size",
            default=1024,
            min=16,
            max=_SIDE,
            step=16,
            tooltip="Input images are shrunk to this many pixels a side.",
        ),
        io.Int.Input(
            "steps",
            default=0,
            min=0,
            max=MAX_STEPS,
            tooltip="0 for those of the quality: 50 for exact.",
        ),
        io.Combo.Input(
            "quality",
            options=list(QUALITIES),
            default=QUALITIES[0],
            tooltip="Below exact: less work for a picture that differs a little.",
        ),
        io.Float.Input(
            "guidance_scale",
            default=3.0,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Strength of the prompt; 2 to 3 is usual.",
        ),
        io.Float.Input(
            "img_guidance_scale",
            default=1.6,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="Strength of the input images.",
        ),
        io.Float.Input(
            "strength",
            default=1.0,
            min=0.01,
            max=1.0,
            step=0.01,
            tooltip="Below 1: starts from image_1 with noise, and leaves out the first steps.",
        ),
        io.Int.Input(
            "mask_blur",
            default=0,
            min=0,
            max=MAX_BLUR,
            tooltip="Width in pixels of the mask's seam, which lies inside the mask.",
        ),
        io.Int.Input(
            "batch_size",
            default=1,
            min=1,
            max=64,
            tooltip="Pictures of each prompt.",
        ),
        io.String.Input(
            "negative_prompt",
            multiline=True,
            default=DEFAULT_NEGATIVE_PROMPT,
            tooltip="What to steer away from.",
        ),
    ]


def _arguments(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call from what `_request_inputs` gives, the model apart."""
    given = dict(inputs)
    images = [given.pop(f"image_{number}", None) for number in range(1, IMAGES + 1)]
    return call_arguments(
        images=images,
        mask=given.pop("mask", None),
        size_of_image=given.pop("use_input_image_size"),
        num_images_per_prompt=given.pop("batch_size"),
        **given,
    )


class Generate(io.ComfyNode):
    """Makes pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OmniGenFastGenerate",
            display_name="OmniGen: Generate",
            category=CATEGORY,
            description="Makes or edits images from a prompt of text and images.",
            inputs=[
                *_request_inputs(),
                io.Int.Input(
                    "seed", default=0, min=0, max=(1 << 64) - 1, control_after_generate=True
                ),
                io.Boolean.Input(
                    "preview", default=True, tooltip="Show where each step is heading."
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image"),
                io.String.Output(
                    display_name="summary", tooltip="What it ran as, predicted and measured."
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Model, seed: int, preview: bool, **inputs: Any) -> io.NodeOutput:
        arguments = _arguments(inputs)
        loaded, pipe = model.loaded, model.pipe
        wished = potential_budget(pipe, loaded.patcher, loaded.cap)
        fastest = pipe.plan(**arguments, seed=seed, memory=wished).cost.peak_bytes
        budget = reserve(pipe, loaded.patcher, loaded.cap, fastest)
        model_management.throw_exception_if_processing_interrupted()
        model.apply_loras()
        watch = Watch(arguments, loaded.preview() if preview else None)
        images = pipe(
            **arguments,
            seed=seed,
            memory=budget,
            output_type="pt",
            callback_on_step_end=watch,
        )
        return io.NodeOutput(comfy_images(images), pipe.summary())


class Plan(io.ComfyNode):
    """Says what pictures would take."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OmniGenFastPlan",
            display_name="OmniGen: Plan",
            category=CATEGORY,
            description="Predicts memory and time of an image without making it. Connect its text "
            "to Preview Any.",
            inputs=[
                *_request_inputs(),
                io.Boolean.Input("explain", default=False, tooltip="Itemise the chosen plan."),
            ],
            outputs=[io.String.Output(display_name="plan")],
            not_idempotent=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs: Any) -> Any:
        """What is free changes from run to run."""
        return float("nan")

    @classmethod
    def execute(cls, model: Model, explain: bool, **inputs: Any) -> io.NodeOutput:
        loaded, pipe = model.loaded, model.pipe
        budget = potential_budget(pipe, loaded.patcher, loaded.cap)
        decision = pipe.plan(**_arguments(inputs), memory=budget)
        found = decision.estimate
        text = report(found.profile, found.workload, decision, found.precision, explain)
        return io.NodeOutput(text)


class ExampleImage(io.ComfyNode):
    """An input image of the bundled model, so that its workflows need no file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="OmniGenFastExampleImage",
            display_name="OmniGen: Example Image",
            category=CATEGORY,
            description="An input image for the bundled model. Use Load Image for your own.",
            inputs=[
                io.Combo.Input("name", options=sorted(path.stem for path in INPUTS.glob("*.png")))
            ],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        paths = {path.stem: path for path in INPUTS.glob("*.png")}
        pixels = np.asarray(to_rgb(paths[name]))
        return io.NodeOutput(torch.from_numpy(pixels / np.float32(255))[None])


class _Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadModel, LoadLora, Generate, Plan, ExampleImage]


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI asks for its nodes."""
    register_folder()
    return _Extension()
