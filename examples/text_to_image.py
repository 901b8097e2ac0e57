"""A picture from words alone."""

from omnigen_fast import OmniGenPipeline

# The bundled model. For photographs: "Shitao/OmniGen-v1", and 1024 for both sides.
pipe = OmniGenPipeline.from_pretrained("shapes")
(image,) = pipe(
    prompt="A large blue triangle at the top left and a small red star at the bottom right "
    "on a meadow background.",
    height=128,
    width=128,
    num_inference_steps=25,
    guidance_scale=2.5,  # 2 to 3 is usual; less if colours are too strong
    seed=0,
)
image.save("text_to_image.png")
