"""Bad input gets one clear line before any weight is touched; odd but good input works."""

from __future__ import annotations

import io
import re
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from golden_cases import GOLDEN, TINY
from PIL import Image

from omnigen_fast import RequestError

SMALL = {"height": 32, "width": 32, "num_inference_steps": 1, "progress": False}
ONE = "<img><|image_1|></img> Remove the cup."
CAT = GOLDEN / "images" / "cat.png"


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def lying_png(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 64)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, part) for kind, part in ((b"IHDR", header), (b"IDAT", data), (b"IEND", b""))
    )


PICTURE = Image.new("RGB", (32, 48), (200, 30, 60))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))


def bad(id: str, *parts: str, **arguments):
    """A call that must fail, and what its message must hold."""
    return pytest.param(arguments, parts, id=id)


def image(id: str, source, *parts: str, **arguments):
    return bad(id, "input_images[0]", *parts, prompt=ONE, input_images=[source], **arguments)


def latents(*shape: int, dtype: torch.dtype = torch.float32, fill: float = 0.0):
    return torch.full(shape, fill, dtype=dtype)


SIZES = [
    bad("height-not-of-16", "height", "100", "multiple of 16", "96 and 112", height=100),
    bad("width-not-of-16", "width", "multiple of 16", "17", "16 and 32", width=17),
    bad("height-beyond-table", "height", "16 to 768 pixels", "784", height=784),
    bad("width-beyond-table", "width", "16 to 768 pixels", "100000", width=100_000),
    bad("height-zero", "height", "16 to 768", "got 0", height=0),
    bad("width-negative", "width", "16 to 768", "got -64", width=-64),
    bad("height-float", "height must be an integer", "64.5", height=64.5),
    bad("height-bool", "height must be an integer", "True", height=True),
    bad("height-text", "height must be an integer", "'64'", height="64"),
    bad("height-none", "height must be from 16 to 768", "got 1024", height=None),
    bad("width-none", "width must be from 16 to 768", "got 1024", width=None),
    bad("height-inf", "height must be an integer", "inf", height=float("inf")),
    bad("height-nan", "height must be an integer", "nan", height=float("nan")),
    bad("height-enormous", "16 to 768 pixels", "an enormous int", height=10**5000),
    bad("height-array", "height must be an integer", "array(", height=np.zeros((3, 3))),
    bad("height-long", "height must be an integer", "'xxx", "...", height="x" * 10_000),
]
PROMPTS = [
    bad("empty", "prompt is empty", "say what to draw", prompt=""),
    bad("blank", "prompt is empty", prompt=" \t\n"),
    bad("blank-in-batch", "prompt[1] is empty", prompt=["A cat.", ""]),
    bad("empty-list", "prompt is an empty list", "at least one", prompt=[]),
    bad("number", "prompt must be a string or a list of strings", "int", prompt=7),
    bad("none", "prompt must be a string", "NoneType", prompt=None),
    bad("bytes", "prompt must be a string", "bytes", prompt=b"A cat."),
    bad("number-in-batch", "prompt[1] must be a string", "int", prompt=["A cat.", 7]),
    bad("nested", "prompt[0] must be a string", "list", prompt=[["A cat."]]),
    bad("too-long", "shorten the prompt", "131072 positions", prompt="cat " * 70_000),
    bad(
        "far-too-long", "prompt has 2,000,000 characters, at most 1,048,576", prompt="x" * 2_000_000
    ),
    bad(
        "far-too-long-negative",
        "negative_prompt has 2,000,000 characters",
        negative_prompt="x" * 2_000_000,
    ),
    bad("half-a-character", "prompt holds '\\ud800' at 2", "UTF-8", prompt="a \ud800 cat"),
    bad("half-in-negative", "negative_prompt holds '\\udcff'", negative_prompt="\udcff"),
]
TAGS = [
    bad("no-image", "names image 1", "input_images has none", "remove", prompt=ONE),
    bad("no-image-in-batch", "prompt[1] names image 1", prompt=["A cat.", ONE]),
    bad(
        "fewer-images",
        "names image 2",
        "input_images has 1",
        prompt=ONE + "<img><|image_2|></img>",
        input_images=[PICTURE],
    ),
    bad(
        "image-not-named",
        "has 1 image(s) but names 0",
        "add <img><|image_1|></img>",
        input_images=[PICTURE],
    ),
    bad(
        "second-image-not-named",
        "has 2 image(s) but names 1",
        "add <img><|image_2|></img>",
        prompt=ONE,
        input_images=[PICTURE, PICTURE],
    ),
    bad(
        "gap",
        "names images [1, 3]",
        "1 to 2 without a gap",
        prompt=ONE + "<img><|image_3|></img>",
        input_images=[PICTURE] * 2,
    ),
    bad(
        "zero",
        "names images [0]",
        "1 to 1",
        prompt="<img><|image_0|></img>",
        input_images=[PICTURE],
    ),
    bad(
        "zero-and-one",
        "names images [0, 1]",
        "1 to 2",
        prompt=ONE + "<img><|image_0|></img>",
        input_images=[PICTURE] * 2,
    ),
    bad("no-number", "stray <|image_", "write each image as", prompt="<|image_|> a cat"),
    bad("no-numeral", "stray <|image_", prompt="the cat <|image_x|>"),
    bad("negative-number", "stray <|image_", prompt="the cat <|image_-1|>"),
    bad("half-a-tag", "stray <|image_1", prompt="<img><|image_1></img>", input_images=[PICTURE]),
    bad(
        "far-gap",
        "names images [1, 999999999]",
        "1 to 2 without a gap",
        prompt=ONE + "<img><|image_999999999|></img>",
        input_images=[PICTURE] * 2,
    ),
    bad(
        "number-of-5000-digits",
        "a number of 5000 digits",
        prompt=f"<img><|image_{'9' * 5000}|></img>",
        input_images=[PICTURE],
    ),
    bad(
        "in-negative", "negative_prompt holds <|image_1|>", "can't name images", negative_prompt=ONE
    ),
    bad("bare-in-negative", "negative_prompt holds <|image_1|>", negative_prompt="<|image_1|>"),
]
LISTS = [
    bad(
        "images-short",
        "2 prompts but 1 lists of input_images",
        "[] where it has no image",
        prompt=["A cat.", "A dog."],
        input_images=[[]],
    ),
    bad("images-long", "1 prompts but 2 lists", prompt=[ONE], input_images=[[PICTURE], []]),
    bad("images-flat", "must be a list of lists", prompt=[ONE], input_images=[PICTURE]),
    bad("images-alone", "must be a list of lists", prompt=[ONE], input_images=PICTURE),
    bad("images-dict", "must be a list of lists", prompt=[ONE], input_images={0: PICTURE}),
    bad("images-nested", "one flat list", prompt=ONE, input_images=[[PICTURE]]),
    bad("negatives-short", "1 negative prompts for 2", prompt=["a", "b"], negative_prompt=["c"]),
    bad("negatives-long", "2 negative prompts for 1", "give one", negative_prompt=["c", "d"]),
    bad("negatives-empty", "0 negative prompts for 1", negative_prompt=[]),
    bad("negative-number", "negative_prompt must be a string", "int", negative_prompt=3),
    bad("negative-number-in-list", "must be a string, got int", negative_prompt=[3]),
]
NUMBERS = [
    bad("steps-zero", "num_inference_steps", "1 to 1000", "got 0", num_inference_steps=0),
    bad("steps-negative", "num_inference_steps", "got -1", num_inference_steps=-1),
    bad("steps-many", "num_inference_steps", "got 1001", num_inference_steps=1001),
    bad("steps-float", "num_inference_steps must be an integer", num_inference_steps=2.5),
    bad("steps-bool", "num_inference_steps must be an integer", num_inference_steps=True),
    bad("images-zero", "num_images_per_prompt", "1 to 1024", num_images_per_prompt=0),
    bad("images-many", "num_images_per_prompt", "got 1000000", num_images_per_prompt=10**6),
    bad(
        "images-many-in-all",
        "2 prompts with 1000 images each",
        "several calls",
        prompt=["a", "b"],
        num_images_per_prompt=1000,
    ),
    bad("guidance-nan", "guidance_scale must be a finite", "nan", guidance_scale=float("nan")),
    bad("guidance-inf", "guidance_scale must be a finite", "inf", guidance_scale=float("inf")),
    bad("guidance-text", "guidance_scale must be a finite number", "'3'", guidance_scale="3"),
    bad("guidance-none", "guidance_scale must be a finite number", "None", guidance_scale=None),
    bad("guidance-complex", "guidance_scale must be a finite number", guidance_scale=3 + 1j),
    bad("guidance-enormous", "guidance_scale must be a finite", guidance_scale=10**400),
    bad("guidance-tensor", "guidance_scale must be a finite", guidance_scale=torch.ones(2)),
    bad("image-guidance-inf", "img_guidance_scale", "-inf", img_guidance_scale=-float("inf")),
    bad("image-guidance-bool", "img_guidance_scale", "True", img_guidance_scale=True),
    bad("input-size-small", "max_input_image_size", "from 16", "15", max_input_image_size=15),
    bad("input-size-float", "max_input_image_size must be an int", max_input_image_size=64.5),
    bad("seed-float", "seed must be an integer", "1.5", seed=1.5),
    bad("seed-large", "seed must be from", "18446744073709551616", seed=1 << 64),
    bad("seed-text", "seed must be an integer", "'lucky'", seed="lucky"),
]
KINDS = [
    bad("float16", "float16 overflows", "use bfloat16 or float32", dtype=torch.float16),
    bad("float16-text", "float16 overflows", "use bfloat16 or float32", dtype="float16"),
    bad("half", "float16 overflows", dtype="half"),
    bad("float64", "must be bfloat16 or float32", "float64", dtype=torch.float64),
    bad("dtype-unknown", "must be bfloat16 or float32", "'bf17'", dtype="bf17"),
    bad("dtype-module", "must be bfloat16 or float32", "'nn'", dtype="nn"),
    bad("dtype-number", "must be bfloat16 or float32", "16", dtype=16),
    bad("output-unknown", "one of pil, pt, np, latent", "'jpeg'", output_type="jpeg"),
    bad("output-none", "one of pil, pt, np, latent", "None", output_type=None),
    bad("output-array", "one of pil, pt, np, latent", output_type=np.zeros(3)),
    bad("dtype-array", "must be bfloat16 or float32", dtype=np.zeros(3)),
    bad("guidance-enormous", "guidance_scale must be from", "1e+20", guidance_scale=1e20),
    bad("image-guidance-enormous", "-1000 to 1000", "-1001", img_guidance_scale=-1001),
    bad("switch-text", "use_img_guidance must be True or False", "'no'", use_img_guidance="no"),
    bad("switch-number", "use_kv_cache must be True or False", "2", use_kv_cache=2),
    bad("switch-list", "separate_cfg_infer must be", "[]", separate_cfg_infer=[]),
    bad(
        "switch-none",
        "use_input_image_size_as_output must be",
        "None",
        use_input_image_size_as_output=None,
    ),
    bad("callback-number", "must be a function", "int", callback_on_step_end=5),
    bad("callback-inputs-none", "['latents']", callback_on_step_end_tensor_inputs=None),
    bad("callback-inputs-text", "'latents'", callback_on_step_end_tensor_inputs="latents"),
    bad(
        "callback-inputs",
        "callback_on_step_end_tensor_inputs",
        "latents",
        "prompt_embeds",
        callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
    ),
]
RANDOM = [
    bad("seed-and-generator", "seed or generator, not both", seed=1, generator=torch.Generator()),
    bad(
        "generators-few",
        "1 generators for 2 images",
        "one for each",
        num_images_per_prompt=2,
        generator=[torch.Generator()],
    ),
    bad("generators-none", "0 generators for 1 images", generator=[]),
    bad("generator-number", "must be a torch.Generator", "got int", generator=5),
    bad("generator-numpy", "must be a torch.Generator", generator=np.random.default_rng()),
    bad("latents-shape", "(1, 4, 4, 4)", "(1, 4, 4, 6)", latents=latents(1, 4, 4, 6)),
    bad("latents-batch", "(1, 4, 4, 4)", "(2, 4, 4, 4)", latents=latents(2, 4, 4, 4)),
    bad("latents-dims", "(1, 4, 4, 4)", "(4, 4, 4)", latents=latents(4, 4, 4)),
    bad("latents-nan", "latents hold NaN", latents=latents(1, 4, 4, 4, fill=float("nan"))),
    bad("latents-inf", "infinity", latents=latents(1, 4, 4, 4, fill=float("inf"))),
    bad(
        "latents-overflow", "infinity", latents=latents(1, 4, 4, 4, dtype=torch.float64, fill=1e300)
    ),
    bad("latents-numpy", "latents must be", "ndarray", latents=np.zeros((1, 4, 4, 4))),
    bad("latents-integer", "floating-point", "int64", latents=latents(1, 4, 4, 4).long()),
    bad("latents-float8", "float8", latents=latents(1, 4, 4, 4).to(torch.float8_e4m3fn)),
    bad("latents-sparse", "dense", "sparse", latents=latents(1, 4, 4, 4).to_sparse()),
    bad("latents-meta", "meta", latents=latents(1, 4, 4, 4).to("meta")),
]
SAME_SIZE = [
    bad("without-image", "0 image(s)", "height and width", use_input_image_size_as_output=True),
    bad(
        "two-images",
        "needs one prompt with one image",
        "2 image(s)",
        prompt=ONE + "<img><|image_2|></img>",
        input_images=[PICTURE] * 2,
        use_input_image_size_as_output=True,
    ),
    bad(
        "two-prompts",
        "2 prompt(s)",
        prompt=[ONE, "A cat."],
        input_images=[[PICTURE], []],
        use_input_image_size_as_output=True,
    ),
]
FILES = [
    image("missing", "/no/such/cat.png", "/no/such/cat.png does not exist", "give the path"),
    image("folder", str(GOLDEN), "is a folder", "give the path"),
    image("empty-path", "", "does not exist"),
    image("nul-in-path", "cat\0.png", "does not exist"),
    image("url", "https://example.org/cat.png", "web addresses are not fetched", "download"),
    image("url-plain", "http://example.org/cat.png", "web addresses are not fetched"),
    image("text-file", __file__, "is not an image", "use PNG, JPEG"),
    image("python-object", object(), "a path, bytes, a binary file, a PIL image", "object"),
    bad("none", "names image 1", "has none for it", prompt=ONE, input_images=[None]),
    image("number", 3, "a numpy array or a tensor", "int"),
    image("empty-bytes", b"", "is not an image"),
    image("garbage", b"\x00" * 4096, "is not an image"),
    image("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image"),
    image("postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
    image("signature-alone", b"\x89PNG\r\n\x1a\n", "input_images[0]"),
    image("truncated-png", encoded(NOISE)[:6000], "damaged or cut short", "again"),
    image("truncated-jpeg", encoded(NOISE, "JPEG")[:1500], "damaged or cut short", "again"),
    image("truncated-webp", encoded(NOISE, "WEBP")[:900], "input_images[0]", "again"),
    image("truncated-gif", encoded(NOISE, "GIF")[:2000], "damaged or cut short"),
    image("truncated-tiff", encoded(NOISE, "TIFF")[:900], "input_images[0]", "again"),
    image("damaged-png", encoded(NOISE)[:3000] + b"\xff" * 64 + encoded(NOISE)[3064:], "damaged"),
    image("closed", Image.open(CAT), "is closed", "hand it over open"),
    image("bomb-by-header", lying_png(50_000, 50_000), "pixels", "89,478,485", "shrink it"),
    image("bomb-by-header-slight", lying_png(9_460, 9_460), "9460 x 9460", "89,478,485"),
    image("bomb", encoded(Image.new("1", (9_500, 9_500))), "9500 x 9500", "shrink it"),
    image("bomb-array", np.broadcast_to(np.uint8(0), (10**5, 10**5)), "100000 x 100000"),
    image("no-pixels", Image.new("RGB", (0, 5)), "0 x 5 pixels"),
    image("sliver", Image.new("RGB", (1, 4000)), "16 x 16384 pixels", "768 a side; crop it"),
    image("line-break-in-path", "/no/such\ncat.png", "/no/such cat.png does not exist"),
    image(
        "beyond-table",
        Image.new("RGB", (900, 32)),
        "896 x 32 pixels after resizing",
        "at most 768",
        "max_input_image_size=768",
    ),
    bad(
        "second-image",
        "input_images[1]",
        "is not an image",
        prompt=ONE + "<img><|image_2|></img>",
        input_images=[PICTURE, b""],
    ),
    bad(
        "image-in-batch",
        "input_images[1][0]",
        "is not an image",
        prompt=["A cat.", ONE],
        input_images=[None, [b""]],
    ),
]
FILES[[param.id for param in FILES].index("closed")].values[0]["input_images"][0].close()
ARRAYS = [
    image("one-dimension", np.zeros(32, np.uint8), "[height, width]", "got 32"),
    image("two-in-one", np.zeros((2, 32, 32, 3), np.uint8), "got 2x32x32x3"),
    image("channels-first", np.zeros((3, 32, 32), np.uint8), "1, 3 or 4", "got 3x32x32"),
    image("two-channels", np.zeros((32, 32, 2), np.uint8), "1, 3 or 4", "32x32x2"),
    image("empty", np.zeros((0, 32, 3), np.uint8), "empty", "0x32x3"),
    image("int32", np.zeros((32, 32, 3), np.int32), "uint8, uint16, bool or float", "int32"),
    image("complex", np.zeros((32, 32), np.complex64), "uint8, uint16, bool or float"),
    image("objects", np.full((32, 32), None), "uint8, uint16, bool or float", "object"),
    image("texts", np.full((32, 32), "a"), "uint8, uint16, bool or float"),
    image("no-dimension", np.array(5), "[height, width]", "got a single number"),
    image("bytes-with-gaps", memoryview(b"no image")[::2], "is not an image"),
    image("float-255", np.full((32, 32, 3), 255.0), "floats must lie in [0, 1]"),
    image("float-negative", np.full((32, 32), -0.1), "floats must lie in [0, 1]"),
    image("float-nan", np.full((32, 32), np.nan), "floats must lie in [0, 1]"),
    image("float-inf", np.full((32, 32), np.inf), "floats must lie in [0, 1]"),
    image("pil-float-256", Image.new("F", (32, 32), 256.0), "from 256 to 256", "[0, 255]"),
    image("pil-float-nan", Image.new("F", (32, 32), float("nan")), "of mode F", "nan"),
    image("pil-deep", Image.new("I", (32, 32), 1 << 16), "from 65536 to 65536", "0 to 65535"),
    image("pil-below", Image.new("I", (32, 32), -1), "of mode I", "from -1 to -1"),
    image("tensor-three-or-three", torch.zeros(3, 32, 3), "first or its last", "3x32x3"),
    image("tensor-of-two-channels", torch.zeros(2, 32, 32), "as a tensor", "got 2x32x32"),
    image("tensor-of-two", torch.zeros(2, 3, 32, 32), "as a tensor", "got 2x3x32x32"),
    image("tensor-signed", torch.full((3, 32, 32), -1.0), "floats must lie in [0, 1]"),
    image("tensor-nan", torch.full((3, 32, 32), float("nan")), "floats must lie in [0, 1]"),
    image("tensor-int64", torch.zeros(3, 32, 32).long(), "uint8, uint16, bool or float"),
    image("tensor-complex", torch.zeros(32, 32, dtype=torch.complex64), "bool or float"),
    image("tensor-meta", torch.zeros(3, 32, 32, device="meta"), "a dense tensor"),
    image("tensor-sparse", torch.zeros(32, 32).to_sparse(), "a dense tensor"),
    image("tensor-empty", torch.zeros(3, 0, 32), "32 x 0 pixels"),
    image("tensor-bomb", torch.zeros(1).expand(10**5, 10**5), "100000 x 100000 pixels"),
]
BAD = [
    pytest.param(*param.values, id=f"{group}:{param.id}")
    for group, params in {
        "size": SIZES,
        "prompt": PROMPTS,
        "tag": TAGS,
        "list": LISTS,
        "number": NUMBERS,
        "kind": KINDS,
        "random": RANDOM,
        "same-size": SAME_SIZE,
        "file": FILES,
        "array": ARRAYS,
    }.items()
    for param in params
]


@pytest.fixture
def guarded(pipe, monkeypatch):
    """The shared pipeline; whatever touches a weight fails the test."""

    def touched(*_, **__):
        raise AssertionError("a weight was touched")

    for name in ("embed_times", "embed_condition", "prefill", "step", "step_recomputed", "move"):
        monkeypatch.setattr(pipe.model, name, touched)
    monkeypatch.setattr(pipe.vae, "encode", touched)
    monkeypatch.setattr(pipe.vae, "decode", touched)
    monkeypatch.setattr(pipe.engine, "load", touched)
    return pipe


def test_the_guard_guards(guarded):
    with pytest.raises(AssertionError, match="touched"):
        guarded("A cat.", **SMALL)


@pytest.mark.parametrize(("arguments", "parts"), BAD)
def test_bad_input_is_refused(guarded, arguments, parts):
    with pytest.raises(RequestError) as caught:
        guarded(**{"prompt": "A cat.", **SMALL, **arguments})
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) <= 300
    assert message.isprintable()
    for part in parts:
        assert part in message


def latent(pipe, **arguments) -> torch.Tensor:
    return pipe(
        **{
            "prompt": "A cat.",
            **SMALL,
            "seed": 0,
            "output_type": "latent",
            "max_input_image_size": 32,
            **arguments,
        }
    )


TWICE = "<img><|image_1|></img> and again <img><|image_1|></img>"
BOTH = "<img><|image_1|></img> and again <img><|image_2|></img>"


@pytest.mark.parametrize(
    ("odd", "plain"),
    [
        pytest.param(
            {
                "height": np.int64(48),
                "width": np.uint16(32),
                "num_inference_steps": np.int32(2),
                "seed": np.int64(0),
                "guidance_scale": np.float32(2.5),
                "num_images_per_prompt": np.uint8(1),
            },
            {"height": 48, "num_inference_steps": 2, "guidance_scale": 2.5},
            id="numpy-numbers",
        ),
        pytest.param({"guidance_scale": 2}, {"guidance_scale": 2.0}, id="integer-guidance"),
        pytest.param(
            {"prompt": ("A cat.", ONE), "input_images": ((), (CAT,))},
            {"prompt": ["A cat.", ONE], "input_images": [[], [CAT]]},
            id="tuples",
        ),
        pytest.param(
            {"prompt": ["A cat.", ONE], "input_images": [None, [CAT]]},
            {"prompt": ["A cat.", ONE], "input_images": [[], [CAT]]},
            id="none-in-batch",
        ),
        pytest.param(
            {"prompt": ONE, "input_images": CAT},
            {"prompt": ONE, "input_images": [CAT]},
            id="one-image-alone",
        ),
        pytest.param(
            {"prompt": ONE, "input_images": np.array(Image.open(CAT))},
            {"prompt": ONE, "input_images": [str(CAT)]},
            id="one-array-alone",
        ),
        pytest.param({"input_images": []}, {}, id="no-images"),
        pytest.param({"input_images": [None, None]}, {}, id="empty-slots-alone"),
        pytest.param(
            {"prompt": ONE, "input_images": [None, CAT, None]},
            {"prompt": ONE, "input_images": [CAT]},
            id="empty-slots",
        ),
        pytest.param(
            {"prompt": ["A cat.", ONE], "input_images": [[None], [CAT, None]]},
            {"prompt": ["A cat.", ONE], "input_images": [[], [CAT]]},
            id="empty-slots-in-batch",
        ),
        pytest.param(
            {"num_inference_steps": 2.0, "seed": 1e6, "height": 48.0, "width": np.float32(32)},
            {"num_inference_steps": 2, "seed": 1_000_000, "height": 48},
            id="whole-floats",
        ),
        pytest.param(
            {
                "prompt": ONE,
                "input_images": CAT,
                "height": None,
                "width": None,
                "use_input_image_size_as_output": True,
            },
            {
                "prompt": ONE,
                "input_images": [CAT],
                "use_input_image_size_as_output": True,
            },
            id="no-size",
        ),
        pytest.param({"prompt": ["A cat."]}, {}, id="batch-of-one"),
        pytest.param({"negative_prompt": ["ugly"]}, {"negative_prompt": "ugly"}, id="negatives"),
        pytest.param({"generator": torch.Generator}, {}, id="generator"),
        pytest.param(
            {"prompt": TWICE, "input_images": [CAT], "use_img_guidance": False},
            {"prompt": BOTH, "input_images": [CAT, CAT], "use_img_guidance": False},
            id="image-named-twice",
        ),
        pytest.param(
            {"prompt": "<img><|image_01|></img> Remove the cup.", "input_images": [CAT]},
            {"prompt": ONE, "input_images": [CAT]},
            id="leading-zero",
        ),
        pytest.param({"dtype": "float32"}, {"dtype": torch.float32}, id="dtype-text"),
    ],
)
def test_odd_input_means_what_it_says(pipe, odd, plain):
    if "generator" in odd:
        odd = {"generator": odd["generator"]().manual_seed(0), "seed": None}
    assert torch.equal(latent(pipe, **odd), latent(pipe, **plain))


TAG_TEXTS = [
    "make <|image_1|> green",
    "<img> <|image_1|>\n</img> Remove the cup.",
    "<img><|image_1|> cat",
    "<|image_1|></img><img></img>",
    "<img><img><|image_1|></img></img> and <|image_1|><|image_1|>",
    "<img> in plain text",
    "</img> a cat",
]


@pytest.mark.parametrize("text", TAG_TEXTS)
def test_tags_become_the_tokens_of_the_original(pipe, text):
    """As the original's processor: split at placeholders, every piece tokenized on its own."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(TINY / "tokenizer.json"))
    before = "<|user|>\nGenerate an image according to the following instructions\n"
    whole = before + text + "<|end|>\n<|assistant|>\n<|diffusion|>"
    expected = [1]
    for index, piece in enumerate(re.split(r"<\|image_\d+\|>", whole)):
        expected += [0] * 4 * bool(index)  # 32 x 32 pixels
        ids = theirs(piece).input_ids
        expected += ids[1:] if ids[:1] == [1] else ids
    images = [np.zeros((32, 32, 3), np.uint8)] if "<|image" in text else []
    call = pipe.make_call(text, images, height=32, width=32, seed=0)
    assert call.pictures[0][0][0].token_ids.tolist() == expected


def test_an_empty_negative_prompt_is_one(pipe):
    assert not torch.equal(latent(pipe, negative_prompt=""), latent(pipe))


def test_a_refused_call_leaves_the_pipeline_usable(pipe):
    before = latent(pipe)
    with pytest.raises(RequestError):
        pipe("A cat.", **{**SMALL, "height": 100})
    assert torch.equal(latent(pipe), before)


def test_an_image_named_thousands_of_times_is_refused_without_a_place_for_each(pipe):
    pipe.processor.clear()
    image = np.zeros((768, 768, 3), np.uint8)
    call = {"prompt": ONE * 5000, "input_images": [image], "max_input_image_size": 768}
    tracemalloc.start()
    with pytest.raises(RequestError, match=r"a prompt of 11\d{6} tokens is more than the"):
        latent(pipe, **call)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6  # as Python's integers they would take ten times that
    assert not pipe.processor._tokens.cache_info().currsize


def test_an_image_named_40000_times_is_refused_before_work(pipe):
    pipe.processor.clear()
    start = time.perf_counter()
    with pytest.raises(RequestError, match=r"its images 40,000 times, at most 1,024"):
        latent(pipe, prompt="<|image_1|>" * 40_000, input_images=[PICTURE.crop((0, 0, 16, 16))])
    assert time.perf_counter() - start < 2


LONG = [
    "data:image/png;base64," + "A" * 1_000_000,
    "x" * 1_000_000,
    "https://example.org/" + "x" * 1_000_000,
    "\x1b[31mred\0\n\r\u202e\ud800.png",
    "line\u2028separated\x85.png",
]


@pytest.mark.parametrize("source", LONG, ids=["data", "text", "address", "escapes", "lines"])
def test_any_string_gets_a_short_printable_line(pipe, source):
    with pytest.raises(RequestError, match=r"^input_images\[0\]") as caught:
        latent(pipe, prompt=ONE, input_images=[source])
    assert len(str(caught.value)) <= 300
    assert str(caught.value).isprintable()
