"""An edit: the image first, then the instruction, and an output of the input's size."""

from omnigen_fast import OmniGenPipeline
from omnigen_fast.page.demo import INPUTS

pipe = OmniGenPipeline.from_pretrained("shapes")
instructions = [
    "Make the triangle purple.",
    "Remove the circle.",
    "Change the background to white.",
]
for number, instruction in enumerate(instructions, 1):
    (image,) = pipe(
        prompt=f"<img><|image_1|></img> {instruction}",
        input_images=[INPUTS / "circle-triangle.png"],
        use_input_image_size_as_output=True,
        num_inference_steps=25,
        guidance_scale=2.5,
        img_guidance_scale=1.6,  # how closely the picture keeps to the image
        seed=0,
    )
    image.save(f"edit_{number}.png")
