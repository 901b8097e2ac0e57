"""OmniGenPipeline: from a call to its images; the only object that keeps state."""

from __future__ import annotations

import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .attention import attention_for
from .call import Call, Memory, scheduled, workload_of
from .compilation import check_compile
from .config import ModelConfig
from .diffusers_methods import DiffusersMethods
from .engine import Engine
from .equivalents import named_arguments, own_names
from .errors import OmniGenError, OutOfMemoryError, RequestError, brief, first_line, printable
from .fewer_steps import left_to_preset, with_preset
from .loras import LoraMethods
from .memory.device import capability_of, parse_memory
from .memory.overview import Report
from .memory.plan import MemoryPlan
from .memory.planner import Decision
from .model import Transformer
from .model_defaults import read_defaults
from .parallel.digest import digest
from .parallel.group import guarded, join
from .parallel.layout import AUTO as AUTO_LAYOUT
from .parallel.layout import Parallel
from .precision import AUTO, Precision, check_capability
from .processor import Processor
from .request import Request, check_switch, checked_integer, make_request
from .results import as_result
from .run import (
    LESS_RESIDENT,
    SMALLER,
    AfterStep,
    auto_precision,
    common_memory,
    decide,
    fastest_layout,
    first_plan,
    generate,
    naming_memory,
)
from .surroundings import isolated
from .vae.vae import Vae
from .weights.checkpoint import Checkpoint
from .weights.files import SDXL_VAE, VAE_FILES, check_inside, checked_path, locate, resolve

# Called after each step with (pipeline, step, time, {"latents": ...}); may return new latents.
StepCallback: TypeAlias = Callable[
    ["OmniGenPipeline", int, float, dict[str, Any]], Mapping[str, Any] | None
]

_DTYPES = (torch.bfloat16, torch.float32)
_CACHE_BYTES = 2 << 30  # for conditions of earlier calls
_MAX_BYTES = 1 << 60


@dataclass(frozen=True)
class _Given:
    """A call's arguments, checked."""

    request: Request
    memory: Memory
    precision: Precision


_log = logging.getLogger("omnigen_fast")


class OmniGenPipeline(LoraMethods, DiffusersMethods):
    """Makes and edits images with OmniGen; made by `from_pretrained`.

    Calls from several threads run one after the other.
    """

    @named_arguments
    def __init__(self, engine: Engine, processor: Processor, memory: Memory = "auto") -> None:
        self.engine = engine
        self.processor = processor
        self._memory = memory
        self._offload_model: bool | None = None
        self._report: Report | None = None
        self._latest: Request | None = None
        self._bar: Mapping[str, Any] = {}
        self._lock = threading.RLock()
        self._calling = threading.Lock()
        self._interrupt = False
        self._process = os.getpid()

    def __reduce__(self) -> Any:
        raise OmniGenError(
            "a pipeline can't be copied or pickled; load another with from_pretrained, or call "
            "this one from several threads"
        )

    @classmethod
    @isolated
    @named_arguments
    @naming_memory("while the model is loaded", LESS_RESIDENT)
    def from_pretrained(
        cls,
        model_name: str | os.PathLike[str],
        vae_path: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = torch.bfloat16,
        torch_dtype: str | torch.dtype | None = None,
        variant: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        condition_cache_bytes: int | str = _CACHE_BYTES,
        capture_steps: bool = True,
        memory: Memory = "auto",
        weights: str | None = None,
        compute: str | None = None,
        cache: str | None = None,
        attention: str = AUTO,
        vae_dtype: str | torch.dtype = torch.float32,
        compile: bool | str | None = None,
        parallel: Parallel | None = None,
    ) -> OmniGenPipeline:
        """Loads a model from a folder or from the hub, in the original's or diffusers' layout.

        Args:
            model_name: a local folder, a .safetensors file with its config.json beside it, a hub id
                such as "Shitao/OmniGen-v1", or "shapes", the small model that ships with this
                package (a local folder of that name is "./shapes").
            vae_path: folder, file or hub id of the VAE; None for the one in `model_name`, or else
                the one that the original falls back to, which is fetched.
            device: where to run; None for the current GPU if there is one (CUDA, then Apple's),
                else the CPU.
            dtype: of the transformer, bfloat16 or float32.
            torch_dtype: diffusers' name for `dtype`.
            variant: of the weights' names, as "fp16" for model.fp16.safetensors.
            subfolder: where the model is in the folder or repository.
            revision: branch, tag or commit on the hub.
            cache_dir: where hub files are kept.
            token: access token for the hub.
            local_files_only: use what was fetched before, do not ask the hub.
            condition_cache_bytes: how much memory to keep for the conditions of earlier calls, as a
                number of bytes or as "1GiB"; 0 keeps none, "auto" means 2 GiB.
            capture_steps: on a GPU, record a step as a CUDA graph and replay it. Off saves the
                memory of one step's intermediate results.
            memory: how much of the device's memory to use: "auto" for what is free, less a margin;
                an amount, as "8GiB" or as a number of bytes; or a `MemoryPlan` (of
                `omnigen_fast`), which is used as given except where a call's own switches override
                it.
            weights: how the matrices of the layers are stored: "bfloat16", "int8", "fp8" or "nf4"
                (see docs/precision.md). Products stay in `dtype`. "auto" is bfloat16 if all layers
                fit on the device, else the form that changes them least and does. None for the
                form of the file, which is that of `dtype` unless `omnigen-fast convert` has
                quantised it.
            compute: what the products of the layers are computed in: "int8" or, on a GPU of compute
                capability 8.9 or later or AMD's gfx950 and gfx12, "fp8", for speed (see
                docs/precision.md). None for `dtype`.
            cache: in which form the condition's keys and values are kept: "int8" or "fp8" take half
                the memory (see docs/precision.md). None for `dtype`.
            attention: who computes that of a step: "triton", the kernels of this package (on a CPU,
                plain PyTorch); "flash", PyTorch's flash attention; "cudnn", cuDNN's; the last two
                in bfloat16 on a GPU, "flash" in any dtype on a CPU. "auto" is who was fastest on
                this card, and "triton" where that was not measured (see docs/benchmarks.md).
            vae_dtype: of the VAE, float32 or bfloat16, which takes half the memory and is less
                exact (see docs/precision.md).
            compile: run a CPU's operations in C++ that is built on this machine and kept in
                ~/.cache/omnigen_fast: faster in bfloat16 on CPUs with AVX512, and equal up to
                rounding. Where it can't be had, PyTorch's operations run, and a line says why. None
                or "auto" does so for models from 25 million weights in their layers.
            parallel: several ranks of an initialised `torch.distributed` group make each picture
                together (see docs/several-gpus.md): "auto", or how many parts of the guidance
                branches and of the noise rows, as {"branches": 2, "rows": 2}. Every rank makes
                the same calls. None for this process alone.

        Raises:
            CheckpointError: files are missing, malformed, or not an OmniGen model.
            RequestError: an argument can't be used; says which, and what can.
        """
        checked_path("model_name", model_name)
        kind = _one_dtype(dtype, torch_dtype)
        precision = check_precision(weights, kind, compute, cache, attention)
        if variant is not None:
            check_inside("variant", variant)
        vae_kind = check_dtype(vae_dtype, "vae_dtype")
        compiled = check_compile(compile)
        target = check_device(device)
        check_compute(compute, target)
        cache_bytes = check_cache_bytes(condition_cache_bytes)
        group = join(parallel, target)
        with guarded(group):
            hub: dict[str, Any] = {
                "revision": revision,
                "cache_dir": cache_dir,
                "token": token,
                "local_files_only": local_files_only,
            }
            place = locate(model_name, subfolder=subfolder, **hub)
            checkpoint = Checkpoint.open(place, variant)
            if weights is None:
                precision = Precision.of(kind, checkpoint.form, compute, cache, attention)
            own = precision or Precision.of(kind, checkpoint.form, compute, cache, attention)
            attention_for(own, checkpoint.config, target)  # refuses before anything is read
            words = read_defaults(checkpoint.folder).vocabulary
            processor = Processor.from_file(checkpoint.tokenizer_path, checkpoint.config, words)
            hub["revision"] = None  # names a commit of the model, not of the VAE
            if vae_path is not None:
                vae_place = locate(vae_path, patterns=VAE_FILES, **hub)
            else:
                vae_place = checkpoint.vae_folder or resolve(SDXL_VAE, patterns=VAE_FILES, **hub)
            vae = Vae.from_folder(vae_place, torch.device("cpu"), variant, vae_kind)
            budget = common_memory(memory, target, group)
            if precision is None:
                precision = auto_precision(checkpoint, vae, own, target, budget)
            plan = first_plan(checkpoint, vae, precision, target, budget)
            if group is not None:
                if parallel == AUTO_LAYOUT:
                    fastest_layout(group, checkpoint, vae, precision, plan)
                group.same("model or options", digest(checkpoint.config, precision, plan))
            vae.place(plan.vae_resident)
            vae.to(target)
            engine = Engine(
                checkpoint, vae, precision, target, cache_bytes, capture_steps, compiled, group
            )
            engine.load(precision, plan.resident_layers)
            return cls(engine, processor, memory)

    @property
    def config(self) -> ModelConfig:
        return self.engine.config

    @property
    def model(self) -> Transformer:
        return self.engine.model

    @property
    def vae(self) -> Vae:
        return self.engine.vae

    @vae.setter
    @isolated
    def vae(self, vae: Any) -> None:
        """Takes diffusers' `AutoencoderKL` (made float32 and moved here) or another pipeline's VAE.

        What was made with the old one is dropped.

        Raises:
            RequestError: it is neither.
            CheckpointError: it is not OmniGen's kind of VAE.
        """
        found = Vae.of(vae)
        with self._exclusive():
            self.engine.take_vae(found)

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer's arithmetic."""
        return self.engine.precision.arithmetic_dtype

    @property
    def compiled(self) -> bool:
        """Whether a CPU's operations run in C++, see `compile` of `from_pretrained`."""
        return self.engine.compilation.active

    @property
    def attention(self) -> str:
        """Who computes that of a step, see `from_pretrained`: "triton", "flash" or "cudnn"."""
        return self.engine.attention

    @property
    def defaults(self) -> dict[str, int | float]:
        """Arguments of a call that suit the model, by its omnigen_fast.json; empty without one."""
        return dict(read_defaults(self.engine.checkpoint.folder).call)

    @property
    def interrupt(self) -> bool:
        """Whether the running call was told to stop; set `_interrupt` from a callback to do so."""
        return self._interrupt

    @isolated
    @named_arguments
    @with_preset
    def __call__(
        self,
        prompt: str | Sequence[str],
        input_images: Any = None,
        height: int | None = 1024,
        width: int | None = 1024,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        use_img_guidance: bool = True,
        img_guidance_scale: float = 1.6,
        max_input_image_size: int = 1024,
        separate_cfg_infer: bool | None = None,
        offload_model: bool | None = None,
        use_kv_cache: bool | None = None,
        offload_kv_cache: bool | None = None,
        use_input_image_size_as_output: bool = False,
        dtype: str | torch.dtype | None = None,
        seed: int | None = None,
        output_type: str = "pil",
        *,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        progress: bool = True,
        memory: Memory | None = None,
        guidance_interval: Sequence[float] | None = None,
        image_guidance_interval: Sequence[float] | None = None,
        solver: str = "euler",
        time_shift: float = 1.0,
        timesteps: Sequence[float] | None = None,
        mask_image: Any = None,
        mask_blur: int = 0,
        strength: float = 1.0,
        reuse: str | float = "off",
        quality: str = "exact",
    ) -> Any:
        """Makes images.

        Args:
            prompt: a string, or a list of strings (a batch). Image K is named in it as
                `<img><|image_K|></img>`, or `<|image_K|>` alone, at most 1024 times in all.
            input_images: for one prompt a list of images, for a batch a list of such lists. An
                image is a path, the bytes of a file, a binary file, a PIL image, a numpy array
                [height, width] or [height, width, 1, 3 or 4], or a tensor like that or with
                channels first; it is turned upright (EXIF), alpha is laid on white. None in a list
                is left out.
            height: of the output in pixels, a multiple of 16; None for 1024.
            width: likewise.
            num_inference_steps: steps of the solver, 1 to 1000.
            guidance_scale: how strongly to follow the prompt; 2 to 3 is usual.
            use_img_guidance: whether input images are guided separately from the text.
            img_guidance_scale: how strongly to follow the input images.
            max_input_image_size: input images are shrunk to this many pixels a side.
            separate_cfg_infer: run guidance branches one after the other (less memory) rather than
                at once. The image is the same. None leaves it to the memory planner.
            offload_model: keep weights on the host. None leaves it to the memory planner.
            use_kv_cache: keep the condition's keys and values (much faster) rather than compute
                them again in every step. The image is the same. None leaves it to the memory
                planner, which keeps them unless nothing else fits.
            offload_kv_cache: keep them on the host. None leaves it to the memory planner.
            use_input_image_size_as_output: the output has the size of the one input image.
            dtype: of the transformer, bfloat16 or float32; None for the one it was loaded in.
                Another one reads the weights again.
            seed: makes the call repeatable.
            output_type: "pil" (list of images), "pt" (tensor [images, 3, height, width] in [0, 1]),
                "np" (array [images, height, width, 3] in [0, 1]) or "latent" (tensor
                [images, 4, height / 8, width / 8], before the VAE's scaling is undone).
            negative_prompt: what to steer away from, one or one per prompt; None for the original's
                built-in one.
            num_images_per_prompt: how many images of each prompt; they come prompt by prompt.
            generator: instead of `seed`; one, or one per image.
            latents: initial noise [images, 4, height / 8, width / 8] instead of drawn noise.
            callback_on_step_end: called after each step as `callback(pipe, step, time, {"latents":
                latents})`, time in [0, 1]; may return {"latents": ...} to replace them. Setting
                `pipe._interrupt = True` in it ends the loop.
            callback_on_step_end_tensor_inputs: what the callback receives; only latents exist.
            return_dict: return the images as described below rather than diffusers' tuple
                `(images,)`.
            progress: show a progress bar; `set_progress_bar_config` sets its style.
            memory: for this call, see `from_pretrained`; None for the pipeline's own.
            guidance_interval: (start, stop) of the time, from 0 (noise) to 1 (picture), at which
                the prompt guides. A step that begins before `start`, or at `stop` or later, has a
                `guidance_scale` of 1, and branches of weight 0 are not run. None for (0, 1).
            image_guidance_interval: likewise for the input images and `img_guidance_scale`.
            solver: of the flow from noise to picture: "euler", or of second order "ab2" and
                "dpmpp2m", with one evaluation of the model in a step, "heun" and "midpoint", with
                two.
            time_shift: above 1, more of the steps lie near the noise; 1 for equal steps.
            timesteps: the times at which the steps begin, from 0 up to less than 1, instead of
                `num_inference_steps` and `time_shift`.
            mask_image: an image of the one input image's size, which is the output's: what is
                white is edited, or what is transparent, if anything is. All other pixels stay as
                they are.
            mask_blur: width in pixels of the seam, which lies inside the mask.
            strength: above 0 and at most 1; below 1, the steps before a share of 1 - strength are
                left out, and the others start from the one input image with noise.
            reuse: "off" computes every step; "careful", "fast" or a threshold extrapolate those
                before which velocities change little, by their share of the velocities' size.
            quality: "exact", or "high" or "fast" for less work: gives `num_inference_steps`,
                `solver`, `time_shift`, both intervals and `reuse` where the call does not.

        Returns:
            A list of PIL images, or what `output_type` says. Its attribute `images` is the same.
            Where several ranks make a picture, rank 0 returns it and the others an empty list.

        Raises:
            RequestError: an argument can't be used; says which, and what can.
        """
        with self._refusing_together():
            given = check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
            return_dict = check_switch("return_dict", return_dict)
            progress = check_switch("progress", progress)
            memory = self._memory if memory is None else memory
            precision = self._precision(dtype, memory)
            request = self._request(
                prompt=prompt,
                input_images=input_images,
                height=height,
                width=width,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                use_img_guidance=use_img_guidance,
                img_guidance_scale=img_guidance_scale,
                max_input_image_size=max_input_image_size,
                separate_cfg_infer=separate_cfg_infer,
                use_kv_cache=use_kv_cache,
                offload_kv_cache=offload_kv_cache,
                offload_model=offload_model,
                use_input_image_size_as_output=use_input_image_size_as_output,
                seed=seed,
                output_type=output_type,
                negative_prompt=negative_prompt,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator,
                latents=latents,
                guidance_interval=guidance_interval,
                image_guidance_interval=image_guidance_interval,
                solver=solver,
                time_shift=time_shift,
                timesteps=timesteps,
                mask_image=mask_image,
                mask_blur=mask_blur,
                strength=strength,
                reuse=reuse,
                quality=quality,
            )
        from .progress import progress_bar

        group = self.engine.placement.group
        with self._exclusive():
            if group is not None:
                loaded = self.engine.loras.applied()
                group.same("request", digest(request, memory, precision, loaded))
            call = self._start(request, precision)
            self._name_unknown_words(request)
            with guarded(group):
                with naming_memory("while the LoRAs are merged", LESS_RESIDENT):
                    self.engine.refresh()
                self._latest = request
                if group is not None:  # without a seed, each rank has drawn its own
                    group.broadcast_(call.latents)
                    if call.noise is not None:
                        call.noise.copy_(call.latents)
                with progress_bar(progress, {**self._bar, "total": request.steps}) as bar:
                    after_step = self._after_step(call, callback_on_step_end, given, bar)
                    images = generate(self.engine, call, memory, after_step, self._remember)
        if group is not None and not group.leads:
            images = images[:0]
            output_type = "pil"  # an empty list
        with naming_memory("after the last step", SMALLER):
            result = as_result(images, output_type)
        return result if return_dict else (result,)

    def _name_unknown_words(self, request: Request) -> None:
        """A line of the log for each prompt with words that the model does not know."""
        group = self.engine.placement.group
        if group is not None and not group.leads:
            return
        for text in dict.fromkeys(one.text for one in request.prompts):
            if unknown := self.processor.unknown_words(text):
                _log.warning("%s", unknown)

    @named_arguments
    def plan(self, prompt: str | Sequence[str], input_images: Any = None, **call: Any) -> Decision:
        """What a call would run as, without running it.

        Args:
            prompt: as for the call.
            input_images: likewise.
            call: every other argument that the call takes.

        Returns:
            The plan with its predicted cost (`plan`, `cost.peak_bytes`, `cost.seconds`), what else
            there is to choose from (`candidates`), and `explain()` in words.

        Raises:
            RequestError: an argument can't be used; says which, and what can.
            MemoryBudgetError: no plan fits.
        """
        given = self._bound(prompt, input_images, call)
        schedule, pictures = scheduled(given.request, self.processor)
        workload = workload_of(given.request, schedule, pictures)
        switches = given.request.switches
        return decide(self.engine, workload, switches, given.memory, given.precision)

    @isolated
    @named_arguments
    def make_call(self, prompt: str | Sequence[str], input_images: Any = None, **call: Any) -> Call:
        """What a call would carry out, for those who drive `engine` themselves.

        Args:
            prompt: as for the call.
            input_images: likewise.
            call: every other argument that the call takes.

        Raises:
            RequestError: an argument can't be used; says which, and what can.
        """
        given = self._bound(prompt, input_images, call)
        return self._start(given.request, given.precision)

    @contextmanager
    def driving(self) -> Iterator[Engine]:
        """Around driving `engine` directly; meanwhile, calls from other threads wait."""
        with self._exclusive():
            with naming_memory("while the LoRAs are merged", LESS_RESIDENT):
                self.engine.refresh()
            yield self.engine

    @isolated
    @named_arguments
    def to(self, *where: Any, device: Any = None, dtype: Any = None) -> OmniGenPipeline:
        """Moves everything to a device, converts the transformer to a dtype, or both.

        As diffusers takes them: `to("cuda")`, `to(torch.float32)`, `to("cuda", torch.bfloat16)`,
        or by name. Kept conditions are dropped.

        Raises:
            RequestError: a device or dtype that can't be used.
        """
        for one in where:
            if isinstance(one, torch.dtype):
                given, dtype = dtype, one
            else:
                given, device = device, one
            if given is not None:
                raise RequestError(f"to() takes one device and one dtype, got {one!r} as well")
        target = None if device is None else check_device(device)
        own = self.engine.precision
        precision = None if dtype is None else own.with_dtype(check_dtype(dtype))
        if target is None and precision is None:
            raise RequestError("to() needs a device or a dtype")
        if target is not None and self.engine.placement.group is not None:
            raise RequestError(
                "a pipeline of several ranks stays where it was loaded; give from_pretrained the "
                "device"
            )
        with self._exclusive(), naming_memory("while the weights move", LESS_RESIDENT):
            if target is not None:
                self.engine.to(target)
            if precision is not None and precision != self.engine.precision:
                self.engine.load(precision, self.engine.store.resident)
        return self

    def clear_cache(self) -> None:
        """Drops everything kept between calls: token ids, image latents, keys and values."""
        with self._exclusive():
            self.processor.clear()
            self.engine.forget()

    def release_memory(self, nbytes: int | None = None) -> int:
        """Gives up memory of the device, for another model; the next call loads what it needs.

        What is kept between calls goes first, then layers, then all weights.

        Args:
            nbytes: how much is wanted; None for all.

        Returns:
            Bytes that are free now, and were not before.

        Raises:
            OmniGenError: called from the pipeline's own callback.
        """
        if nbytes is not None:
            nbytes = checked_integer("nbytes", nbytes, 0, _MAX_BYTES, " bytes")
        with self._exclusive():
            return self.engine.release(nbytes)

    @property
    def last_plan(self) -> MemoryPlan | None:
        """The plan by which the last call ran; None before the first."""
        return None if self._report is None else self._report.plan

    @property
    def last_report(self) -> Report | None:
        """What `summary` puts into words."""
        return self._report

    def summary(self) -> str:
        """What the last call ran as: plan, share of cached work, peak, predicted seconds."""
        return "nothing has run yet" if self._report is None else self._report.text(self.config)

    def _bound(self, prompt: Any, input_images: Any, call: Mapping[str, Any]) -> _Given:
        """The arguments of a call that is not made."""
        signature = inspect.signature(type(self).__call__)
        args = (self, prompt, input_images)
        bound = signature.bind(*args, **own_names("__call__", signature, args, call))
        bound.arguments |= left_to_preset(bound.arguments)
        bound.apply_defaults()
        given = dict(bound.arguments)
        del given["self"]
        for name in ("return_dict", "progress"):
            check_switch(name, given.pop(name))
        callback = given.pop("callback_on_step_end")
        check_callback(callback, given.pop("callback_on_step_end_tensor_inputs"))
        dtype, memory = given.pop("dtype"), given.pop("memory")
        memory = self._memory if memory is None else memory
        return _Given(self._request(**given), memory, self._precision(dtype, memory))

    def _request(self, *, offload_model: bool | None, **arguments: Any) -> Request:
        switch = self._offload_model if offload_model is None else offload_model
        with naming_memory("before the first step", SMALLER):
            return make_request(self.config, offload_model=switch, **arguments)

    def _precision(self, dtype: str | torch.dtype | None, memory: Memory) -> Precision:
        """What a call runs in: its dtype, else its plan's, else what the weights are in."""
        if dtype is not None:
            found = self.engine.precision.with_dtype(check_dtype(dtype))
        else:
            given = memory.precision if isinstance(memory, MemoryPlan) else None
            found = given or self.engine.precision
        attention_for(found, self.config, self.device)
        return found

    def _start(self, request: Request, precision: Precision) -> Call:
        with naming_memory("before the first step", SMALLER):
            call = Call.of(request, self.processor, precision, self.device)
        self.engine.placement.check(call.schedule.counts, call.branches, request.noise_tokens)
        return call

    def _remember(self, report: Report) -> None:
        self._report = report

    def _after_step(
        self, call: Call, callback: StepCallback | None, names: Sequence[str], bar: Any
    ) -> AfterStep:
        group = self.engine.placement.group

        def after(step: int, latents: Tensor) -> bool:
            bar.update()
            if callback is not None:
                given = latents.clone()
                tensors: dict[str, Any] = dict.fromkeys(names, given)
                changed = callback(self, step, call.schedule.time(step), tensors)
                _replace(latents, given, changed)
            if group is None:
                return not self._interrupt
            stops, called = group.agree(self._interrupt, callback is not None)
            if called:
                group.broadcast_(latents)  # a callback may have changed them
            return not stops

        return after

    @contextmanager
    def _refusing_together(self) -> Iterator[None]:
        """Around checks of arguments: what one rank refuses, every rank does."""
        try:
            yield
        except Exception as error:
            group = self.engine.placement.group
            if group is not None:
                group.same("request", bytes(32), error)
            raise

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One call at a time: the cache's rows belong to the request that runs."""
        with self._lock:
            if self._calling.locked():
                raise OmniGenError("the pipeline is running; it can't be called from a callback")
            if os.getpid() != self._process:
                if not _survives_fork(self.device):
                    raise OmniGenError(
                        "the pipeline was loaded before this process was forked, and would hang "
                        "here; load it in the child, or start processes with the method spawn"
                    )
                self.engine.after_fork()
                self._process = os.getpid()
            self._interrupt = False
            with self._calling:  # unlike a flag, let go even if Ctrl-C comes on the way out
                yield


def _replace(latents: Tensor, given: Tensor, changed: Any) -> None:
    """Takes the latents that a callback returned, or else what it made of those it was given."""
    new = changed
    if changed is None:
        new = given
    elif isinstance(changed, Mapping):
        new = changed.get("latents", given)
    if not isinstance(new, Tensor) or not isinstance(changed, (Mapping, type(None))):
        raise RequestError(
            'callback_on_step_end must return None or {"latents": tensor}, got '
            f"{type(changed).__name__}"
        )
    if new.shape != latents.shape:
        raise RequestError(
            f"callback_on_step_end returned latents of shape {tuple(new.shape)} for "
            f"{tuple(latents.shape)}"
        )
    latents.copy_(new)


def _survives_fork(device: torch.device) -> bool:
    """Whether a forked child can compute: neither a GPU nor threads of OpenMP follow it."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def check_callback(callback: Any, inputs: Any) -> Sequence[str]:
    """The names of the tensors that a callback receives.

    Raises RequestError unless a call can use these.
    """
    if callback is not None and not callable(callback):
        raise RequestError(
            f"callback_on_step_end must be a function, got {type(callback).__name__}"
        )
    if not isinstance(inputs, list | tuple) or any(name != "latents" for name in inputs):
        raise RequestError(
            "callback_on_step_end_tensor_inputs can only be ['latents'], the one tensor of a step, "
            f"got {printable(repr(inputs), 100)}"
        )
    return inputs


def check_cache_bytes(amount: int | str) -> int:
    """Bytes to keep for conditions; raises RequestError unless it is an amount of memory."""
    name = "condition_cache_bytes"
    if not isinstance(amount, str):
        return checked_integer(name, amount, 0, _MAX_BYTES, " bytes")
    found = parse_memory(amount, name)
    return _CACHE_BYTES if found is None else found


def _one_dtype(dtype: Any, torch_dtype: Any) -> torch.dtype:
    """The dtype of two arguments that mean the same."""
    if torch_dtype is None:
        return check_dtype(dtype)
    found = check_dtype(torch_dtype)
    if dtype is not torch.bfloat16 and check_dtype(dtype) is not found:  # not the default
        raise RequestError(f"dtype {dtype} and torch_dtype {torch_dtype} differ; give one of them")
    return found


def check_dtype(dtype: str | torch.dtype, name: str = "dtype") -> torch.dtype:
    """Raises RequestError for dtypes that nothing computes in; `name` is the argument's."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is torch.float16:
        raise RequestError(
            f"{name} float16 overflows in this model and gives black images; use bfloat16 or "
            "float32"
        )
    if not isinstance(found, torch.dtype) or found not in _DTYPES:
        raise RequestError(f"{name} must be bfloat16 or float32, got {dtype!r}")
    return found


def check_compute(compute: str | None, device: torch.device) -> None:
    """Raises RequestError where a device has no products in fp8."""
    if device.type == "cuda":
        check_capability(compute, capability_of(device))


def check_precision(
    weights: str | None,
    dtype: torch.dtype,
    compute: str | None = None,
    cache: str | None = None,
    attention: str = AUTO,
) -> Precision | None:
    """What these arguments ask for; None for weights of "auto".

    Raises RequestError for anything else than names of forms, and for dtypes that differ.
    """
    if not isinstance(attention, str):
        raise RequestError(f"attention must be a name such as flash, got {brief(attention)}")
    for name, value in (("compute", compute), ("cache", cache), ("weights", weights)):
        if value is not None and not isinstance(value, str):
            raise RequestError(f"{name} must be a name such as int8, got {brief(value)}")
    if weights == AUTO:
        Precision.of(dtype, None, compute, cache, attention)
        return None
    return Precision.of(dtype, weights, compute, cache, attention)


def _devices() -> list[str]:
    """Names of the devices of this machine."""
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return [*found, *["mps"] * torch.backends.mps.is_available(), "cpu"]


def check_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        with naming_memory("while the device is tried", LESS_RESIDENT):
            target = torch.device(device)
            torch.empty(1, device=target)
    except OutOfMemoryError:
        raise
    except Exception as error:  # torch raises many kinds for absent devices
        reason = printable(first_line(error), 140)
        raise RequestError(
            f"device {brief(device)} can't be used: {reason}; here there is {', '.join(_devices())}"
        ) from error
    return target
