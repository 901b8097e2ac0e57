"""Subjects from images, put together in one new picture."""

from omnigen_fast import OmniGenPipeline
from omnigen_fast.page.demo import INPUTS

pipe = OmniGenPipeline.from_pretrained("shapes")
size = {"height": 128, "width": 128, "num_inference_steps": 25}
(subject,) = pipe(
    prompt="Draw the object in <img><|image_1|></img> at the top left and a small green circle "
    "at the bottom right, meadow background.",
    input_images=[INPUTS / "star.png"],
    **size,
    guidance_scale=2.5,
    img_guidance_scale=1.6,
    seed=0,
)
subject.save("subject.png")

(composition,) = pipe(
    prompt="The object of <img><|image_1|></img> on the background of <img><|image_2|></img>",
    input_images=[INPUTS / "star.png", INPUTS / "checkered.png"],
    **size,
    guidance_scale=2.5,
    img_guidance_scale=1.6,
    seed=0,
)
composition.save("composition.png")
