"""Runs the original package, in its own environment, for `original.Original`.

    PYTHON original_worker.py MODEL_FOLDER FOLDER --dtype bfloat16 --device cpu --threads 2

Imports neither omnigen_fast nor anything beside this file but the memory tracker. Model, collator,
KV cache and scheduler are the package's own; tokens and image latents come from the caller, so its
tokenizer, torchvision and timm are not needed. A line of JSON in, a line of JSON out:

    {"branches": [{"ids": [...], "spans": [[first, stop], ...]}, ...], "tensors": FILE,
     "side": 512, "steps": 8, "most": 8, "restart": false, "track": false, "settings": {...}}

Branches stand in the original's order: prompt, negative prompt, images alone.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import os
import sys
import time
import types
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GUIDANCE = ("cfg_scale", "img_cfg_scale")


class _Unused(types.ModuleType):
    """Stands in for a package whose names the original imports; calling one fails."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def import_original():
    """The package, without torchvision (its processor's) and timm (which it never uses)."""
    # these ask whether torchvision is there, and must hear that it is not
    import diffusers.loaders  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.phi3  # noqa: F401

    for name in ("torchvision", "torchvision.transforms", "timm", "timm.models"):
        sys.modules.setdefault(name, _Unused(name))
    sys.modules["timm.models.vision_transformer"] = _Unused("timm.models.vision_transformer")
    import OmniGen.model
    import OmniGen.processor
    import OmniGen.scheduler

    return OmniGen


def memory_tracker():
    path = Path(__file__).parents[1] / "tracker.py"
    spec = importlib.util.spec_from_file_location("tracker", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MemoryTracker


class _Enough(Exception):
    """So many steps were taken as were asked for."""


class Worker:
    """A loaded model, and the folder through which tensors travel."""

    def __init__(self, model_folder: str, folder: str, dtype: str, device: str) -> None:
        self.package = import_original()
        self.folder, self.device = Path(folder), torch.device(device)
        self.dtype = getattr(torch, dtype)
        from transformers import Phi3Config

        config = Phi3Config.from_pretrained(model_folder)
        state = load_file(os.path.join(model_folder, "model.safetensors"))
        places = state["pos_embed"].shape[1]
        self.model = self.package.model.OmniGen(config, pos_embed_max_size=round(places**0.5))
        self.model.load_state_dict(state)
        del state
        self.model.to(self.dtype).to(self.device).eval()
        self.collator = self.package.processor.OmniGenCollator(hidden_size=config.hidden_size)
        self.separate = self.package.processor.OmniGenSeparateCollator(
            hidden_size=config.hidden_size
        )

    def wait(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def inputs(self, task: dict, tensors: dict, separate: bool) -> dict:
        """What its processor would give: ids, masks, positions, and latents of the images."""
        features = []
        for branch in task["branches"]:
            spans = branch["spans"]
            # sizes are all that the collators read of pixels
            empty = [torch.empty(0)] * len(spans) if spans else None
            features.append(
                {"input_ids": branch["ids"], "pixel_values": empty, "image_sizes": spans or None}
            )
        size = [task["side"], task["side"]]
        cond, uncond, *image = features
        feature = (cond, uncond, image[0] if image else None, size)
        data = (self.separate if separate else self.collator)([feature])
        latents = [
            [tensors[name][None].to(self.device, self.dtype) for name in branch["images"]]
            for branch in task["branches"]
        ]
        if not separate:
            latents = [one for some in latents for one in some]

        def moved(value):
            if isinstance(value, list):
                return [one.to(self.device) for one in value]
            return value.to(self.device)

        return {
            "input_ids": moved(data["input_ids"]),
            "input_img_latents": latents,
            "input_image_sizes": data["input_image_sizes"],
            "attention_mask": moved(data["attention_mask"]),
            "position_ids": moved(data["position_ids"]),
            "use_img_cfg": bool(image),
        }

    @torch.no_grad()
    def picture(self, task: dict) -> dict:
        """A picture through the package's scheduler, timed step by step."""
        settings = task["settings"]
        tensors = load_file(task["tensors"])
        noise = tensors.pop("noise").to(self.device)
        separate, cached = settings["separate_cfg_infer"], settings["use_kv_cache"]
        offloaded = settings["offload_model"] and self.device.type == "cuda"
        name = "forward_with_separate_cfg" if separate else "forward_with_cfg"
        forward = getattr(self.model, name)
        peak, before, tracked = None, 0, contextlib.nullcontext()
        if task["track"] and self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        elif task["track"]:
            tracked = memory_tracker()(device="cpu")
        if offloaded:
            for parameter, value in self.model.named_parameters():
                if "layers" in parameter and "layers.0" not in parameter:
                    value.data = value.data.cpu()
        copies = len(task["branches"])
        marks, moved = [], None
        begin = self.wait()

        def step(z, timesteps, past_key_values, **given):
            nonlocal moved
            if marks and moved is not None:  # the scheduler has added the last velocity
                marks[-1] = self.wait()
                if len(marks) == task["most"]:
                    raise _Enough(z)
                if task["restart"] and len(marks) == 1:
                    z = z.copy_(torch.cat([noise] * copies).to(z.dtype))
            moved = forward(z, timesteps, past_key_values=past_key_values, **given)
            marks.append(self.wait())
            return moved

        with tracked:
            kwargs = self.inputs(task, tensors, separate)
            kwargs |= {
                "cfg_scale": task["guidance"][0],
                "img_cfg_scale": task["guidance"][1],
                "use_kv_cache": cached,
                "offload_model": offloaded,
            }
            z = torch.cat([noise] * copies).to(self.dtype)
            scheduler = self.package.scheduler.OmniGenScheduler(num_steps=task["steps"])
            try:
                z = scheduler(
                    z,
                    step,
                    kwargs,
                    use_kv_cache=cached,
                    offload_kv_cache=settings["offload_kv_cache"],
                )
                marks[-1] = self.wait()
            except _Enough as enough:
                (z,) = enough.args
        weights = sum(one.nbytes for one in self.model.state_dict().values())
        if task["track"]:
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device) - before + weights
            else:
                peak = tracked.peak_bytes + weights
        result = self.folder / "result.safetensors"
        save_file({"latents": z[:1].float().cpu().contiguous()}, result)
        return {
            "latents": str(result),
            "begin": begin,
            "marks": marks,
            "peak_bytes": peak,
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("folder")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    # what the package prints goes to standard error; answers alone go to standard output
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(arguments.threads)
    worker = Worker(arguments.model, arguments.folder, arguments.dtype, arguments.device)
    from importlib.metadata import version

    packages = ("OmniGen", "transformers", "torch")
    print(json.dumps({"ready": {name: version(name) for name in packages}}), file=answers)
    for line in sys.stdin:
        try:
            answer = worker.picture(json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:500]}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
