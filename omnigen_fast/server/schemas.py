"""What clients send and get, as OpenAI's image API has it, and what we add to it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import brief
from .errors import ApiError, error

_LONGEST = 1 << 20  # characters of a text; the pipeline checks prompts by its own bounds
Size = Annotated[str, Field(pattern=r"^(auto|[0-9]{2,5}x[0-9]{2,5})$", max_length=11)]
Text = Annotated[str, Field(max_length=_LONGEST)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Interval = Annotated[list[Finite], Field(min_length=2, max_length=2)]


class Common(BaseModel):
    """What generations and edits have in common."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: Text = Field(description="What to draw, or how to change the images.")
    model: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="The name that /v1/models gives."
    )
    n: Annotated[int, Field(ge=1, le=10)] | None = Field(1, description="How many pictures.")
    size: Size | None = Field(
        None, description="WIDTHxHEIGHT, multiples of 16, or auto.", examples=["1024x1024"]
    )
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = Field(
        None, description="high computes every step, medium and low fewer; see fewer-steps.md."
    )
    background: Literal["auto", "opaque"] | None = Field(None, description="No transparency.")
    moderation: Literal["auto", "low"] | None = Field(None, description="Without effect.")
    style: Literal["vivid", "natural"] | None = Field(None, description="Without effect.")
    user: Annotated[str, Field(max_length=256)] | None = Field(None, description="Not kept.")
    response_format: Literal["b64_json"] | None = Field(None, description="No URLs are made.")
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="Quality of jpeg and webp in percent."
    )
    stream: bool | None = Field(False, description="Answer with server-sent events.")
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = Field(
        0, description="How many previews a stream has."
    )
    # Extensions: arguments of a call of the pipeline
    negative_prompt: Text | None = None
    num_inference_steps: int | None = None
    guidance_scale: Finite | None = None
    use_img_guidance: bool | None = None
    img_guidance_scale: Finite | None = None
    max_input_image_size: int | None = None
    seed: int | None = None
    height: int | None = None
    width: int | None = None
    guidance_interval: Interval | None = None
    image_guidance_interval: Interval | None = None
    solver: Annotated[str, Field(max_length=32)] | None = None
    time_shift: Finite | None = None
    timesteps: Annotated[list[Finite], Field(max_length=1000)] | None = None
    reuse: Annotated[str, Field(max_length=32)] | Finite | None = None
    separate_cfg_infer: bool | None = None
    use_kv_cache: bool | None = None
    offload_kv_cache: bool | None = None
    offload_model: bool | None = None


class Generation(Common):
    """The body of POST /v1/images/generations."""


class Edit(Common):
    """The fields of POST /v1/images/edits, besides its files."""

    input_fidelity: Literal["high", "low"] | None = Field(None, description="Without effect.")
    mask_blur: int | None = None
    strength: Finite | None = None
    use_input_image_size_as_output: bool | None = None


EXTENSIONS = (
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "use_img_guidance",
    "img_guidance_scale",
    "max_input_image_size",
    "seed",
    "height",
    "width",
    "guidance_interval",
    "image_guidance_interval",
    "solver",
    "time_shift",
    "timesteps",
    "reuse",
    "separate_cfg_infer",
    "use_kv_cache",
    "offload_kv_cache",
    "offload_model",
    "mask_blur",
    "strength",
    "use_input_image_size_as_output",
)


class Picture(BaseModel):
    b64_json: str


class TokensDetails(BaseModel):
    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    input_tokens: int
    input_tokens_details: TokensDetails
    output_tokens: int
    total_tokens: int


class Images(BaseModel):
    """The answer."""

    created: int
    data: list[Picture]
    background: Literal["opaque"]
    output_format: Literal["png", "jpeg", "webp"]
    quality: str
    size: str
    usage: Usage
    seed: int | None = Field(description="An extension: makes the same pictures again.")


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class Models(BaseModel):
    object: Literal["list"]
    data: list[Model]


class ErrorDetails(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    """Every refusal and failure."""

    error: ErrorDetails


class Health(BaseModel):
    status: str


def parse_json(kind: type[Generation], body: bytes) -> Generation:
    """The body of a request; raises ApiError unless it is one."""
    try:
        return kind.model_validate_json(body, strict=True)
    except ValidationError as failure:
        raise _refused(failure) from None


def parse_fields(kind: type[Edit], fields: dict[str, Any]) -> Edit:
    """The fields of a form, which are all text; raises ApiError unless they fit."""
    try:
        return kind.model_validate(fields)
    except ValidationError as failure:
        raise _refused(failure) from None


def _refused(failure: ValidationError) -> ApiError:
    first = failure.errors(include_url=False)[0]
    param = str(first["loc"][0])[:64] if first["loc"] else None
    kind, given = first["type"], first.get("input")
    if kind == "json_invalid":
        return error("invalid_body", f"the body is not JSON: {first['msg']}")
    if param is None:
        return error("invalid_body", 'the body must be a JSON object such as {"prompt": "a cat"}')
    if kind == "extra_forbidden":
        return error("unknown_parameter", f"there is no parameter {brief(param)}", param=param)
    if kind == "missing":
        return error("invalid_value", f"{param} is missing; give it", param=param)
    if param == "response_format":
        text = "response_format must be b64_json: this server keeps no pictures and makes no URLs"
        return error("invalid_value", text, param=param)
    if param == "background" and given == "transparent":
        text = "background can't be transparent: the model makes opaque pictures; leave it out"
        return error("invalid_value", text, param=param)
    expected = re.sub(r"^(Input|String|List) should", "should", first["msg"])
    expected = re.sub(r"^should be a valid", "must be a valid", expected)
    expected = re.sub(r"^should", "must", expected)
    return error("invalid_value", f"{param} {expected}, got {brief(given)}", param=param)
