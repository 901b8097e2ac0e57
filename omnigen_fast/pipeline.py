"""OmniGenPipeline: from a call to its images; the only object that keeps state."""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cache import ConditionCache, Entry
from .config import ModelConfig
from .denoise import (
    GuidancePlan,
    Loop,
    Velocity,
    cached_velocity,
    denoise,
    recomputed_velocity,
    schedule,
)
from .errors import MemoryBudgetError, OmniGenError, RequestError, first_line
from .graph import StepGraphs
from .guidance import guidance_branches
from .memory.cost import Cost, Estimate
from .memory.device import free_bytes, on_host, parse_memory, profile_of
from .memory.overview import Report
from .memory.plan import MemoryPlan, Workload, first_workload
from .memory.planner import Decision, describe, front
from .memory.planner import plan as decide
from .model import TimeEmbeddings, Transformer
from .parameters import parameter_shapes
from .precision import Precision
from .processor import Processor
from .request import Request, finite, make_request
from .sequence import EncodedBranch, cache_entries, lay_out_all
from .streamed_cache import StreamedCache
from .streaming import HostMemory, is_out_of_memory, lane_for, spread
from .vae.vae import Vae
from .weights.checkpoint import Checkpoint
from .weights.files import SDXL_VAE, VAE_FILES, resolve
from .weights.lora import Adapter, merged, read_adapter
from .weights.store import LayerStore

_log = logging.getLogger("omnigen_fast")

_SMALLER = "make height and width smaller, or ask for fewer pictures per call"
_KEPT_IMAGES = 256  # latents of input images; one of 1024 px takes 262 KB
_DTYPES = (torch.bfloat16, torch.float32)

AnyCache = ConditionCache | StreamedCache

Memory = str | int | MemoryPlan

# Called after each step with (pipeline, step, time, {"latents": ...}); may return new latents.
StepCallback = Callable[["OmniGenPipeline", int, float, dict[str, Any]], Mapping[str, Any] | None]


@dataclass
class RunningCall:
    """A request on its way; what a plan that fails has finished stays."""

    request: Request
    pictures: list[list[tuple[EncodedBranch, float]]]  # branches of each, what each counts
    latents: Tensor  # [pictures, 4, height / 8, width / 8], float32, of the last finished step
    times: Tensor  # [steps + 1], float32
    steps_done: int = 0
    finished: bool = False  # all steps, or stopped
    calling_back: bool = False
    predicted: Cost | None = None  # of the plan that is carried out
    failures: list[str] = field(default_factory=list)

    def entries(self, cached: bool) -> dict[Entry, tuple[EncodedBranch, ...]]:
        """What the cache is to hold, or what each step computes again."""
        branches = [[branch for branch, _ in picture] for picture in self.pictures]
        return cache_entries(branches, self.request.steps if cached else 1, share=cached)

    def workload(self) -> Workload:
        """The request's sizes, as the planner wants them."""
        entries = self.entries(self.request.switches.use_kv_cache is not False)
        images = {
            image.digest: image.size
            for branches in entries.values()
            for branch in branches
            for _, _, image in branch.spans
        }
        return Workload(
            height=self.request.height,
            width=self.request.width,
            steps=self.request.steps,
            branches=tuple(tuple(b.length for b, _ in picture) for picture in self.pictures),
            conditions=tuple(entry.condition for entry in entries),
            images=tuple(images.values()),
        )


class OmniGenPipeline:
    """Makes and edits images with OmniGen; made by `from_pretrained`.

    Calls from several threads run one after the other.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Transformer,
        vae: Vae,
        processor: Processor,
        condition_cache_bytes: int = 2 << 30,
        capture_steps: bool = True,
        memory: Memory = "auto",
    ) -> None:
        self.model = model
        self.vae = vae
        self.processor = processor
        self._checkpoint = checkpoint
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._stale: set[str] = set()  # parameters that may not be what the adapters make of them
        self._image_latents: OrderedDict[str, Tensor] = OrderedDict()
        self._cache_bytes = condition_cache_bytes
        self._cache = self._new_cache()
        self._host = HostMemory(model.device)
        self._streamed: StreamedCache | None = None
        self._store = LayerStore(model, self._read, self._host)
        self._capture_steps = capture_steps
        self._graphs = self._new_graphs()
        self._memory = memory
        self._offload_model: bool | None = None
        self._report: Report | None = None
        self._captured: Any = None  # what the captured step serves
        self._lock = threading.RLock()
        self._running = False
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        model_name: str | os.PathLike[str],
        vae_path: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = torch.bfloat16,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        condition_cache_bytes: int = 2 << 30,
        capture_steps: bool = True,
        memory: Memory = "auto",
    ) -> OmniGenPipeline:
        """Loads a model from a folder or from the hub, in the original's or diffusers' layout.

        Args:
            model_name: a local folder, a hub id such as "Shitao/OmniGen-v1", or "shapes", the
                small model that ships with this package (a local folder of that name is
                "./shapes").
            vae_path: folder or hub id of the VAE where `model_name` holds none; without it the
                one that the original falls back to is fetched.
            device: where to run; None for the current GPU if there is one (CUDA, then Apple's),
                else the CPU.
            dtype: of the transformer, bfloat16 or float32. The VAE is always float32.
            revision: branch, tag or commit on the hub.
            cache_dir: where hub files are kept.
            token: access token for the hub.
            local_files_only: use what was fetched before, do not ask the hub.
            condition_cache_bytes: how much memory to keep for the conditions of earlier calls.
            capture_steps: on a GPU, record a step as a CUDA graph and replay it. Off saves the
                memory of one step's intermediate results.
            memory: how much of the device's memory to use: "auto" for what is free, less a margin;
                an amount, as "8GiB" or as a number of bytes; or a `MemoryPlan` (of
                `omnigen_fast`) that is carried out as it stands, but for what a call's own switches
                say.

        Raises:
            CheckpointError: files are missing, malformed, or not an OmniGen model.
            RequestError: a dtype or device that can't be used.
        """
        dtype = _check_dtype(dtype)
        target = _check_device(device)
        hub = {
            "revision": revision,
            "cache_dir": cache_dir,
            "token": token,
            "local_files_only": local_files_only,
        }
        checkpoint = Checkpoint.open(resolve(model_name, **hub))
        processor = Processor.from_file(checkpoint.tokenizer_path, checkpoint.config)
        vae_folder = checkpoint.vae_folder
        if vae_folder is None:
            hub["revision"] = None  # names a commit of the model, not of the VAE
            vae_folder = resolve(vae_path or SDXL_VAE, patterns=VAE_FILES, **hub)
        vae = Vae.from_folder(vae_folder, torch.device("cpu"))
        plan = _first_plan(checkpoint.config, vae, dtype, target, memory)
        vae.place(plan.vae_resident)
        vae.to(target)
        model = _load(checkpoint, dtype, target, plan.resident_layers)
        return cls(checkpoint, model, vae, processor, condition_cache_bytes, capture_steps, memory)

    @property
    def config(self) -> ModelConfig:
        return self._checkpoint.config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def interrupt(self) -> bool:
        """Whether the running call was told to stop; set `_interrupt` from a callback to do so."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        input_images: Any = None,
        height: int = 1024,
        width: int = 1024,
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
        progress: bool = True,
        memory: Memory | None = None,
    ) -> Any:
        """Makes images.

        Args:
            prompt: a string, or a list of strings (a batch). Image K is named in it as
                `<img><|image_K|></img>`.
            input_images: for one prompt a list of images, for a batch a list of such lists. An
                image is a path, the bytes of a file, a PIL image, or a numpy array [height, width]
                or [height, width, 1, 3 or 4]; it is turned upright (EXIF), alpha is laid on white.
            height: of the output in pixels, a multiple of 16.
            width: likewise.
            num_inference_steps: Euler steps, 1 to 1000.
            guidance_scale: how strongly the prompt counts; 2 to 3 is usual.
            use_img_guidance: whether input images are guided by apart from the text.
            img_guidance_scale: how strongly they count.
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
            negative_prompt: what to steer away from, one or one for each prompt; None for the
                original's built-in one.
            num_images_per_prompt: so many images of each prompt, prompt by prompt.
            generator: instead of `seed`; one, or one for each image.
            latents: initial noise [images, 4, height / 8, width / 8] instead of drawn noise.
            callback_on_step_end: called after each step as `callback(pipe, step, time, {"latents":
                latents})`, time in [0, 1]; may return {"latents": ...} to replace them. Setting
                `pipe._interrupt = True` in it ends the loop.
            callback_on_step_end_tensor_inputs: what the callback is given; there are only latents.
            progress: show a progress bar.
            memory: for this call, see `from_pretrained`; None for what was said there.

        Returns:
            A list of PIL images, or what `output_type` says.

        Raises:
            RequestError: an argument can't be used; says which, and what can.
        """
        if dtype is not None:
            dtype = _check_dtype(dtype)
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise RequestError(
                "callback_on_step_end must be a function, got "
                f"{type(callback_on_step_end).__name__}"
            )
        inputs = callback_on_step_end_tensor_inputs
        if not isinstance(inputs, list | tuple) or any(name != "latents" for name in inputs):
            raise RequestError(
                f"callback_on_step_end_tensor_inputs can only be ['latents'], got {inputs!r}"
            )
        request = make_request(
            self.config,
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
            offload_model=self._offload_model if offload_model is None else offload_model,
            use_input_image_size_as_output=use_input_image_size_as_output,
            seed=seed,
            output_type=output_type,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
        )
        with self._exclusive():
            if self._stale:
                self._refresh()
            if dtype is not None and dtype != self.dtype:
                self._reload(dtype)
            chosen = self._memory if memory is None else memory
            return self._generate(request, chosen, callback_on_step_end, progress)

    def load_lora_weights(
        self,
        path: str | os.PathLike[str],
        *,
        adapter_name: str | None = None,
        weight: float = 1.0,
    ) -> None:
        """Adds a LoRA to the weights; several add up. It costs no time in a step.

        Args:
            path: a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`).
            adapter_name: to unload it by; the path unless given.
            weight: how strongly it counts.

        Raises:
            CheckpointError: it can't be read or does not fit.
            RequestError: an adapter of that name is loaded, or `weight` is no finite number.
        """
        weight = finite("weight", weight)
        name = os.fspath(path) if adapter_name is None else adapter_name
        with self._exclusive():
            if name in self._adapters:
                raise RequestError(f"an adapter {name!r} is loaded already; unload it first")
            adapter = read_adapter(path, self._checkpoint, weight)
            self._adapters[name] = adapter
            try:
                self._refresh(adapter)
            except BaseException:
                del self._adapters[name]
                self._refresh()  # undoes what was set
                raise

    def unload_lora_weights(self, adapter_name: str | None = None) -> None:
        """Takes one LoRA, or all, out again; the weights are the checkpoint's to the bit.

        Raises RequestError if there is no adapter of that name.
        """
        with self._exclusive():
            if adapter_name is not None and adapter_name not in self._adapters:
                loaded = ", ".join(map(repr, self._adapters)) or "none"
                raise RequestError(f"no adapter {adapter_name!r} is loaded; loaded: {loaded}")
            before = self._adapters.copy()
            names = list(before) if adapter_name is None else [adapter_name]
            removed = [self._adapters.pop(name) for name in names]
            try:
                self._refresh(*removed)
            except BaseException:
                self._adapters = before  # the checkpoint can't be read: nothing was taken out
                raise

    def merge_lora(self, lora_path: str | os.PathLike[str]) -> None:
        """The original's name for `load_lora_weights`."""
        self.load_lora_weights(lora_path)

    def to(self, device: str | torch.device) -> OmniGenPipeline:
        """Moves everything to a device; kept conditions are dropped."""
        target = _check_device(device)
        with self._exclusive():
            self._host = HostMemory(target)
            self._store.to(target, self._host)
            self.vae.to(target)
            self._forget()
        return self

    def clear_cache(self) -> None:
        """Drops all kept conditions: token ids, image latents, keys and values."""
        with self._exclusive():
            self.processor.clear()
            self._forget()

    def enable_model_cpu_offload(self) -> None:
        """The original's switch: later calls stream all layers from the host."""
        self._offload_model = True

    def disable_model_cpu_offload(self) -> None:
        """The original's switch: later calls keep all layers on the device."""
        self._offload_model = False

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

    def _generate(
        self,
        request: Request,
        memory: Memory,
        callback: StepCallback | None,
        progress: bool,
    ) -> list[Any] | Tensor | np.ndarray:
        pictures = self._encode(request)
        try:
            run = RunningCall(request, pictures, self._draw_noise(request), schedule(request.steps))
        except Exception as error:
            if is_out_of_memory(error):
                raise OmniGenError(
                    f"out of memory before the first step ({first_line(error)}); {_SMALLER}"
                ) from error
            raise
        with _progress_bar(request.steps, progress) as bar:
            after_step = self._after_step(run, callback, bar)
            for plan in self._plans(run, memory):
                try:
                    return self._carry_out(plan, run, after_step)
                except BaseException as error:  # an interrupt from the keyboard too
                    self._recover()
                    if run.calling_back or not is_out_of_memory(error):
                        raise
                    run.failures.append(first_line(error))
                # Here, not in the handler: the traceback holds the step's tensors.
                self._free()
        raise AssertionError("the last plan fails with its own error")

    def _plans(self, run: RunningCall, memory: Memory) -> Iterator[MemoryPlan]:
        """What to try, one after the other as memory runs out; ends with one line that says so."""
        if isinstance(memory, MemoryPlan):
            switches = run.request.switches.for_device(on_host(self.device))
            given = switches.applied_to(memory, self.config.num_layers)
            given.check(self.config.num_layers)
            yield given
            raise OmniGenError(
                f"out of memory with the plan that was given ({run.failures[-1]}); give "
                'memory="auto" or a plan that needs less'
            )
        decision = self._decide(run, memory)
        plan: MemoryPlan | None = decision.plan
        failed: list[MemoryPlan] = []
        while plan is not None:
            run.predicted = decision.estimate.cost(plan)
            yield plan
            failed.append(plan)
            following = decision.after(failed)
            plan = None if following is None else following.plan
            if plan is not None:
                _log.warning(
                    "out of memory in spite of the plan (%s); it goes on with: %s",
                    run.failures[-1],
                    describe(plan, self.config),
                )
        raise OmniGenError(
            f"out of memory with every plan for this request ({run.failures[-1]}); {_SMALLER}"
        )

    def _decide(self, run: RunningCall, memory: str | int) -> Decision:
        profile = profile_of(self.device)
        budget = parse_memory(memory)
        return decide(
            self.config,
            self.vae.shape,
            Precision.of(self.dtype),
            run.workload(),
            profile,
            free_bytes(self.device, profile) if budget is None else budget,
            run.request.switches,
            current=self.last_plan,
            kept_bytes=self._cache_bytes,
            capture=self._graphs.possible(),
        )

    def _carry_out(
        self, plan: MemoryPlan, run: RunningCall, after_step: Callable[[int, Tensor], bool]
    ) -> list[Any] | Tensor | np.ndarray:
        """From the last finished step on, in the way that a plan says."""
        request = run.request
        cached_share = 0.0 if plan.cache == "none" else run.workload().cached_share()
        self._report = Report(plan, run.predicted, cached_share)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._arrange(plan, run)
        if not run.finished:
            loop, cache = self._prepare(plan, run)
            replay = loop.step
            if plan.capture and isinstance(cache, ConditionCache):
                replay = self._graphs.runner(loop, cache)
            denoise(loop, replay, after_step, run.steps_done)
            run.finished = True
            del loop, cache, replay
        if not _finite(run.latents):
            self._forget()  # what is kept may hold some too
            raise OmniGenError(
                f"the latents hold NaN or infinities after step {run.steps_done} of "
                f"{request.steps}; the weights, a LoRA, the VAE or a callback may have made them"
            )
        if request.output_type == "latent":
            self._measure()
            return run.latents.clone()
        if plan.resident_layers < self.config.num_layers:
            self._store.stop()  # the ring's memory is the decoder's now
        if self._streamed is not None:
            self._streamed.free()
        with self.vae.loaded():
            images = self.vae.decode(run.latents, plan.strip_rows, store=self._strip_store(plan))
        self._measure()
        if not _finite(images.sum()):  # of values from 0 to 1
            raise OmniGenError(
                "the VAE gave pixels that are no numbers; its weights may be damaged"
            )
        return _output(images, request.output_type)

    def _measure(self) -> None:
        if self.device.type == "cuda" and self._report is not None:
            peak = torch.cuda.max_memory_reserved(self.device)
            self._report = replace(self._report, measured_bytes=peak)

    def _encode(self, request: Request) -> list[list[tuple[EncodedBranch, float]]]:
        """The branches of each picture, and what each counts."""
        per_prompt = [
            [
                (self.processor.encode(branch, request.noise_tokens, request.steps), coefficient)
                for branch, coefficient in guidance_branches(prompt, request.guidance)
            ]
            for prompt in request.prompts
        ]
        return [branches for branches in per_prompt for _ in range(request.images_per_prompt)]

    def _draw_noise(self, request: Request) -> Tensor:
        """Initial latents, float32, with the values that the transformer's dtype can hold.

        That is what the original starts from.
        """
        if request.latents is not None:
            return request.latents.to(self.device, self.dtype).to(torch.float32, copy=True)
        generator, shape = request.generator, request.latent_shape
        if request.seed is not None:
            generator = torch.Generator(self.device).manual_seed(request.seed)
        if isinstance(generator, list | tuple):
            one = (1, *shape[1:])
            noise = torch.cat([torch.randn(one, generator=g, device=g.device) for g in generator])
        else:
            device = self.device if generator is None else generator.device
            noise = torch.randn(shape, generator=generator, device=device)
        return noise.to(self.device, self.dtype).to(torch.float32)

    def _arrange(self, plan: MemoryPlan, run: RunningCall) -> None:
        """Puts weights and caches where a plan wants them; frees first, then fills."""
        shape = (run.request.latent_shape, run.request.steps, replace(plan, kept_bytes=0))
        if shape != self._captured or not plan.capture:
            self._graphs.clear()  # a captured step holds the memory of its intermediate results
            self._captured = shape
        if plan.cache == "ring":
            self._cache.clear()
        elif self._streamed is not None:
            self._streamed.clear()
        if plan.cache == "none":
            self._cache.clear()
        self._cache.budget_bytes = plan.kept_bytes
        self.vae.place(plan.vae_resident)
        self._store.arrange(plan.resident_layers)

    def _prepare(self, plan: MemoryPlan, run: RunningCall) -> tuple[Loop, AnyCache]:
        """Computes all that does not depend on the noise, or finds it kept."""
        request, times = run.request, run.times
        cached = plan.cache != "none"
        entries = run.entries(cached)
        embedded = self.model.embed_times(times[:-1].to(self.device))
        cache: AnyCache
        if cached:
            cache = self._cache if plan.cache == "device" else self._streamed_cache()
            try:
                missing = cache.reserve(list(entries))
                if missing:
                    self._prefill(plan, {one: entries[one] for one in missing}, embedded, cache)
            except BaseException:
                cache.discard(list(entries))  # the rows of some hold nothing
                raise
            velocity = cached_velocity(self.model, cache, embedded)
        else:
            cache = self._new_cache(layers=1)
            cache.reserve(list(entries))
            images = self._latents_of(plan, entries)
            velocity = recomputed_velocity(self.model, cache, embedded, images, plan.mlp_rows)
        guidance = GuidancePlan.make(
            self.model,
            Velocity.of(run.pictures, entries, cache),
            request.noise_tokens,
            plan.branches_per_pass,
            plan.mlp_rows,
        )
        loop = Loop(
            latents=run.latents.clone(),
            index=torch.full((1,), run.steps_done, dtype=torch.int64, device=self.device),
            lengths=times.diff().to(self.device),
            times=embedded,
            plan=guidance,
            velocity=velocity,
        )
        return loop, cache

    def _prefill(
        self,
        plan: MemoryPlan,
        entries: Mapping[Entry, tuple[EncodedBranch, ...]],
        times: TimeEmbeddings,
        cache: AnyCache,
    ) -> None:
        images = self._latents_of(plan, entries)
        sequences = lay_out_all(entries, cache, self.device)
        embedded = [self.model.embed_condition(one, images, times.tokens) for one in sequences]
        with cache.filling(list(entries)):
            self.model.prefill(sequences, embedded, cache, plan.mlp_rows)

    def _latents_of(
        self, plan: MemoryPlan, entries: Mapping[Entry, tuple[EncodedBranch, ...]]
    ) -> dict[str, Tensor]:
        """Latents of the branches' images by digest; encodes those that are not kept."""
        branches = [branch for kept in entries.values() for branch in kept]
        images = {image.digest: image for branch in branches for _, _, image in branch.spans}
        missing = [image for digest, image in images.items() if digest not in self._image_latents]
        if missing:
            with self.vae.loaded():
                for image in missing:
                    self._image_latents[image.digest] = self.vae.encode(
                        image, plan.strip_rows, store=self._strip_store(plan)
                    )
        for digest in images:
            self._image_latents.move_to_end(digest)
        latents = {digest: self._image_latents[digest] for digest in images}
        while len(self._image_latents) > _KEPT_IMAGES:
            self._image_latents.popitem(last=False)
        return latents

    def _strip_store(self, plan: MemoryPlan) -> torch.device | None:
        return torch.device("cpu") if plan.strips_on_host else None

    def _after_step(
        self, run: RunningCall, callback: StepCallback | None, bar: Any
    ) -> Callable[[int, Tensor], bool]:
        def after(step: int, latents: Tensor) -> bool:
            bar.update()
            if callback is not None:
                given = latents.clone()
                run.calling_back = True
                changed = callback(self, step, float(run.times[step]), {"latents": given})
                run.calling_back = False
                _replace(latents, given, changed)
            run.latents.copy_(latents)
            run.steps_done = step + 1
            run.finished = self._interrupt
            return not self._interrupt

        return after

    def _recover(self) -> None:
        """After a failure: what was under way is over, what is kept can be used again."""
        self._cache.reset()
        if self._streamed is not None:
            self._streamed.reset()
        if self.model.stream is not None:
            self.model.stream.reset()

    def _free(self) -> None:
        """Gives up what another plan may need the memory of."""
        self._graphs.clear()
        self._cache.clear()
        if self._streamed is not None:
            self._streamed.free()
        self._store.stop()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _streamed_cache(self) -> StreamedCache:
        if self._streamed is None:
            self._streamed = StreamedCache(
                self.config,
                self.dtype,
                self.device,
                self._cache_bytes,
                self._host,
                lane_for(self.device),
            )
        return self._streamed

    def _new_cache(self, layers: int | None = None) -> ConditionCache:
        # one layer that every layer overwrites is of no use to later requests
        kept_bytes = self._cache_bytes if layers is None else 0
        return ConditionCache(self.config, self.dtype, self.device, kept_bytes, layers)

    def _new_graphs(self) -> StepGraphs:
        # one shape: a captured step holds its memory
        return StepGraphs.on(self.device) if self._capture_steps else StepGraphs(None)

    def _read(self, names: Iterable[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Parameters with the adapters that are loaded now."""
        return merged(self._checkpoint, self._adapters.values(), self.dtype, device, names)

    def _forget(self) -> None:
        """Drops what depends on weights or device."""
        self._image_latents.clear()
        self._cache = self._new_cache()
        self._streamed = None
        self._graphs = self._new_graphs()

    def _refresh(self, *adapters: Adapter) -> None:
        """Sets the weights that some adapters touch to what the loaded ones make of them.

        If that fails, the next call or change of adapters does it first.
        """
        self._stale |= {update.parameter for adapter in adapters for update in adapter.updates}
        self._cache.clear()
        if self._streamed is not None:
            self._streamed.clear()
        self._graphs.clear()
        self._store.refresh(sorted(self._stale))
        self._stale.clear()

    def _reload(self, dtype: torch.dtype) -> None:
        """Reads the weights in another dtype, loaded adapters included."""
        resident, device = self._store.resident, self.device
        self._store.stop()
        self.model = _load(self._checkpoint, dtype, device, resident)
        self._store = LayerStore(self.model, self._read, self._host)
        self._forget()
        self._refresh(*self._adapters.values())

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One call at a time: the cache's rows belong to the request that runs."""
        with self._lock:
            if self._running:
                raise OmniGenError("the pipeline is running; it can't be called from a callback")
            self._running, self._interrupt = True, False
            try:
                yield
            finally:
                self._running = False


def _first_plan(
    config: ModelConfig, vae: Vae, dtype: torch.dtype, device: torch.device, memory: Memory
) -> MemoryPlan:
    """Where weights are loaded to, before there is a request: as for one picture of 1024 px."""
    if isinstance(memory, MemoryPlan):
        memory.check(config.num_layers)
        return memory
    workload = first_workload(config)
    profile = profile_of(device)
    budget = parse_memory(memory)
    budget = free_bytes(device, profile) if budget is None else budget
    shape = vae.shape
    try:
        return decide(config, shape, Precision.of(dtype), workload, profile, budget).plan
    except MemoryBudgetError:  # a smaller picture may fit
        estimate = Estimate(config, shape, Precision.of(dtype), workload, profile)
        return front(estimate, capture=False)[-1].plan


def _load(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, resident: int
) -> Transformer:
    """The model with so many layers on a device, and no memory for the others."""
    layers = checkpoint.config.num_layers
    here = spread(resident, layers)
    weights = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, shape in parameter_shapes(checkpoint.config).items()
        if name.startswith("layers.") and int(name.split(".")[1]) not in here
    }
    names = [name for name in checkpoint.sources if name not in weights]
    return Transformer(checkpoint.config, weights | checkpoint.read(dtype, device, names))


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


def _finite(tensor: Tensor) -> bool:
    """Whether all are numbers; so they are where only shapes are computed."""
    return tensor.is_meta or bool(tensor.isfinite().all())


def _output(images: Tensor, output_type: str) -> list[Any] | Tensor | np.ndarray:
    """Images [pictures, 3, height, width] in [0, 1] as the caller wants them."""
    if output_type == "pt":
        return images
    rows = images.permute(0, 2, 3, 1).cpu()
    if output_type == "np":
        return rows.numpy()
    from PIL import Image

    # rounded down, as the original does
    return [Image.fromarray(image) for image in (rows * 255).to(torch.uint8).numpy()]


def _progress_bar(steps: int, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, disable=not show)


def _check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is torch.float16:
        raise RequestError(
            "dtype float16 overflows in this model and gives black images; use bfloat16 or float32"
        )
    if not isinstance(found, torch.dtype) or found not in _DTYPES:
        raise RequestError(f"dtype must be bfloat16 or float32, got {dtype!r}")
    return found


def _check_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(1, device=target)
    except Exception as error:  # torch raises many kinds for absent devices
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RequestError(f"device {device!r} can't be used: {first}") from error
    return target
