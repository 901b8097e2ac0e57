"""Work in which memory may run out, and what must hold after it did."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from golden_cases import GOLDEN, TINY, relative_error
from PIL import Image
from recording import recording_graphs
from safetensors.torch import load_file, save_file
from torch import Tensor

from omnigen_fast import OmniGenPipeline
from omnigen_fast.memory.plan import MemoryPlan

LAYERS = 2
PLAIN = MemoryPlan.plain(LAYERS, kept_bytes=1 << 20)
STREAMED = replace(PLAIN, resident_layers=1, cache="ring", strip_rows=2, vae_resident=False)
RECOMPUTED = replace(PLAIN, cache="none", branches_per_pass=1, mlp_rows=16)
REQUEST: dict[str, Any] = {
    "prompt": "<img><|image_1|></img> Red.",
    "negative_prompt": "grey",
    "input_images": [Image.radial_gradient("L").resize((32, 32)).convert("RGB")],
    "height": 32,
    "width": 32,
    "max_input_image_size": 32,
    "num_inference_steps": 1,
    "seed": 0,
    "output_type": "pt",
    "progress": False,
}
TEXT = {**REQUEST, "prompt": "Red.", "input_images": None}
OTHER = {**TEXT, "prompt": "A blue cat on a mat.", "width": 48}
SEVERAL_STEPS = {**TEXT, "num_inference_steps": 4}  # a capture pays from the third on
LORA = "style"


class Models:
    """The golden checkpoint and its LoRA, cut to `LAYERS` layers, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.base, self.lora = folder / "base", folder / "lora"
        shutil.copytree(TINY, self.base)
        config = json.loads((TINY / "config.json").read_text())
        config["num_hidden_layers"] = LAYERS
        (self.base / "config.json").write_text(json.dumps(config))
        _cut(TINY / "model.safetensors", self.base / "model.safetensors")
        shutil.copytree(GOLDEN / "lora", self.lora)
        _cut(GOLDEN / "lora/adapter_model.safetensors", self.lora / "adapter_model.safetensors")

    def pipeline(self, memory: MemoryPlan | str = PLAIN, dtype: str = "float32") -> OmniGenPipeline:
        """A fresh one."""
        return OmniGenPipeline.from_pretrained(
            self.base, dtype=dtype, memory=memory, device="cpu", condition_cache_bytes=1 << 20
        )


def _cut(source: Path, target: Path) -> None:
    beyond = tuple(f".layers.{layer}." for layer in range(LAYERS, 3))
    values = load_file(source).items()
    save_file({name: value for name, value in values if not any(b in name for b in beyond)}, target)


def held_tensors(pipe: OmniGenPipeline) -> Iterator[Tensor]:
    """What a pipeline may hold between calls."""
    engine = pipe.engine
    yield from engine._weights()
    yield from engine._kept()
    yield from engine.image_latents.values()
    if engine._model is not None:
        yield from (one for one in vars(engine._model).values() if isinstance(one, Tensor))
        yield from engine._model.crops()
    if engine._fingerprint is not None:
        yield engine._fingerprint[1]
    for adapter, _ in engine.loras.applied():
        for update in adapter.updates:
            yield from (update.down, update.up)


class Scenario(ABC):
    """Work that is tried again and again, each time from the same start."""

    @abstractmethod
    def prepare(self) -> None:
        """Goes to the start."""

    @abstractmethod
    def act(self) -> Any:
        """What may fail."""

    @abstractmethod
    def check(self, result: Any) -> None:
        """After `act` has succeeded."""

    @abstractmethod
    def check_failed(self) -> None:
        """After `act` has failed."""

    @abstractmethod
    def check_other(self) -> None:
        """After it has failed: whether another request can be carried out."""

    def settle(self) -> None:
        """After an interrupt on the way out of `act`, when all was done: takes that back."""
        return

    @abstractmethod
    def held(self) -> Iterator[Tensor]:
        """What may live on."""


class Call(Scenario):
    """A call under one plan, from its input image to its picture."""

    other: Tensor | None = None

    def __init__(self, models: Models, plan: MemoryPlan, request: dict[str, Any]) -> None:
        self.models, self.plan = models, plan
        self.pipe = models.pipeline(plan)
        self.request = request
        self.expected = models.pipeline(plan)(**request)

    def prepare(self) -> None:
        self.pipe.clear_cache()

    def act(self) -> Tensor:
        return self.pipe(**self.request)

    def check(self, result: Tensor) -> None:
        assert torch.equal(result, self.expected)

    def check_failed(self) -> None:
        self.check(self.act())

    def check_other(self) -> None:
        if self.other is None:
            self.other = self.models.pipeline(self.plan)(**OTHER)
        assert torch.equal(self.pipe(**OTHER, dtype="float32"), self.other)

    def held(self) -> Iterator[Tensor]:
        return held_tensors(self.pipe)


class CapturedCall(Call):
    """With steps that are recorded and replayed."""

    def __init__(self, models: Models) -> None:
        super().__init__(models, replace(PLAIN, capture=True), SEVERAL_STEPS)

    def prepare(self) -> None:
        super().prepare()
        self.pipe.engine.graphs = recording_graphs()[0]


class AutomaticCall(Call):
    """Goes on with another plan, whose sums have another order."""

    def __init__(self, models: Models) -> None:
        super().__init__(models, PLAIN, {**REQUEST, "memory": "auto"})

    def prepare(self) -> None:
        super().prepare()
        self.pipe.engine.arrange(PLAIN, self.pipe.make_call(**self.request))

    def check(self, result: Tensor) -> None:
        assert relative_error(result, self.expected) < 1e-5

    def check_failed(self) -> None:
        assert torch.equal(self.act(), self.expected)


class OtherPlan(Call):
    """A call that moves weights, from where a plan has put them to where another wants them."""

    def __init__(self, models: Models, before: MemoryPlan, after: MemoryPlan) -> None:
        super().__init__(models, after, TEXT)
        self.before = before
        self.call = self.pipe.make_call(**TEXT)

    def prepare(self) -> None:
        super().prepare()
        self.pipe.engine.arrange(self.before, self.call)


class OtherDtype(Call):
    """A call in another dtype, which reads the weights again."""

    def __init__(self, models: Models, plan: MemoryPlan) -> None:
        super().__init__(models, plan, TEXT)
        self.converted = models.pipeline(plan, "bfloat16")(**TEXT)

    def prepare(self) -> None:
        self.pipe.to(torch.float32)
        super().prepare()

    def act(self) -> Tensor:
        return self.pipe(**TEXT, dtype="bfloat16")

    def check(self, result: Tensor) -> None:
        assert torch.equal(result, self.converted)

    def check_failed(self) -> None:
        assert torch.equal(self.pipe(**TEXT, dtype="float32"), self.expected)
        self.check(self.act())


class Load(Scenario):
    """A pipeline that is loaded."""

    def __init__(self, models: Models, plan: MemoryPlan, dtype: str) -> None:
        self.models, self.plan, self.dtype = models, plan, dtype
        self.expected = models.pipeline(plan, dtype)(**TEXT)
        self.pipe: OmniGenPipeline | None = None

    def prepare(self) -> None:
        self.pipe = None

    def act(self) -> OmniGenPipeline:
        self.pipe = self.models.pipeline(self.plan, self.dtype)
        return self.pipe

    def check(self, result: OmniGenPipeline) -> None:
        assert torch.equal(result(**TEXT), self.expected)

    def check_failed(self) -> None:
        self.check(self.act())

    def check_other(self) -> None:
        """There is no pipeline."""

    def held(self) -> Iterator[Tensor]:
        return iter(()) if self.pipe is None else held_tensors(self.pipe)


class Lora(Call):
    """A LoRA that is loaded."""

    def __init__(self, models: Models, plan: MemoryPlan, dtype: str = "float32") -> None:
        self.models, self.plan = models, plan
        self.pipe = models.pipeline(plan, dtype)
        self.folder = models.lora
        self.without = models.pipeline(plan, dtype)(**TEXT)
        other = models.pipeline(plan, dtype)
        other.load_lora_weights(self.folder, LORA, weight=0.5)
        self.merged = other(**TEXT)

    def prepare(self) -> None:
        self.pipe.unload_lora_weights()
        self.pipe.clear_cache()

    def act(self) -> None:
        self.pipe.load_lora_weights(self.folder, LORA, weight=0.5)

    def check(self, result: None) -> None:
        assert torch.equal(self.pipe(**TEXT), self.merged)

    def settle(self) -> None:
        if self.pipe.get_list_adapters():
            self.check(None)
            self.pipe.unload_lora_weights()

    def check_failed(self) -> None:
        assert not self.pipe.get_list_adapters()
        assert torch.equal(self.pipe(**TEXT), self.without)
        self.check(self.act())


class LoraUnloaded(Lora):
    """A LoRA that is taken out."""

    def prepare(self) -> None:
        if not self.pipe.get_list_adapters():
            super().act()
        self.pipe.clear_cache()

    def act(self) -> None:
        self.pipe.unload_lora_weights()

    def check(self, result: None) -> None:
        assert torch.equal(self.pipe(**TEXT), self.without)

    def check_failed(self) -> None:
        assert self.pipe.get_active_adapters() == [LORA]
        assert torch.equal(self.pipe(**TEXT), self.merged)
        self.check(self.act())


MAIN = ("resident", "streamed", "recomputed")


class Scenarios:
    """All of them by name."""

    def __init__(self, models: Models) -> None:
        self._makers: dict[str, Callable[[], Scenario]] = {
            "resident": lambda: Call(models, PLAIN, REQUEST),
            "streamed": lambda: Call(models, STREAMED, REQUEST),
            "recomputed": lambda: Call(models, RECOMPUTED, REQUEST),
            "captured": lambda: CapturedCall(models),
            "automatic": lambda: AutomaticCall(models),
            "to streamed": lambda: OtherPlan(models, PLAIN, STREAMED),
            "to resident": lambda: OtherPlan(models, STREAMED, PLAIN),
            "dtype": lambda: OtherDtype(models, PLAIN),
            "dtype, streamed": lambda: OtherDtype(models, STREAMED),
            "load": lambda: Load(models, PLAIN, "float32"),
            "load, bfloat16": lambda: Load(models, STREAMED, "bfloat16"),
            "lora": lambda: Lora(models, PLAIN),
            "lora, streamed": lambda: Lora(models, STREAMED, "bfloat16"),
            "lora out": lambda: LoraUnloaded(models, PLAIN, "bfloat16"),
        }

    @property
    def names(self) -> list[str]:
        return list(self._makers)

    def make(self, name: str) -> Scenario:
        return self._makers[name]()
