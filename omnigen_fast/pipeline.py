"""OmniGenPipeline: from a call to its images; the only object that keeps state."""

from __future__ import annotations

import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cache import ConditionCache, Entry
from .checkpoint import SDXL_VAE, VAE_FILES, Checkpoint, resolve
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
from .errors import OmniGenError, RequestError
from .graph import StepGraphs
from .images import InputImage
from .lora import Adapter, apply_adapters, read_adapter
from .model import Transformer
from .processor import (
    EncodedBranch,
    Processor,
    cache_entries,
    guidance_branches,
    lay_out_all,
)
from .request import Request, finite, make_request
from .vae import Vae

_KEPT_IMAGES = 256  # latents of input images; one of 1024 px takes 262 KB
_DTYPES = (torch.bfloat16, torch.float32)

# Called after each step with (pipeline, step, time, {"latents": ...}); may return new latents.
StepCallback = Callable[["OmniGenPipeline", int, float, dict[str, Any]], Mapping[str, Any] | None]


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
    ) -> None:
        self.model = model
        self.vae = vae
        self.processor = processor
        self._checkpoint = checkpoint
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()
        self._image_latents: OrderedDict[str, Tensor] = OrderedDict()
        self._cache_bytes = condition_cache_bytes
        self._cache = self._new_cache()
        self._capture_steps = capture_steps
        self._graphs = self._new_graphs()
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
    ) -> OmniGenPipeline:
        """Loads a model from a folder or from the hub, in the original's or diffusers' layout.

        Args:
            model_name: a local folder, or a hub id such as "Shitao/OmniGen-v1".
            vae_path: folder or hub id of the VAE where `model_name` holds none; without it the
                one that the original falls back to is fetched.
            device: where to run; the first GPU if there is one, else the CPU.
            dtype: of the transformer, bfloat16 or float32. The VAE is always float32.
            revision: branch, tag or commit on the hub.
            cache_dir: where hub files are kept.
            token: access token for the hub.
            local_files_only: use what was fetched before, do not ask the hub.
            condition_cache_bytes: how much memory to keep for the conditions of earlier calls.
            capture_steps: on a GPU, record a step as a CUDA graph and replay it. Off saves the
                memory of one step's intermediate results.

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
        vae = Vae.from_folder(vae_folder, target)
        model = Transformer(checkpoint.config, checkpoint.read(dtype, target))
        return cls(checkpoint, model, vae, processor, condition_cache_bytes, capture_steps)

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
    ) -> Any:
        """Makes images.

        Args:
            prompt: a string, or a list of strings (a batch). Image K is named in it as
                `<img><|image_K|></img>`.
            input_images: for one prompt a list of images, for a batch a list of such lists. An
                image is a path, the bytes of a file, a PIL image, or a numpy array
                [height, width, 3]; it is turned upright (EXIF), alpha is laid on white.
            height: of the output in pixels, a multiple of 16.
            width: likewise.
            num_inference_steps: Euler steps, 1 to 1000.
            guidance_scale: how strongly the prompt counts; 2 to 3 is usual.
            use_img_guidance: whether input images are guided by apart from the text.
            img_guidance_scale: how strongly they count.
            max_input_image_size: input images are shrunk to this many pixels a side.
            separate_cfg_infer: run guidance branches one after the other (less memory) rather than
                at once. The image is the same. None leaves it to the runtime: at once.
            offload_model: keep weights on the host. None leaves it to the runtime.
            use_kv_cache: keep the condition's keys and values (much faster) rather than compute
                them again in every step. The image is the same. None leaves it to the runtime,
                which keeps them.
            offload_kv_cache: keep them on the host. None leaves it to the runtime.
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
            use_input_image_size_as_output=use_input_image_size_as_output,
            seed=seed,
            output_type=output_type,
            negative_prompt=negative_prompt,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
        )
        if offload_model:
            self._note_residency("offload_model=True", "weights")
        if offload_kv_cache:
            self._note_residency("offload_kv_cache=True", "keys and values")
        with self._exclusive():
            if dtype is not None and dtype != self.dtype:
                self._reload(dtype)
            return self._generate(request, callback_on_step_end, progress)

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
                self._refresh(adapter)  # undoes what was set
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
            self.model.to(target)
            self.vae.to(target)
            self._forget()
        return self

    def clear_cache(self) -> None:
        """Drops all kept conditions: token ids, image latents, keys and values."""
        with self._exclusive():
            self.processor.clear()
            self._forget()

    def enable_model_cpu_offload(self) -> None:
        """The original's switch for keeping weights on the host."""
        self._note_residency("enable_model_cpu_offload", "weights")

    def disable_model_cpu_offload(self) -> None:
        """The original's switch for keeping weights on the device, where they are."""

    def _generate(
        self, request: Request, callback: StepCallback | None, progress: bool
    ) -> list[Any] | Tensor | np.ndarray:
        pictures = self._encode(request)
        latents = self._draw_noise(request)
        times = schedule(request.steps)
        loop = self._prepare(request, pictures, latents, times)
        with _progress_bar(request.steps, progress) as bar:
            run = self._graphs.runner(loop, self._cache) if request.use_cache else loop.step
            denoise(loop, run, self._after_step(callback, times, bar))
        if request.output_type == "latent":
            return latents.clone()  # a captured step writes its own again in a later call
        return _output(self.vae.decode(latents), request.output_type)

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

    def _prepare(
        self,
        request: Request,
        pictures: Sequence[Sequence[tuple[EncodedBranch, float]]],
        latents: Tensor,
        times: Tensor,
    ) -> Loop:
        """Computes all that does not depend on the noise, or finds it kept."""
        entries = cache_entries(
            [[branch for branch, _ in picture] for picture in pictures],
            request.steps if request.use_cache else 1,
            share=request.use_cache,
        )
        embedded = self.model.embed_times(times[:-1].to(self.device))
        if request.use_cache:
            cache = self._cache
            missing = cache.reserve(list(entries))
            if missing:
                try:
                    self._prefill({entry: entries[entry] for entry in missing}, embedded.tokens)
                except BaseException:
                    cache.discard(missing)  # their rows hold nothing
                    raise
            velocity = cached_velocity(self.model, cache, embedded)
        else:
            cache = self._new_cache(layers=1)
            cache.reserve(list(entries))
            images = self._latents_of(branch for kept in entries.values() for branch in kept)
            velocity = recomputed_velocity(self.model, cache, embedded, images)
        velocities = Velocity.of(pictures, entries, cache)
        plan = GuidancePlan.make(
            self.model, velocities, request.noise_tokens, request.branches_per_pass
        )
        return Loop(
            latents=latents,
            index=torch.zeros(1, dtype=torch.int64, device=self.device),
            lengths=times.diff().to(self.device),
            times=embedded,
            plan=plan,
            velocity=velocity,
        )

    def _prefill(
        self, entries: Mapping[Entry, tuple[EncodedBranch, ...]], time_tokens: Tensor
    ) -> None:
        images = self._latents_of(branch for kept in entries.values() for branch in kept)
        sequences = lay_out_all(entries, self._cache, self.device)
        embedded = [self.model.embed_condition(one, images, time_tokens) for one in sequences]
        self.model.prefill(sequences, embedded, self._cache)

    def _latents_of(self, branches: Any) -> dict[str, Tensor]:
        """Latents of the branches' images by digest; encodes those that are not kept."""
        images = {image.digest: image for branch in branches for _, _, image in branch.spans}
        latents = {digest: self._image_latent(image) for digest, image in images.items()}
        while len(self._image_latents) > _KEPT_IMAGES:
            self._image_latents.popitem(last=False)
        return latents

    def _image_latent(self, image: InputImage) -> Tensor:
        if image.digest not in self._image_latents:
            self._image_latents[image.digest] = self.vae.encode(image)
        self._image_latents.move_to_end(image.digest)
        return self._image_latents[image.digest]

    def _after_step(
        self, callback: StepCallback | None, times: Tensor, bar: Any
    ) -> Callable[[int, Tensor], bool]:
        def after(step: int, latents: Tensor) -> bool:
            bar.update()
            if callback is not None:
                given = latents.clone()
                changed = callback(self, step, float(times[step]), {"latents": given})
                _replace(latents, given, changed)
            return not self._interrupt

        return after

    def _new_cache(self, layers: int | None = None) -> ConditionCache:
        return ConditionCache(self.config, self.dtype, self.device, self._cache_bytes, layers)

    def _new_graphs(self) -> StepGraphs:
        return StepGraphs.on(self.device) if self._capture_steps else StepGraphs(None)

    def _forget(self) -> None:
        """Drops what depends on weights or device."""
        self._image_latents.clear()
        self._cache = self._new_cache()
        self._graphs = self._new_graphs()

    def _refresh(self, *adapters: Adapter) -> None:
        """Sets the weights that some adapters touch to what the loaded ones make of them."""
        touched = {update.parameter for adapter in adapters for update in adapter.updates}
        apply_adapters(self.model, self._checkpoint, self._adapters.values(), sorted(touched))
        self._cache.clear()
        self._graphs.clear()

    def _reload(self, dtype: torch.dtype) -> None:
        """Reads the weights in another dtype, loaded adapters included."""
        self.model = Transformer(self.config, self._checkpoint.read(dtype, self.device))
        self._refresh(*self._adapters.values())
        self._forget()

    def _note_residency(self, switch: str, what: str) -> None:
        if self.device.type != "cpu":
            warnings.warn(
                f"{switch} has no effect: {what} stay on {self.device}", UserWarning, stacklevel=3
            )

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
