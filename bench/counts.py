"""What a picture costs, counted: launches, bytes, operations, copies, allocations. No clock.

The engine runs a picture of full size on meta tensors, which have shapes but no values, exactly as
it does on a GPU. Each of our operations is one kernel that reads and writes each tensor once (the
tests check both); PyTorch's operations are counted as they are dispatched. So the counts are the
same on every machine. Encoding, prefill, a step and decoding are counted separately.

    python -m bench.counts           # compares with the committed counts.json
    python -m bench.counts --write   # accepts the current counts
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from omnigen_fast.kernels import library, ops, reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from omnigen_fast.config import ModelConfig
from omnigen_fast.parameters import parameter_shapes

from .cases import COLUMNS, Size, Task
from .common import full_config
from .tracker import MemoryTracker

COMMITTED = Path(__file__).with_name("counts.json")
PRODUCTS, ATTENTION, NORMS, ELEMENTWISE, COPIES = FAMILIES = (
    "products",
    "attention",
    "norms",
    "elementwise",
    "copies",
)
OURS = {
    "attention_step": ATTENTION,
    "attention_step_8bit": ATTENTION,
    "attention_prefill": ATTENTION,
    "join_segments": ATTENTION,
    "rms_norm": NORMS,
    "modulate": NORMS,
    "rope_": ELEMENTWISE,
    "rope_cache_": ELEMENTWISE,
    "quantise_cache_": ELEMENTWISE,
    "swiglu": ELEMENTWISE,
    "scaled_mm_": PRODUCTS,
    "rms_norm_quantise_": NORMS,
    "swiglu_quantise_": ELEMENTWISE,
    "quantise_": ELEMENTWISE,
    "dequantise_int8_": ELEMENTWISE,
    "dequantise_fp8_": ELEMENTWISE,
    "dequantise_nf4_": ELEMENTWISE,
    "guidance_step_": ELEMENTWISE,
}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}
_NORMS = {"native_group_norm", "native_layer_norm"}
_COPIES = {"copy_", "_to_copy", "clone", "index_select", "index_copy_", "index", "cat", "embedding"}
_COPIES |= {"index_put_", "gather", "scatter_", "fill_", "zero_", "stack"}
_FLOAT = 4  # bytes
_NO_KERNEL = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
_NO_KERNEL |= {"lift_fresh", "detach", "alias"}


@dataclass(frozen=True)
class Operation:
    """One launch."""

    name: str
    family: str
    read: int  # bytes
    written: int  # bytes
    flops: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Counted:
    """A part of a picture, such as prefill or one step."""

    operations: tuple[Operation, ...]
    allocations: int

    @property
    def flops(self) -> int:
        return sum(one.flops for one in self.operations)

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.operations)

    def of(self, family: str) -> list[Operation]:
        return [one for one in self.operations if one.family == family]

    def floor(self, bytes_per_second: float, flops_per_second: float) -> float:
        """Roofline in seconds (Williams et al., 2009): of each launch the larger of both times."""
        return sum(
            max(one.bytes / bytes_per_second, one.flops / flops_per_second)
            for one in self.operations
        )

    def summary(self) -> dict[str, Any]:
        """What is compared with the committed counts."""
        copies: dict[str, int] = {}
        for one in self.of(COPIES):
            copies[one.name] = copies.get(one.name, 0) + 1
        return {
            "launches": len(self.operations),
            "launches_by_family": {family: len(self.of(family)) for family in FAMILIES},
            "flops": self.flops,
            "bytes": self.bytes,
            "bytes_by_family": {
                family: sum(one.bytes for one in self.of(family)) for family in FAMILIES
            },
            "copies": dict(sorted(copies.items())),
            "allocations": self.allocations,
        }


def touched(tensor: Tensor) -> int:
    """Bytes of a tensor's distinct elements: a broadcast axis is read once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        elements *= size if stride else min(size, 1)
    return elements * tensor.element_size()


class _Values:
    """Remembers the values of small integer tensors that move to a device without values."""

    _NAME = "_counted_values"

    @classmethod
    @contextmanager
    def remembered(cls) -> Iterator[None]:
        make = torch.tensor

        def tensor(data: Any, *args: Any, **more: Any) -> Tensor:
            made = make(data, *args, **more)
            if made.device.type == "meta" and isinstance(data, list):
                setattr(made, cls._NAME, data)
            return made

        with mock.patch.object(torch, "tensor", tensor):
            yield

    @classmethod
    def carry(cls, name: str, args: Sequence[Any], target: Tensor) -> None:
        """To the copy or slice of a vector of integers.

        A vector that is changed in place keeps what it had: the counters of a step advance
        together, so those that were equal stay equal.
        """
        source = args[0]
        if target.device.type != "meta" or source.dim() != 1 or source.is_floating_point():
            return
        on_meta = source.device.type == "meta"
        values = getattr(source, cls._NAME, None) if on_meta else source.tolist()
        if values is not None:
            setattr(target, cls._NAME, values[slice(*args[2:])] if name == "slice" else values)

    @classmethod
    def of(cls, tensor: Tensor) -> list[int]:
        if tensor.device.type != "meta":
            return tensor.tolist()
        return getattr(tensor, cls._NAME)


@contextmanager
def wrapped_operations(wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator:
    """Replaces every operation of `ops` by `wrap(name, operation)`."""
    with ExitStack() as stack:
        for name in ops.OPERATIONS:
            new = wrap(name, getattr(ops, name))
            stack.enter_context(mock.patch.object(ops, name, new))
        yield


class Counter(TorchDispatchMode):
    """Counts what is launched inside a `with` block: fused operations as one, others one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._inside = False
        self._stack = ExitStack()

    def __enter__(self) -> Counter:
        sdpa = self._fused(_sdpa, F.scaled_dot_product_attention)
        for context in (
            wrapped_operations(self._wrap),
            mock.patch.object(F, "scaled_dot_product_attention", sdpa),
            _Values.remembered(),
        ):
            self._stack.enter_context(context)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def _wrap(self, name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(getattr(reference, name))

        def cost(result: Any, *args: Any, **more: Any) -> Sequence[Operation]:
            given = signature.bind(*args, **more).arguments
            attention = ops.choice().attention
            if name == "attention_step" and attention in library.LIBRARIES:
                return _by_library(attention, given)
            return [_ours(name, given, result)]

        return self._fused(cost, run)

    def _fused(
        self, cost: Callable[..., Sequence[Operation]], run: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Counts a call of `run` as the operations `cost(result, *arguments)`."""

        def counted(*args: Any, **more: Any) -> Any:
            self._inside = True
            try:
                result = run(*args, **more)
            finally:
                self._inside = False
            self.operations.extend(cost(result, *args, **more))
            return result

        return counted

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._inside:
            return result
        name = func._schema.name.partition("::")[2]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if name in ("_to_copy", "clone", "slice"):
            _Values.carry(name, args, outputs[0])
        if name in _NO_KERNEL or not outputs or _is_view(func, inputs, outputs):
            return result
        devices = {tensor.device.type for tensor in outputs}
        if devices == {"cpu"}:
            return result  # on the host, beside the device's work
        self.operations.append(_atens(name, func, inputs, outputs))
        return result


def _is_view(func: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    if func._schema.is_mutable:
        return False
    storages = {one.untyped_storage()._cdata for one in inputs}
    return all(one.untyped_storage()._cdata in storages for one in outputs)


def _atens(name: str, func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> Operation:
    """An operation of PyTorch: it reads all inputs and writes all outputs."""
    family = ELEMENTWISE
    if name in _PRODUCTS:
        family = PRODUCTS
    elif name in _NORMS:
        family = NORMS
    elif name in _COPIES:
        family = COPIES
    written = sum(map(touched, outputs))
    places = [one for one in inputs if one.device.type != "cpu"]
    if name in ("index_select", "index", "embedding", "gather"):
        # of the table the rows that are taken
        read = written + sum(map(touched, places[1:]))
    elif name == "index_copy_":
        read = sum(map(touched, places[1:]))
        written = touched(places[-1])
    elif name in ("copy_",):
        read = touched(places[-1]) if len(places) > 1 else 0
    else:
        targets = {id(one) for one in outputs} if name.endswith("out") else set()
        read = sum(touched(one) for one in places if id(one) not in targets)
    flops = 0
    if family == PRODUCTS:
        flops = _product_flops(name, inputs, outputs[0])
        if func._schema.is_mutable:  # `out` is among the inputs
            read -= sum(touched(one) for one in outputs if any(one is x for x in places))
    return Operation(name, family, read, written, flops)


def _product_flops(name: str, inputs: list[Tensor], output: Tensor) -> int:
    """Multiplications and additions: two for each element of the output and of the inner axis."""
    first = inputs[1] if name in ("addmm", "baddbmm") else inputs[0]
    if name == "convolution":
        return 2 * output.numel() * inputs[1][0].numel()
    return 2 * output.numel() * first.shape[-1]


def _sdpa(
    result: Tensor, query: Tensor, key: Tensor, value: Tensor, **_: Any
) -> Sequence[Operation]:
    """PyTorch's fused attention, which keeps no scores; [..., rows, head_dim] each."""
    read = sum(map(touched, (query, key, value)))
    flops = 2 * key.shape[-2] * (query.numel() + result.numel())
    return [Operation("scaled_dot_product_attention", ATTENTION, read, touched(result), flops)]


def _ours(name: str, given: dict[str, Any], result: Any) -> Operation:
    """One of our operations: each tensor is read or written once."""
    tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
    out = tensors.pop("out", result if isinstance(result, Tensor) else None)
    for table in {"shift", "scale", "lengths"} & tensors.keys():
        taken = set(_Values.of(tensors["step"]))
        tensors[table] = tensors[table][: len(taken)]
    family, flops = OURS[name], 0
    read = sum(map(touched, tensors.values()))
    written = touched(out) if out is not None else 0
    if name in ("rope_", "rope_cache_"):
        qkv, heads, kv_heads = given["qkv"], given["heads"], given["kv_heads"]
        head = touched(qkv) // (heads + 2 * kv_heads)
        turned = head * (kv_heads if given.get("keys_only") else heads + kv_heads)
        tables = touched(given["cos"]) + touched(given["sin"])
        read, written = turned + tables, turned
        if name == "rope_cache_":  # v in, k and v into the cache
            read += head * kv_heads + touched(given["cache_rows"])
            written += 2 * head * kv_heads
    elif name == "quantise_cache_":
        k, v = given["k"], given["v"]
        read = touched(k) + touched(v) + touched(given["cache_rows"])
        written = 2 * k.shape[0] * _narrow_row(k)
    elif name.startswith("dequantise_"):
        written = touched(given["weight"])
        read -= written
    elif name == "scaled_mm_":
        written = touched(given["result"])
        read -= 0 if given.get("accumulate") else written
        flops = 2 * written // given["result"].element_size() * given["values"].shape[1]
    elif name.endswith("quantise_") and "values" in given:
        written = touched(given["values"]) + touched(given["scales"])
        read -= written
    elif name == "guidance_step_":
        written = touched(given["latents"])
    elif name in ("attention_step", "attention_step_8bit"):
        q, lengths = given["q"], _Values.of(given["cache_len"])
        starts, bounds = _Values.of(given["cache_start"]), _Values.of(given["cu_rows"])
        rows = [stop - first for first, stop in pairwise(bounds)]
        own = bounds if given.get("cu_keys") is None else _Values.of(given["cu_keys"])
        keys = [stop - first for first, stop in pairwise(own)]
        seen = {row for first, more in zip(starts, lengths) for row in range(first, first + more)}
        narrow = name == "attention_step_8bit"
        cached = 2 * len(seen)
        cached *= _narrow_row(given["k"]) if narrow else touched(given["k_cache"][0])
        read = sum(touched(tensors[one]) for one in ("q", "k", "v")) + cached
        read += sum(touched(tensors[one]) for one in ("cos", "sin") if one in tensors)
        pairs = sum(count * (key + more) for count, key, more in zip(rows, keys, lengths))
        flops = 4 * q.shape[1] * q.shape[2] * pairs
    elif name == "attention_prefill":
        q, ends, bounds = given["q"], _Values.of(given["kv_end"]), _Values.of(given["cu_rows"])
        first, pairs = given.get("first", 0), 0
        for start, stop in pairwise(bounds):
            for row in range(start + first, stop):  # its own key counts where kv_end is before it
                pairs += ends[row] + (ends[row] <= row - start)
        flops = 4 * q.shape[1] * q.shape[2] * pairs
    return Operation(name, family, read, written, flops)


def _by_library(name: str, given: dict[str, Any]) -> list[Operation]:
    """A step's attention as `kernels.library` has it: calls for both segments, and joins.

    FlashAttention takes all groups at once, after the starts in the cache have got one more place.
    """
    q, k, spans, found = given["q"], given["k"], given["spans"], []
    groups = [spans[place : place + 6] for place in range(0, len(spans), 6)]
    heads, head_dim = q.shape[1:]
    row, lse, pair = touched(q[:1]), heads * _FLOAT, 2 * touched(k[:1])
    if name == "flash":
        starts = touched(given["cache_start"])
        found += [Operation("pad", COPIES, starts, starts + _FLOAT)]
        calls = [groups]
    else:
        calls = [[group] for group in groups]
    for call in calls:
        rows = sum(stop - start for start, stop, *_ in call)
        for first in (2, 4):
            seen = [group[first + 1] - group[first] for group in call]
            places = {i for group in call for i in range(group[first], group[first + 1])}
            pairs = sum((group[1] - group[0]) * count for group, count in zip(call, seen))
            read = rows * row + len(places) * pair
            written, flops = rows * (row + lse), 4 * heads * head_dim * pairs
            found.append(Operation(f"{name} attention", ATTENTION, read, written, flops))
        read = 2 * rows * (row + lse)
        found.append(Operation("join_segments", ATTENTION, read, rows * row))
    return found


def _narrow_row(k: Tensor) -> int:
    """Bytes of a row of keys in 8 bits; what fills it up is not touched."""
    return k.shape[1] * (k.shape[2] + _FLOAT)


ENCODE, PREFILL, STEP, DECODE = PARTS = ("encode", "prefill", "step", "decode")


class Meter:
    """Counts the parts of a picture, each by its name.

    Args:
        existing: tensors that are allocated already.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        self._counter, self._tracker = Counter(), MemoryTracker(existing)
        self._part = ""
        self._operations: dict[str, list[Operation]] = {}
        self._allocations: dict[str, int] = {}

    def __getitem__(self, part: str) -> Counted:
        return Counted(tuple(self._operations.get(part, ())), self._allocations.get(part, 0))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what runs inside, for its part."""
        with self._counter, self._tracker:
            yield

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside belongs to this part, and not to a part around it."""
        before = self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, name: str) -> str:
        before, self._part = self._part, name
        self._operations.setdefault(before, []).extend(self._counter.operations)
        self._allocations[before] = self._allocations.get(before, 0) + self._tracker.allocations
        self._counter.operations.clear()
        self._tracker.restart()
        return before


@dataclass(frozen=True)
class Picture:
    """What a picture costs."""

    encode: Counted  # of all input images
    prefill: Counted  # everything else before the first step
    step: Counted  # the second, since the first may set up what the others use
    decode: Counted  # everything after the last step

    @property
    def launches(self) -> int:
        return len(self.step.operations)

    def flops(self, steps: int) -> int:
        """From tokens and image latents to the final latents."""
        return self.prefill.flops + steps * self.step.flops

    def summary(self) -> dict[str, Any]:
        """Of each part, see `Counted.summary`."""
        return {part: getattr(self, part).summary() for part in PARTS}


def meta_weights(config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Weights without values."""
    shapes = parameter_shapes(config).items()
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes}


def count(config: ModelConfig, task: Task) -> Picture:
    """Counts the parts of a picture.

    Only two steps run; the condition has as many time tokens as the picture has steps.
    """
    from .full_size import VAE
    from .gpu.pictures import make_pipeline, plain_plan
    from .vae_strips import as_on_a_gpu, random_autoencoder

    device, weights = torch.device("meta"), meta_weights(config)
    vae = random_autoencoder(VAE, "meta")
    meter = Meter([*weights.values(), *vae.autoencoder.parameters()])
    encode = vae.encode

    def counted(*args: Any, **more: Any) -> Tensor:
        with meter.part(ENCODE):
            return encode(*args, **more)

    pipe = make_pipeline(config, weights, device, vae=vae)
    engine, plan = pipe.engine, plain_plan(pipe.engine, capture=False)
    arguments = task.arguments() | {"latents": torch.zeros(task.latent_shape)}
    gpu = as_on_a_gpu()
    with mock.patch.object(vae, "encode", counted), torch.no_grad(), gpu, meter.counting():
        with meter.part(PREFILL):
            running = engine.start(pipe.make_call(**arguments), plan)
        engine.step(running)
        with meter.part(STEP):
            engine.step(running)
        with meter.part(DECODE):
            engine.decode(engine.finish(running), plan)
    return Picture(*(meter[part] for part in PARTS))


SIZES = {"1024 px": Size(1024, 1024), "512 px": Size(512, 512)}


def summaries(config: ModelConfig | None = None) -> dict[str, Any]:
    """Counts of all parts at full size, for every size and column; and by a library once."""
    config = config or full_config()
    found = {
        f"{name}, {column}": count(config, Task(size, images, 50)).summary()
        for name, size in SIZES.items()
        for images, column in enumerate(COLUMNS)
    }
    with ops.use(attention="flash"):
        one = count(config, Task(SIZES["1024 px"], 0, 50)).summary()
    return found | {f"1024 px, {COLUMNS[0]}, flash attention": one}


def rises(found: Any, committed: Any, where: str = "") -> list[str]:
    """Counts that are larger than the committed ones, or new; one line each."""
    if isinstance(found, dict):
        before = committed if isinstance(committed, dict) else {}
        return [
            line
            for key, value in found.items()
            for line in rises(value, before.get(key, 0), f"{where}: {key}" if where else key)
        ]
    if found > committed:
        return [f"{where}: {found:,}, committed {committed:,}"]
    return []


def read_committed() -> dict[str, Any]:
    return json.loads(COMMITTED.read_text())


def main() -> int:
    """Compares or writes the counts; returns the exit status."""
    found = summaries()
    if sys.argv[1:] == ["--write"]:
        COMMITTED.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {COMMITTED}")
        return 0
    if sys.argv[1:]:
        print("usage: python -m bench.counts [--write]", file=sys.stderr)
        return 2
    for name, parts in found.items():
        print(name)
        for part, one in parts.items():
            print(
                f"  {part:<8} {one['launches']:>4} launches, {one['flops'] / 1e12:7.2f} TFLOP, "
                f"{one['bytes'] / 1e9:7.2f} GB, {sum(one['copies'].values()):>3} copies, "
                f"{one['allocations']:>3} allocations"
            )
    risen = rises(found, read_committed())
    for line in risen:
        print(f"risen: {line}", file=sys.stderr)
    if risen:
        print(
            "python -m bench.counts --write accepts this; commit it with what caused it",
            file=sys.stderr,
        )
    return 1 if risen else 0


if __name__ == "__main__":
    sys.exit(main())
