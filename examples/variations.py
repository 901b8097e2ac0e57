"""More pictures of one prompt; its condition is computed once, and kept for the next call."""

import time

from omnigen_fast import OmniGenPipeline

pipe = OmniGenPipeline.from_pretrained("shapes")
call = {
    "prompt": "a small yellow star at the top left on a black background",
    "height": 128,
    "width": 128,
    "num_inference_steps": 25,
}
for number, image in enumerate(pipe(**call, num_images_per_prompt=4, seed=0), 1):
    image.save(f"variation_{number}.png")

for seed in (1, 2):
    start = time.perf_counter()
    (image,) = pipe(**call, seed=seed)
    print(f"seed {seed}: {time.perf_counter() - start:.2f} s")
    image.save(f"variation_seed_{seed}.png")
