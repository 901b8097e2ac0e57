"""The one door to the operations: callers import from here and never choose an implementation.

`reference` says what each operation computes, `contract` what it demands of its arguments. Tensors
on a CUDA device of capability 8.0 or later, or on a ROCm device with matrix units, go to the Triton
kernels, all others to the reference, or on a CPU to operations in C++ where a caller has asked for
them (`cpu`); where a GPU can't have the kernels, one warning is logged and the reference runs. On
meta tensors, which have no values, an operation only allocates what its kernel would. Called
eagerly, an operation is a plain call. Under `torch.compile` it is a custom operator of the
namespace `omnigen_fast`, so graphs do not break. Forward only: no operation has a derivative.

To add an operation, write its reference, its contract, a launcher of the same name in a kernel
file, and a function here that is decorated with `_operation`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

from . import contract, cpu, launch, library, reference

_log = logging.getLogger("omnigen_fast")

_OLDEST = (8, 0)

Kernels: TypeAlias = Literal["auto", "triton", "reference", "cpp"]
Attention: TypeAlias = Literal["triton", "library", "flash", "cudnn"]


@dataclass(frozen=True)
class Choice:
    """Which implementation runs.

    Attributes:
        kernels: "auto" for Triton where the device has it, "triton" for Triton or an error,
            "reference" for plain PyTorch everywhere, "cpp" as "auto", but on a CPU the operations
            in C++ that `cpu.prepare` has made ready.
        attention: who computes it where `kernels` is not "reference": "triton" for what `kernels`
            says; "flash" or "cudnn" for a step's by that library (`library`), or an error;
            "library" for all by the reference, whose fused kernels PyTorch chooses. The last reads
            group lengths on the host, so it waits for the device and can't be captured in a CUDA
            graph.
    """

    kernels: Kernels = "auto"
    attention: Attention = "triton"

    def __post_init__(self) -> None:
        if self.kernels not in ("auto", "triton", "reference", "cpp"):
            raise ValueError(
                f'kernels must be "auto", "triton", "reference" or "cpp", got {self.kernels!r}'
            )
        if self.attention not in get_args(Attention):
            raise ValueError(
                f'attention must be "triton", "library", "flash" or "cudnn", got {self.attention!r}'
            )


_DEFAULT = Choice()
_choice: ContextVar[Choice] = ContextVar("omnigen_fast_kernels", default=_DEFAULT)


def choice() -> Choice:
    """What `use` has set in this context."""
    return _choice.get()


@contextlib.contextmanager
def use(
    kernels: Kernels | None = None,
    attention: Attention | None = None,
) -> Iterator[Choice]:
    """Sets the implementation for the calls inside, in this thread or task only.

    On CPU tensors `use("triton")` runs the kernels in Triton's interpreter, which is for tests and
    needs `TRITON_INTERPRET=1` in the environment before triton is first imported.

    Args:
        kernels: see `Choice`; None leaves it as it is.
        attention: see `Choice`; None leaves it as it is.

    Raises:
        ValueError: an unknown name.
    """
    before = choice()
    chosen = Choice(
        before.kernels if kernels is None else kernels,
        before.attention if attention is None else attention,
    )
    token = _choice.set(chosen)
    try:
        yield chosen
    finally:
        _choice.reset(token)


_Public = TypeVar("_Public", bound=Callable[..., Any])


def _itself(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Operation:
    """What is known here about an operation, besides its reference and its contract.

    Attributes:
        module: the kernel file, with a launcher of the operation's name.
        inputs: number of arguments, not counting `out`.
        has_out: whether the result goes to `out` or to new memory; if not, nothing is returned.
        like: turns the first argument into a tensor of the result's shape and dtype.
    """

    module: str
    inputs: int
    has_out: bool
    like: Callable[[Tensor], Tensor]

    def out(self, args: tuple[Any, ...]) -> Tensor | None:
        """The caller's `out` among the arguments."""
        return args[self.inputs] if len(args) > self.inputs else None


OPERATIONS: dict[str, Operation] = {}

_REFERENCE = SimpleNamespace()
_CPP = SimpleNamespace()
# For meta tensors: a run of the model without values takes the memory that the kernels take.
_SHAPES = SimpleNamespace()
# Held here: the operators live as long as their library.
_LIBRARY = torch.library.Library("omnigen_fast", "DEF")


def _operation(
    module: str, *, writes: tuple[str, ...] = (), like: Callable[[Tensor], Tensor] = _itself
) -> Callable[[_Public], _Public]:
    """Registers a public function and returns it unwrapped, so calls cost nothing extra.

    Its docstring is extended by those of its reference and its contract.

    Args:
        module: see `Operation`.
        writes: arguments other than `out` that are written.
        like: see `Operation`.
    """

    def register(public: _Public) -> _Public:
        name = public.__name__
        run, check = getattr(reference, name), getattr(contract, name)
        names = list(inspect.signature(run).parameters)
        has_out = names[-1] == "out"
        operation = Operation(module, len(names) - has_out, has_out, like)
        OPERATIONS[name] = operation
        shaped = _shaped(operation)
        setattr(_REFERENCE, name, _checked(operation, run, check))
        setattr(_CPP, name, _checked(operation, cpu.OPERATIONS.get(name, run), check))
        setattr(_SHAPES, name, shaped)
        schema = torch.library.infer_schema(run, op_name=name, mutates_args=writes)
        schema = schema.replace(", Tensor? out=None", "")  # a graph plans its own memory
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(name, _bound(name), device)
        torch.library.register_fake(f"omnigen_fast::{name}", shaped, lib=_LIBRARY)
        if public.__doc__:
            parts = (run, check, public)
            public.__doc__ = "\n\n".join(inspect.cleandoc(one.__doc__ or "") for one in parts)
        return public

    return register


def _bound(name: str) -> Callable[..., Any]:
    def run(x: Tensor, *args: Any) -> Any:
        return _call(name, x, *args)

    return run


def _checked(
    operation: Operation, run: Callable[..., Any], check: Callable[..., None]
) -> Callable[..., Any]:
    """The reference with its arguments checked, as the kernels check theirs."""

    def checked(*args: Any) -> Any:
        check(*args[: operation.inputs])
        out = operation.out(args)
        if out is not None:
            contract.same("out", out, operation.like(args[0]))
        return run(*args)

    return checked


def _shaped(operation: Operation) -> Callable[..., Tensor | None]:
    """What an operation allocates and returns, without values."""

    def shaped(*args: Any) -> Tensor | None:
        if not operation.has_out:
            return None
        out = operation.out(args)
        if out is not None:
            return out
        like = operation.like(args[0])
        return torch.empty(like.shape, dtype=like.dtype, device=like.device)

    return shaped


@lru_cache(maxsize=1)
def _triton() -> SimpleNamespace:
    """The Triton launchers; imported here, since that takes a second.

    Raises:
        ImportError: there is no triton.
    """
    return SimpleNamespace(
        **{
            name: getattr(importlib.import_module(f"{__package__}.{one.module}"), name)
            for name, one in OPERATIONS.items()
        }
    )


@lru_cache(maxsize=1)
def _triton_library_attention() -> SimpleNamespace:
    library = {
        name: getattr(_REFERENCE, name)
        for name, one in OPERATIONS.items()
        if one.module.startswith("attention")
    }
    return SimpleNamespace(**(vars(_triton()) | library))


@lru_cache(maxsize=16)
def _with_library(of: str, name: library.Library) -> SimpleNamespace:
    """An implementation with a library's attention in a step: Triton's, C++'s, or plain."""
    base = _implementation_of(of)
    return SimpleNamespace(**(vars(base) | library.operations(name, base.join_segments)))


def _implementation_of(kind: str) -> SimpleNamespace:
    """See `_kind`."""
    if kind == "triton":
        return _triton()
    return _CPP if kind == "cpp" else _REFERENCE


@lru_cache(maxsize=4)
def _shapes_of(attention: Attention) -> SimpleNamespace:
    """What a run without values allocates where this computes the attention."""
    if attention not in library.LIBRARIES:
        return _SHAPES
    return SimpleNamespace(**(vars(_SHAPES) | library.shapes(_SHAPES.attention_step)))


@lru_cache(maxsize=1)
def _interpreted() -> bool:
    """Whether the kernels run in the interpreter, on tensors of any device."""
    from triton.runtime.interpreter import InterpretedFunction

    from .rms_norm import rms_norm_kernel

    return isinstance(rms_norm_kernel, InterpretedFunction)


@lru_cache(maxsize=64)
def _why_not(device: int | None) -> str | None:
    """What keeps the kernels from a CUDA device; None where they run."""
    architecture = launch.architecture_of(device)
    if architecture is not None:
        entry = launch.entry_of(architecture)
        if entry is None:
            return f"{architecture} is not gfx90a, gfx94x, gfx95x, gfx11 or gfx12"
        if entry != architecture:
            _log.warning("No launch configurations for %s: those of %s run.", architecture, entry)
    elif torch.version.cuda is None:
        return "this build of PyTorch is not for CUDA or ROCm"
    else:
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    try:
        _triton()
    except ImportError as error:
        return f"triton can't be imported ({error})"
    return None


def capturable(device: torch.device) -> bool:
    """Whether the operations on a device can be captured in a CUDA graph, as `use` has them now.

    That takes the Triton kernels: the reference, also as "library" attention, reads lengths on the
    device from the host, so it waits.
    """
    chosen = _choice.get()
    return (
        device.type == "cuda"
        and chosen.kernels != "reference"
        and chosen.attention != "library"
        and _why_not(device.index) is None
    )


@lru_cache(maxsize=1)
def _notice(reason: str) -> None:
    _log.warning("The Triton kernels can't run here: %s. Plain PyTorch runs instead.", reason)


def attention_rotates() -> bool:
    """Whether the attention of a step, as `use` has it now, had better rotate its queries itself.

    A library can't: it would take a copy of them.
    """
    return torch.compiler.is_compiling() or _choice.get().attention not in library.LIBRARIES


def _implementation(x: Tensor) -> SimpleNamespace:
    """The implementation for tensors like `x`."""
    chosen = _choice.get()
    if chosen.kernels == "reference":
        return _REFERENCE
    if not isinstance(x, Tensor):
        return _REFERENCE  # whose check says so
    if x.device.type == "meta":
        return _SHAPES if chosen.attention == "triton" else _shapes_of(chosen.attention)
    of = _kind(x, chosen.kernels)
    if chosen.attention in library.LIBRARIES:
        return _with_library(of, chosen.attention)
    if of == "triton" and chosen.attention == "library":
        return _triton_library_attention()
    return _implementation_of(of)


def _kind(x: Tensor, kernels: Kernels) -> Literal["triton", "cpp", "reference"]:
    """Who has the operations for a tensor that has values."""
    if kernels in ("auto", "cpp"):
        if not x.is_cuda:
            return "cpp" if kernels == "cpp" and x.device.type == "cpu" else "reference"
        reason = _why_not(x.device.index)
        if reason is not None:
            _notice(reason)
            return "reference"
    elif x.is_cuda:
        reason = _why_not(x.device.index)
        if reason is not None:
            raise RuntimeError(f"the Triton kernels can't run on {x.device}: {reason}")
    elif not _interpreted():
        raise RuntimeError(
            f"Triton kernels on {x.device.type} tensors need its interpreter: set "
            "TRITON_INTERPRET=1 in the environment before triton is first imported"
        )
    return "triton"


def _call(name: str, x: Tensor, *args: Any) -> Any:
    """Runs an operation eagerly on the device of `x`, its first argument."""
    run = getattr(_implementation(x), name)
    # Triton launches on the current device
    if isinstance(x, Tensor) and x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return run(x, *args)
    return run(x, *args)


def _trace(name: str, *args: Any) -> Any:
    """Records the custom operator; a result that is wanted elsewhere is copied there."""
    operation = OPERATIONS[name]
    result = getattr(torch.ops.omnigen_fast, name)(*args[: operation.inputs])
    out = operation.out(args)
    return result if out is None else out.copy_(result)


@_operation("rms_norm")
def rms_norm(
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    out: Tensor | None = None,  # [rows, hidden]
) -> Tensor:  # [rows, hidden]
    """See `reference.rms_norm` and `contract.rms_norm`."""
    run = _trace if torch.compiler.is_compiling() else _call
    return run("rms_norm", x, weight, eps, out)


@_operation("quantise", writes=("values", "scales"))
def quantise_(
    x: Tensor,  # [rows, width]
    values: Tensor,  # [rows, width], int8 or float8_e4m3fn, written
    scales: Tensor,  # [rows], float32, written
) -> None:
    """See `reference.quantise_` and `contract.quantise_`."""
    run = _trace if torch.compiler.is_compiling() else _call
    run("quantise_", x, values, scales)


@_operation("rms_norm", writes=("values", "scales"))
def rms_norm_quantise_(
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    values: Tensor,  # [rows, hidden], int8 or float8_e4m3fn, written
    scales: Tensor,  # [rows], float32, written
) -> None:
    """See `reference.rms_norm_quantise_` and `contract.rms_norm_quantise_`."""
    run = _trace if torch.compiler.is_compiling() else _call
    run("rms_norm_quantise_", x, weight, eps, values, scales)


@_operation("product", writes=("result",))
def scaled_mm_(
    values: Tensor,  # [rows, width], int8 or float8_e4m3fn
    scales: Tensor,  # [rows], float32
    weight: Tensor,  # [columns, width], of the dtype of values
    weight_scales: Tensor,  # [columns], float32
    result: Tensor,  # [rows, columns], written
    accumulate: bool = False,  # whether the product is added to what is there
) -> None:
    """See `reference.scaled_mm_` and `contract.scaled_mm_`."""
    run = _trace if torch.compiler.is_compiling() else _call
    run("scaled_mm_", values, scales, weight, weight_scales, result, accumulate)


@_operation("rope", writes=("qkv",))
def rope_(
    qkv: Tensor,  # [rows, (heads + 2 * kv_heads) * head_dim], q and k rotated in place
    cos: Tensor,  # [rows, head_dim / 2], float32
    sin: Tensor,  # [rows, head_dim / 2], float32
    heads: int,
    kv_heads: int,
    keys_only: bool = False,  # whether q stays as it is, for attention to rotate
) -> None:
    """See `reference.rope_` and `contract.rope_`."""
    run = _trace if torch.compiler.is_compiling() else _call
    run("rope_", qkv, cos, sin, heads, kv_heads, keys_only)


@_operation("rope", writes=("qkv", "k_cache", "v_cache"))
def rope_cache_(
    qkv: Tensor,  # [rows, (heads + 2 * kv_heads) * head_dim], q and k rotated in place
    cos: Tensor,  # [rows, head_dim / 2], float32
    sin: Tensor,  # [rows, head_dim / 2], float32
    heads: int,
    kv_heads: int,
    k_cache: Tensor,  # [cache rows, kv_heads, head_dim], written at `cache_rows`
    v_cache: Tensor,  # [cache rows, kv_heads, head_dim], written at `cache_rows`
    cache_rows: Tensor,  # [rows], int64, distinct, inside the cache
) -> None:
    """See `reference.rope_cache_` and `contract.rope_cache_`."""
    run = _trace if torch.compiler.is_compiling() else _call
    run("rope_cache_", qkv, cos, sin, heads, kv_heads, k_cache, v_cache, cache_rows)


@_operation("quantise", writes=("k_cache", "v_cache"))
def quantise_cache_(
    k: Tensor,  # [rows, kv_heads, head_dim]
    v: Tensor,  # [rows, kv_heads, head_dim]
    k_cache: Tensor,  # [cache rows, width], int8 or uint8, written at `cache_rows`
    v_cache: Tensor,  # [cache rows, width], of the dtype of k_cache, written at `cache_rows`
    cache_rows: Tensor,  # [rows], int64, distinct, inside the cache
) -> None:
    """See `reference.quantise_cache_` and `contract.quantise_cache_`."""
    run = _trace if torch.compiler.is_compiling() else _call
    run("quantise_cache_", k, v, k_cache, v_cache, cache_rows)


@_operation("attention")
def attention_step(
    q: Tensor,  # [rows, heads, head_dim]
    k: Tensor,  # [keys, kv_heads, head_dim]
    v: Tensor,  # [keys, kv_heads, head_dim]
    k_cache: Tensor,  # [cache rows, kv_heads, head_dim], one layer of the condition cache
    v_cache: Tensor,  # [cache rows, kv_heads, head_dim]
    cu_rows: Tensor,  # [groups + 1], int32: group g has rows cu_rows[g] to cu_rows[g + 1]
    cache_start: Tensor,  # [groups], int32: its first cache row
    cache_len: Tensor,  # [groups], int32: how many cache rows it sees, may be 0
    max_rows: int,  # rows of the longest group
    cu_keys: Tensor | None = None,  # [groups + 1], int32: as cu_rows, of k and v where they differ
    cos: Tensor | None = None,  # [rows, head_dim / 2], float32: of q's rotation, if it has none yet
    sin: Tensor | None = None,  # [rows, head_dim / 2], float32
    spans: list[int] | None = None,  # [6 * groups]: what the five tensors say, for libraries
    out: Tensor | None = None,  # [rows, heads, head_dim]
) -> Tensor:  # [rows, heads, head_dim]
    """See `reference.attention_step` and `contract.attention_step`."""
    run = _trace if torch.compiler.is_compiling() else _call
    places = cu_rows, cache_start, cache_len, max_rows, cu_keys, cos, sin, spans
    return run("attention_step", q, k, v, k_cache, v_cache, *places, out)


@_operation("join")
def join_segments(
    a: Tensor,  # [rows, heads, head_dim]: attention over one segment of keys
    a_lse: Tensor,  # [rows, heads], float32: log-sum-exp of its scaled scores
    b: Tensor,  # [rows, heads, head_dim]: over another
    b_lse: Tensor,  # [rows, heads], float32
    out: Tensor | None = None,  # [rows, heads, head_dim]
) -> Tensor:  # [rows, heads, head_dim]
    """See `reference.join_segments` and `contract.join_segments`."""
    run = _trace if torch.compiler.is_compiling() else _call
    return run("join_segments", a, a_lse, b, b_lse, out)


@_operation("attention_8bit")
def attention_step_8bit(
    q: Tensor,  # [rows, heads, head_dim]
    k: Tensor,  # [keys, kv_heads, head_dim]
    v: Tensor,  # [keys, kv_heads, head_dim]
    k_cache: Tensor,  # [cache rows, width], int8 or uint8, one layer of the condition cache
    v_cache: Tensor,  # [cache rows, width], of the dtype of k_cache
    cu_rows: Tensor,  # [groups + 1], int32: group g has rows cu_rows[g] to cu_rows[g + 1]
    cache_start: Tensor,  # [groups], int32: its first cache row
    cache_len: Tensor,  # [groups], int32: how many cache rows it sees, may be 0
    max_rows: int,  # rows of the longest group
    cu_keys: Tensor | None = None,  # [groups + 1], int32: as cu_rows, of k and v where they differ
    cos: Tensor | None = None,  # [rows, head_dim / 2], float32: of q's rotation, if it has none yet
    sin: Tensor | None = None,  # [rows, head_dim / 2], float32
    out: Tensor | None = None,  # [rows, heads, head_dim]
) -> Tensor:  # [rows, heads, head_dim]
    """See `reference.attention_step_8bit` and `contract.attention_step_8bit`."""
    run = _trace if torch.compiler.is_compiling() else _call
    places = cu_rows, cache_start, cache_len, max_rows, cu_keys, cos, sin
    return run("attention_step_8bit", q, k, v, k_cache, v_cache, *places, out)


@_operation("attention")
def attention_prefill(
    q: Tensor,  # [rows, heads, head_dim]
    k: Tensor,  # [rows, kv_heads, head_dim]
    v: Tensor,  # [rows, kv_heads, head_dim]
    cu_rows: Tensor,  # [groups + 1], int32
    kv_end: Tensor,  # [rows], int32, counted from the first row of the row's group
    max_rows: int,  # rows of the longest group
    first: int = 0,  # of each group, the row whose attention is wanted first
    out: Tensor | None = None,  # [rows, heads, head_dim]
) -> Tensor:  # [rows, heads, head_dim]
    """See `reference.attention_prefill` and `contract.attention_prefill`."""
    run = _trace if torch.compiler.is_compiling() else _call
    return run("attention_prefill", q, k, v, cu_rows, kv_end, max_rows, first, out)


def _gate(gate_up: Tensor) -> Tensor:
    """The first half of the columns."""
    return gate_up[:, : gate_up.shape[1] // 2]


@_operation("swiglu", like=_gate)
def swiglu(
    gate_up: Tensor,  # [rows, 2 * intermediate], gate first
    out: Tensor | None = None,  # [rows, intermediate]; may be gate_up's own first half
) -> Tensor:  # [rows, intermediate]
    """See `reference.swiglu` and `contract.swiglu`."""
    run = _trace if torch.compiler.is_compiling() else _call
    return run("swiglu", gate_up, out)


@_operation("swiglu", writes=("values", "scales"))
def swiglu_quantise_(
    gate_up: Tensor,  # [rows, 2 * intermediate], gate first
    values: Tensor,  # [rows, intermediate], int8 or float8_e4m3fn, written
    scales: Tensor,  # [rows], float32, written
) -> None:
    """See `reference.swiglu_quantise_` and `contract.swiglu_quantise_`."""
    run = _trace if torch.compiler.is_compiling() else _call
    run("swiglu_quantise_", gate_up, values, scales)


@_operation("modulate")
def modulate(
    x: Tensor,  # [rows, hidden]: equal groups of rows, one after the other
    shift: Tensor,  # [steps, hidden]
    scale: Tensor,  # [steps, hidden]
    step: Tensor,  # [groups], int64: the row of both that each group takes
    eps: float,
    out: Tensor | None = None,  # [rows, hidden]; may be x
) -> Tensor:  # [rows, hidden]
    """See `reference.modulate` and `contract.modulate`."""
    run = _trace if torch.compiler.is_compiling() else _call
    return run("modulate", x, shift, scale, step, eps, out)


@_operation("guidance", writes=("latents",))
def guidance_step_(
    latents: Tensor,  # [images, channels, height, width], float32, updated in place
    prediction: Tensor,  # [groups, tokens, patch * patch * channels], (row, column, channel)
    coefficient: Tensor,  # [groups], float32: the weight of each branch's velocity
    cu_groups: Tensor,  # [images + 1], int32: image i has groups cu_groups[i] to cu_groups[i + 1]
    lengths: Tensor,  # [steps], float32: of the Euler steps
    step: Tensor,  # [images], int64: the one that each image takes
    patch: int,
) -> None:
    """See `reference.guidance_step_` and `contract.guidance_step_`."""
    run = _trace if torch.compiler.is_compiling() else _call
    run("guidance_step_", latents, prediction, coefficient, cu_groups, lengths, step, patch)


@_operation("dequantise", writes=("weight",))
def dequantise_int8_(
    weight: Tensor,  # [rows, columns], written
    values: Tensor,  # [rows, groups * 64], int8
    scales: Tensor,  # [rows, groups], bfloat16
) -> None:
    """See `reference.dequantise_int8_` and `contract.dequantise_int8_`."""
    run = _trace if torch.compiler.is_compiling() else _call
    run("dequantise_int8_", weight, values, scales)


@_operation("dequantise", writes=("weight",))
def dequantise_fp8_(
    weight: Tensor,  # [rows, columns], written
    values: Tensor,  # [rows, columns], uint8: bits of float8_e4m3fn
    scales: Tensor,  # [rows, 1], float32
) -> None:
    """See `reference.dequantise_fp8_` and `contract.dequantise_fp8_`."""
    run = _trace if torch.compiler.is_compiling() else _call
    run("dequantise_fp8_", weight, values, scales)


@_operation("dequantise", writes=("weight",))
def dequantise_nf4_(
    weight: Tensor,  # [rows, columns], written
    values: Tensor,  # [rows, groups * 32], uint8: two places in `reference.NF4`
    scales: Tensor,  # [rows, groups], uint8
    ranges: Tensor,  # [rows, 2], float32: lowest scale and step of the scales
) -> None:
    """See `reference.dequantise_nf4_` and `contract.dequantise_nf4_`."""
    run = _trace if torch.compiler.is_compiling() else _call
    run("dequantise_nf4_", weight, values, scales, ranges)
