"""The one door to the operations: callers import from here and never choose an implementation.

`reference` says what each operation computes, `contract` what it demands of its arguments. Tensors
on a CUDA device of capability 8.0 or later go to the Triton kernels, all others to the reference;
where a CUDA device can't have the kernels, one warning is logged and the reference runs. On meta
tensors, which have no values, an operation only allocates what its kernel would. Called eagerly, an
operation is a plain call. Under `torch.compile` it is a custom operator of the namespace
`omnigen_fast`, so graphs do not break. Forward only: no operation has a derivative.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Literal

import torch
from torch import Tensor

from . import contract, reference

__all__ = [
    "Choice",
    "add_rms_norm",
    "attention_prefill",
    "attention_step",
    "capturable",
    "choice",
    "guidance_step_",
    "modulate",
    "rms_norm",
    "rope_",
    "rope_cache_",
    "swiglu",
    "use",
]

_log = logging.getLogger("omnigen_fast")

# Where each operation's kernel stands.
_FILES = {
    "rms_norm": "rms_norm",
    "add_rms_norm": "rms_norm",
    "rope_": "rope",
    "rope_cache_": "rope",
    "attention_step": "attention",
    "attention_prefill": "attention",
    "swiglu": "swiglu",
    "modulate": "modulate",
    "guidance_step_": "guidance",
}
_ATTENTION = ("attention_step", "attention_prefill")
_OLDEST = (8, 0)


@dataclass(frozen=True)
class Choice:
    """Which implementation runs.

    Attributes:
        kernels: "auto" for Triton where the device has it, "triton" for Triton or an error,
            "reference" for plain PyTorch everywhere.
        attention: "triton", or "library" for PyTorch's attention (flash attention on CUDA) with
            the segments joined by their log-sum-exp. The library's reads group lengths on the
            host, so it waits for the device and can't be captured in a CUDA graph.
    """

    kernels: Literal["auto", "triton", "reference"] = "auto"
    attention: Literal["triton", "library"] = "triton"

    def __post_init__(self) -> None:
        if self.kernels not in ("auto", "triton", "reference"):
            raise ValueError(
                f'kernels must be "auto", "triton" or "reference", got {self.kernels!r}'
            )
        if self.attention not in ("triton", "library"):
            raise ValueError(f'attention must be "triton" or "library", got {self.attention!r}')


_DEFAULT = Choice()
_choice: ContextVar[Choice] = ContextVar("omnigen_fast_kernels", default=_DEFAULT)


def choice() -> Choice:
    """What `use` has set in this context."""
    return _choice.get()


@contextlib.contextmanager
def use(
    kernels: Literal["auto", "triton", "reference"] | None = None,
    attention: Literal["triton", "library"] | None = None,
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
    named = {"kernels": kernels, "attention": attention}
    chosen = replace(choice(), **{name: one for name, one in named.items() if one is not None})
    token = _choice.set(chosen)
    try:
        yield chosen
    finally:
        _choice.reset(token)


# Operations that write where the caller wants, and how many arguments stand before `out`.
_BEFORE_OUT = {
    "rms_norm": 3,
    "add_rms_norm": 4,
    "attention_step": 9,
    "attention_prefill": 7,
    "swiglu": 1,
    "modulate": 5,
}


def _checked(name: str) -> Callable:
    check, run = getattr(contract, name), getattr(reference, name)
    before_out = _BEFORE_OUT.get(name)

    def checked(*args):
        check(*args[:before_out])
        if before_out is not None and len(args) > before_out and args[-1] is not None:
            like = args[0]
            if name == "swiglu":
                like = like[:, : like.shape[1] // 2]
            contract.same("out", args[-1], like)
        return run(*args)

    return checked


_REFERENCE = SimpleNamespace(**{name: _checked(name) for name in _FILES})


def _fresh(x: Tensor, *_) -> Tensor:
    """What the operations allocate: the shape of their first argument, rows close together."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _nothing(*_) -> None:
    return None


# What each operation allocates and returns, without values.
_FAKE = {
    "rms_norm": _fresh,
    "add_rms_norm": _fresh,
    "attention_step": _fresh,
    "attention_prefill": _fresh,
    "modulate": _fresh,
    "swiglu": lambda gate_up: gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2)),
    "rope_": _nothing,
    "rope_cache_": _nothing,
    "guidance_step_": _nothing,
}


def _shaped(name: str) -> Callable:
    fake, before_out = _FAKE[name], _BEFORE_OUT.get(name)

    def shaped(*args):
        if before_out is not None and len(args) > before_out and args[-1] is not None:
            return args[-1]
        return fake(*args[:before_out])

    return shaped


# For meta tensors: a run of the model without values takes the memory that the kernels take.
_SHAPES = SimpleNamespace(**{name: _shaped(name) for name in _FILES})


@lru_cache(maxsize=1)
def _triton() -> SimpleNamespace:
    """The Triton launchers; imported here, since that takes a second.

    Raises:
        ImportError: there is no triton.
    """
    package = __package__
    return SimpleNamespace(
        **{
            name: getattr(importlib.import_module(f"{package}.{file}"), name)
            for name, file in _FILES.items()
        }
    )


@lru_cache(maxsize=1)
def _triton_library_attention() -> SimpleNamespace:
    library = {name: getattr(_REFERENCE, name) for name in _ATTENTION}
    return SimpleNamespace(**(vars(_triton()) | library))


@lru_cache(maxsize=1)
def _interpreted() -> bool:
    """Whether the kernels run in the interpreter, on tensors of any device."""
    from triton.runtime.interpreter import InterpretedFunction

    from .rms_norm import rms_norm_kernel

    return isinstance(rms_norm_kernel, InterpretedFunction)


@lru_cache(maxsize=64)
def _why_not(device: int | None) -> str | None:
    """What keeps the kernels from a CUDA device; None where they run."""
    if torch.version.cuda is None:
        return "this build of PyTorch is not for CUDA"
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

    That takes the Triton kernels: reference and library attention read lengths on the host, so they
    wait for the device.
    """
    chosen = _choice.get()
    return (
        device.type == "cuda"
        and chosen.kernels != "reference"
        and chosen.attention == "triton"
        and _why_not(device.index) is None
    )


@lru_cache(maxsize=1)
def _notice(reason: str) -> None:
    _log.warning("The Triton kernels can't run here: %s. Plain PyTorch runs instead.", reason)


def _implementation(x: Tensor) -> SimpleNamespace:
    """The implementation for tensors like `x`."""
    chosen = _choice.get()
    if chosen.kernels == "reference":
        return _REFERENCE
    if not isinstance(x, Tensor):
        return _REFERENCE  # whose check says so
    if x.device.type == "meta":
        return _SHAPES
    if chosen.kernels == "auto":
        if not x.is_cuda:
            return _REFERENCE
        reason = _why_not(x.device.index)
        if reason is not None:
            _notice(reason)
            return _REFERENCE
    elif x.is_cuda:
        reason = _why_not(x.device.index)
        if reason is not None:
            raise RuntimeError(f"the Triton kernels can't run on {x.device}: {reason}")
    elif not _interpreted():
        raise RuntimeError(
            f"Triton kernels on {x.device.type} tensors need its interpreter: set "
            "TRITON_INTERPRET=1 in the environment before triton is first imported"
        )
    return _triton() if chosen.attention == "triton" else _triton_library_attention()


def _call(name: str, x: Tensor, *args):
    """Runs an operation eagerly on the device of `x`, its first argument."""
    run = getattr(_implementation(x), name)
    # Triton launches on the current device
    if isinstance(x, Tensor) and x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return run(x, *args)
    return run(x, *args)


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    """A compiled graph plans its own memory; a result that is wanted elsewhere is copied there."""
    return result if out is None else out.copy_(result)


def rms_norm(
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    out: Tensor | None = None,  # [rows, hidden]
) -> Tensor:  # [rows, hidden]
    """See `reference.rms_norm`.

    Raises:
        TypeError, ValueError: see `contract.rms_norm`.
    """
    if torch.compiler.is_compiling():
        return _into(out, torch.ops.omnigen_fast.rms_norm(x, weight, eps))
    return _call("rms_norm", x, weight, eps, out)


def add_rms_norm(
    residual: Tensor,  # [rows, hidden], updated in place
    x: Tensor,  # [rows, hidden]
    weight: Tensor,  # [hidden]
    eps: float,
    out: Tensor | None = None,  # [rows, hidden]
) -> Tensor:  # [rows, hidden]
    """See `reference.add_rms_norm`.

    Raises:
        TypeError, ValueError: see `contract.add_rms_norm`.
    """
    if torch.compiler.is_compiling():
        return _into(out, torch.ops.omnigen_fast.add_rms_norm(residual, x, weight, eps))
    return _call("add_rms_norm", residual, x, weight, eps, out)


def rope_(
    qkv: Tensor,  # [rows, (heads + 2 * kv_heads) * head_dim], q and k rotated in place
    cos: Tensor,  # [rows, head_dim / 2], float32
    sin: Tensor,  # [rows, head_dim / 2], float32
    heads: int,
    kv_heads: int,
) -> None:
    """See `reference.rope_`.

    Raises:
        TypeError, ValueError: see `contract.rope_`.
    """
    if torch.compiler.is_compiling():
        torch.ops.omnigen_fast.rope_(qkv, cos, sin, heads, kv_heads)
        return
    _call("rope_", qkv, cos, sin, heads, kv_heads)


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
    """See `reference.rope_cache_`.

    Raises:
        TypeError, ValueError: see `contract.rope_cache_`.
    """
    args = (qkv, cos, sin, heads, kv_heads, k_cache, v_cache, cache_rows)
    if torch.compiler.is_compiling():
        torch.ops.omnigen_fast.rope_cache_(*args)
        return
    _call("rope_cache_", *args)


def attention_step(
    q: Tensor,  # [rows, heads, head_dim]
    k: Tensor,  # [rows, kv_heads, head_dim]
    v: Tensor,  # [rows, kv_heads, head_dim]
    k_cache: Tensor,  # [cache rows, kv_heads, head_dim], one layer of the condition cache
    v_cache: Tensor,  # [cache rows, kv_heads, head_dim]
    cu_rows: Tensor,  # [groups + 1], int32: group g has rows cu_rows[g] to cu_rows[g + 1]
    cache_start: Tensor,  # [groups], int32: its first cache row
    cache_len: Tensor,  # [groups], int32: how many cache rows it sees, may be 0
    max_rows: int,  # rows of the longest group
    out: Tensor | None = None,  # [rows, heads, head_dim]
) -> Tensor:  # [rows, heads, head_dim]
    """See `reference.attention_step`.

    Raises:
        TypeError, ValueError: see `contract.attention_step`.
    """
    args = (q, k, v, k_cache, v_cache, cu_rows, cache_start, cache_len, max_rows)
    if torch.compiler.is_compiling():
        return _into(out, torch.ops.omnigen_fast.attention_step(*args))
    return _call("attention_step", *args, out)


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
    """See `reference.attention_prefill`.

    Raises:
        TypeError, ValueError: see `contract.attention_prefill`.
    """
    args = (q, k, v, cu_rows, kv_end, max_rows, first)
    if torch.compiler.is_compiling():
        return _into(out, torch.ops.omnigen_fast.attention_prefill(*args))
    return _call("attention_prefill", *args, out)


def swiglu(
    gate_up: Tensor,  # [rows, 2 * intermediate], gate first
    out: Tensor | None = None,  # [rows, intermediate]; may be gate_up's own first half
) -> Tensor:  # [rows, intermediate]
    """See `reference.swiglu`.

    Raises:
        TypeError, ValueError: see `contract.swiglu`.
    """
    if torch.compiler.is_compiling():
        return _into(out, torch.ops.omnigen_fast.swiglu(gate_up))
    return _call("swiglu", gate_up, out)


def modulate(
    x: Tensor,  # [rows, hidden]
    shift: Tensor,  # [steps, hidden]
    scale: Tensor,  # [steps, hidden]
    step: Tensor,  # [1], int64: the row of both that counts
    eps: float,
    out: Tensor | None = None,  # [rows, hidden]; may be x
) -> Tensor:  # [rows, hidden]
    """See `reference.modulate`.

    Raises:
        TypeError, ValueError: see `contract.modulate`.
    """
    if torch.compiler.is_compiling():
        return _into(out, torch.ops.omnigen_fast.modulate(x, shift, scale, step, eps))
    return _call("modulate", x, shift, scale, step, eps, out)


def guidance_step_(
    latents: Tensor,  # [images, channels, height, width], float32, updated in place
    prediction: Tensor,  # [groups, tokens, patch * patch * channels], (row, column, channel)
    coefficient: Tensor,  # [groups], float32: what each branch's velocity counts
    cu_groups: Tensor,  # [images + 1], int32: image i has groups cu_groups[i] to cu_groups[i + 1]
    lengths: Tensor,  # [steps], float32: of the Euler steps
    step: Tensor,  # [1], int64: the one that is taken
    patch: int,
) -> None:
    """See `reference.guidance_step_`.

    Raises:
        TypeError, ValueError: see `contract.guidance_step_`.
    """
    args = (latents, prediction, coefficient, cu_groups, lengths, step, patch)
    if torch.compiler.is_compiling():
        torch.ops.omnigen_fast.guidance_step_(*args)
        return
    _call("guidance_step_", *args)


_SCHEMAS = (
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm(Tensor(a!) residual, Tensor x, Tensor weight, float eps) -> Tensor",
    "rope_(Tensor(a!) qkv, Tensor cos, Tensor sin, int heads, int kv_heads) -> ()",
    "rope_cache_(Tensor(a!) qkv, Tensor cos, Tensor sin, int heads, int kv_heads, "
    "Tensor(b!) k_cache, Tensor(c!) v_cache, Tensor cache_rows) -> ()",
    "attention_step(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor cu_rows, "
    "Tensor cache_start, Tensor cache_len, SymInt max_rows) -> Tensor",
    "attention_prefill(Tensor q, Tensor k, Tensor v, Tensor cu_rows, Tensor kv_end, "
    "SymInt max_rows, SymInt first=0) -> Tensor",
    "swiglu(Tensor gate_up) -> Tensor",
    "modulate(Tensor x, Tensor shift, Tensor scale, Tensor step, float eps) -> Tensor",
    "guidance_step_(Tensor(a!) latents, Tensor prediction, Tensor coefficient, Tensor cu_groups, "
    "Tensor lengths, Tensor step, int patch) -> ()",
)


def _register() -> torch.library.Library:
    library = torch.library.Library("omnigen_fast", "DEF")
    for schema in _SCHEMAS:
        name = schema.partition("(")[0]
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("CPU", "CUDA"):
            library.impl(name, _bind(name), device)
        torch.library.register_fake(f"omnigen_fast::{name}", _FAKE[name], lib=library)
    return library


def _bind(name: str) -> Callable:
    def run(x: Tensor, *args):
        return _call(name, x, *args)

    return run


# Held here: the operators live as long as their library.
_LIBRARY = _register()
