"""diffusers' own pipeline, with its call and its schedulers, on this runtime.

`python examples/with_diffusers.py MODEL`: a folder or hub id in diffusers' layout, such as
Shitao/OmniGen-v1-diffusers.
"""

import sys

import torch
from diffusers import OmniGenPipeline

import omnigen_fast

pipe = OmniGenPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
omnigen_fast.enable(pipe)
image = pipe(
    prompt="A curly-haired man in a red shirt is drinking tea.",
    height=256,
    width=256,
    guidance_scale=2.5,
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("with_diffusers.png")
print(omnigen_fast.summary(pipe))
