"""A callback after each step: watch the latents, change them, or stop."""

import torch

from omnigen_fast import OmniGenPipeline


def after_step(pipe: OmniGenPipeline, step: int, time: float, tensors: dict) -> dict:
    latents: torch.Tensor = tensors["latents"]  # [pictures, 4, height / 8, width / 8], float32
    print(f"step {step + 1}, t = {time:.3f}: deviation {latents.std():.3f}")
    if step == 19:
        pipe._interrupt = True  # this was the last step, as in diffusers
    return {}


pipe = OmniGenPipeline.from_pretrained("shapes")
(image,) = pipe(
    prompt="a small blue circle at the bottom right on a striped background",
    height=128,
    width=128,
    num_inference_steps=25,
    seed=0,
    callback_on_step_end=after_step,
    progress=False,
)
image.save("stopped.png")
