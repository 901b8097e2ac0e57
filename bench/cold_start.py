"""Loads a checkpoint and makes a first picture, in a process of its own; prints the times as JSON.

python -m bench.cold_start FOLDER [--side 512] [--steps 50] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import time

from .cases import PROMPTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--side", type=int, default=512, help="pixels of the picture")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    start = time.perf_counter()
    from omnigen_fast import OmniGenPipeline

    pipe = OmniGenPipeline.from_pretrained(arguments.folder, device=arguments.device)
    loaded = time.perf_counter()
    side = arguments.side
    pipe(
        PROMPTS[0],
        height=side,
        width=side,
        num_inference_steps=arguments.steps,
        seed=0,
        progress=False,
    )
    end = time.perf_counter()
    print(json.dumps({"load_seconds": loaded - start, "picture_seconds": end - loaded}))


if __name__ == "__main__":
    main()
