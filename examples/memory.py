"""Less memory: let the planner choose for a budget, or set the original's switches."""

from omnigen_fast import OmniGenPipeline

call = {
    "prompt": "a large pink square at the bottom left on a gray background",
    "height": 128,
    "width": 128,
    "num_inference_steps": 25,
    "seed": 0,
}
pipe = OmniGenPipeline.from_pretrained("shapes", memory="3GiB")  # "auto": what is free
(image,) = pipe(**call)
print(pipe.summary())
image.save("memory.png")

(same,) = pipe(**call, offload_model=True, separate_cfg_infer=True)
print(pipe.summary())
same.save("memory_switches.png")
