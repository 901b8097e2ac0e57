"""A request to the bundled model, for what compares latents of two ways to run it."""

from __future__ import annotations

# Prompts that say all: another's picture turns on the last bit of a rounding.
STATED_REQUEST = {
    "prompt": [
        "A small red circle at the top left on a white background.",
        "A large yellow star at the bottom right on a black background.",
        "A large blue triangle at the top left and a small red star at the bottom right "
        "on a meadow background.",
        "A large purple square at the top right and a small green circle at the bottom "
        "left on a gray background.",
    ],
    "height": 64,
    "width": 64,
    "num_inference_steps": 10,
    "seed": 3,
    "progress": False,
    "output_type": "latent",
}
