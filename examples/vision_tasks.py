"""Masks, and a change that a pair of images shows instead of words."""

from omnigen_fast import OmniGenPipeline
from omnigen_fast.page.demo import INPUTS

pipe = OmniGenPipeline.from_pretrained("shapes")
size = {"height": 128, "width": 128, "num_inference_steps": 25}
(mask,) = pipe(
    prompt="Segment the triangle in <img><|image_1|></img>",
    input_images=[INPUTS / "circle-triangle.png"],
    **size,
    seed=0,
)
mask.save("mask.png")

(changed,) = pipe(
    prompt="<img><|image_1|></img> becomes <img><|image_2|></img>. "
    "Do the same to <img><|image_3|></img>",
    input_images=[INPUTS / f"{name}.png" for name in ("star", "yellow-star", "square")],
    **size,
    seed=0,
)
changed.save("in_context.png")
