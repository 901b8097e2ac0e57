"""Several prompts in one call, with no image and with one."""

from omnigen_fast import OmniGenPipeline
from omnigen_fast.page.demo import INPUTS

pipe = OmniGenPipeline.from_pretrained("shapes")
images = pipe(
    prompt=[
        "a large green circle at the top right on a white background",
        "<img><|image_1|></img> Move the star to the top right.",
    ],
    input_images=[[], [INPUTS / "star.png"]],
    height=128,
    width=128,
    num_inference_steps=25,
    seed=0,
)
for number, image in enumerate(images, 1):
    image.save(f"batch_{number}.png")
