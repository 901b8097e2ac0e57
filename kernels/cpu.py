"""Operations in C++ for CPUs with AVX512: built where they run, loaded once in a process.

`cpu.cpp` is compiled by the machine's own C++ compiler in two seconds, without headers of PyTorch,
for each head_dim. What is built is kept in a folder and found there by the digest of source,
compiler and options, so other processes and other CPUs of that kind load it. The operations take
bfloat16; the reference does what they don't take: other dtypes, and widths that fill no register.

PyTorch's attention on such a CPU multiplies at a third of the rate of its matrix products, since
its packed products need AMX. Here keys and values are packed once for all queries, cached and own
ones are one run of keys, and scores stay in the cache. Products are of bfloat16 only where that is
the faster dtype (`widened`). Where there is AMX, PyTorch's attention stays.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from . import reference, widened

_SOURCE = Path(__file__).with_name("cpu.cpp")
# Of any CPU with AVX512: what is built is not tied to the one that built it.
_FEATURES = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")
_OPTIONS = (
    *("-O3", "-std=c++17", "-fopenmp", "-shared", "-fPIC"),
    *(f"-m{one}" for one in _FEATURES),
)
_SECONDS = 120  # a compiler that takes longer hangs
_LANES, _TILE, _ROWS = 16, 64, 72  # as in the source
_LARGEST_HEAD = 256
# Fewer values than this are not worth waking another thread for.
_VALUES_PER_THREAD = 1 << 14


class Unavailable(Exception):
    """The operations can't be had here; says why, in one line."""


class _Keys(ctypes.Structure):
    """`Keys` of the source."""

    _fields_ = [
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("k_stride", ctypes.c_int64),
        ("v_stride", ctypes.c_int64),
        ("count", ctypes.c_int64),
    ]


class _Angles(ctypes.Structure):
    """`Angles` of the source."""

    _fields_ = [
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("cos_stride", ctypes.c_int64),
        ("sin_stride", ctypes.c_int64),
    ]


_P, _I, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_K, _A = ctypes.POINTER(_Keys), ctypes.POINTER(_Angles)
_SIGNATURES = {
    "attention_step": (_P, _I, _P, _I, _I, _I, _I, _K, _K, _P, _I, _A, _N),
    "rms_norm": (_P, _I, _P, _P, _I, _I, _I, ctypes.c_float, _N),
    "rope": (_P, _I, _P, _I, _P, _I, _I, _I, _I, _N),
    "swiglu": (_P, _I, _P, _I, _I, _I, _N),
}


@dataclass(frozen=True)
class Builder:
    """Where operations are built.

    Attributes:
        compiler: command of a C++ compiler that takes the options of g++ and clang++.
        folder: where what is built is kept. Without one, or where it can't be written or others
            can write to it, every process builds its own.
        bfloat16: whether the CPU has instructions for bfloat16.
        wide: whether products are of float32; they have to be where it has none.
    """

    compiler: Sequence[str]
    folder: Path | None
    bfloat16: bool
    wide: bool

    @classmethod
    def of_this_cpu(cls, compiler: Sequence[str], folder: Path | None) -> Builder:
        """A builder of what is fastest here."""
        bfloat16 = torch.cpu._is_avx512_bf16_supported()
        return cls(compiler, folder, bfloat16, not bfloat16 or widened.faster(torch.bfloat16))

    def library(self, head_dim: int) -> ctypes.CDLL:
        """The operations for heads of a size, built unless they are kept.

        Raises:
            Unavailable: there is no compiler, it fails, or what it built can't be loaded.
        """
        program, *more = self.compiler
        found = shutil.which(program)
        if found is None:
            raise Unavailable(f"there is no C++ compiler {program!r}")
        options = [*more, *_OPTIONS, f"-DHEAD_DIM={head_dim}", f"-DWIDE={int(self.wide)}"]
        if self.bfloat16:
            options.append("-mavx512bf16")
        try:
            about = os.stat(found)
            parts = [_SOURCE.read_text(encoding="utf-8"), found, *options]
            parts += [str(about.st_size), str(about.st_mtime_ns)]
            digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
            kept = None
            if self.folder is not None and _private(self.folder):
                kept = self.folder / f"cpu-{digest}.so"
                with contextlib.suppress(OSError):  # there is none yet, or a damaged one
                    return _load(kept)
            with tempfile.TemporaryDirectory(prefix="omnigen-fast-") as scratch:
                built = Path(scratch) / "cpu.so"
                _compile([found, *options, str(_SOURCE), "-o", str(built)])
                library = _load(built)
                if kept is not None:
                    with contextlib.suppress(OSError):  # a full or read-only disk
                        _keep(built, kept)
                return library
        except OSError as error:
            raise Unavailable(str(error)) from error


def _private(folder: Path) -> bool:
    """Whether a folder is there, or made now, to which nobody else can write code."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except OSError:
        return False
    return about.st_uid == os.getuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"{command[0]} took more than {_SECONDS} s") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or ["no reason given"]
        raise Unavailable(f"{command[0]} failed: {said[0].strip()[:200]}")


def _keep(built: Path, kept: Path) -> None:
    """Moves a file into the folder whole: another process may do the same."""
    with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
        try:
            file.write(built.read_bytes())
            file.flush()
            os.replace(file.name, kept)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            raise OSError(f"{path} lacks {name}")
        function.argtypes, function.restype = arguments, None
    return library


def why_not() -> str | None:
    """What keeps this CPU from the operations; None if it can have them."""
    if os.name != "posix" or not torch.cpu._is_avx512_supported():
        return "the CPU has no AVX512"
    return None


_libraries: dict[int, ctypes.CDLL] = {}  # by head_dim


def prepare(builder: Builder, head_dim: int) -> None:
    """Builds or loads the operations for heads of a size; later calls of them find these.

    Raises:
        Unavailable: they can't be had; says why.
    """
    reason = why_not()
    if reason is not None:
        raise Unavailable(reason)
    if head_dim % _LANES or not 0 < head_dim <= _LARGEST_HEAD:
        raise Unavailable(f"heads of {head_dim} features are not a multiple of 16 up to 256")
    if head_dim not in _libraries:
        _libraries[head_dim] = builder.library(head_dim)


def _any_library() -> ctypes.CDLL | None:
    """For operations that don't depend on the size of a head."""
    return next(iter(_libraries.values()), None)


@lru_cache(maxsize=1)
def _has_amx() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _threads(values: int) -> int:
    return max(1, min(torch.get_num_threads(), values // _VALUES_PER_THREAD))


def _takes(library: ctypes.CDLL | None, width: int, *tensors: Tensor) -> bool:
    return (
        library is not None
        and not width % _LANES
        and all(one.dtype == torch.bfloat16 for one in tensors)
    )


def _turns(cos: Tensor, sin: Tensor | None) -> bool:
    """Whether the rotation by these angles is here."""
    assert sin is not None
    return cos.dtype == sin.dtype == torch.float32 and not cos.shape[1] % _LANES


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """See `reference.rms_norm`."""
    library = _any_library()
    if not _takes(library, x.shape[1], x, weight):
        return reference.rms_norm(x, weight, eps, out)
    assert library is not None
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    rows, width = x.shape
    library.rms_norm(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        out.data_ptr(),
        out.stride(0),
        rows,
        width,
        eps,
        _threads(rows * width),
    )
    return out


def rope_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    keys_only: bool = False,
) -> None:
    """See `reference.rope_`."""
    library, half = _any_library(), cos.shape[1]
    if not (_turns(cos, sin) and _takes(library, half, qkv)):
        return reference.rope_(qkv, cos, sin, heads, kv_heads, keys_only)
    assert library is not None
    if keys_only:
        qkv, heads = qkv[:, 2 * heads * half :], 0
    library.rope(
        qkv.data_ptr(),
        qkv.stride(0),
        cos.data_ptr(),
        cos.stride(0),
        sin.data_ptr(),
        sin.stride(0),
        len(qkv),
        heads + kv_heads,
        half,
        _threads(len(qkv) * (heads + kv_heads) * 2 * half),
    )


def rope_cache_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_rows: Tensor,
) -> None:
    """See `reference.rope_cache_`."""
    rope_(qkv, cos, sin, heads, kv_heads)
    reference._write_cache_(qkv, heads, kv_heads, k_cache, v_cache, cache_rows)


def swiglu(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """See `reference.swiglu`."""
    library, rows, width = _any_library(), len(gate_up), gate_up.shape[1] // 2
    if not _takes(library, width, gate_up):
        return reference.swiglu(gate_up, out)
    assert library is not None
    out = gate_up.new_empty(rows, width) if out is None else out
    library.swiglu(
        gate_up.data_ptr(),
        gate_up.stride(0),
        out.data_ptr(),
        out.stride(0),
        rows,
        width,
        _threads(rows * width),
    )
    return out


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cu_rows: Tensor,
    cache_start: Tensor,
    cache_len: Tensor,
    max_rows: int,
    cu_keys: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    spans: list[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `reference.attention_step`."""
    head_dim = q.shape[2]
    library = None if _has_amx() else _libraries.get(head_dim)
    if not (_takes(library, head_dim, q) and (cos is None or _turns(cos, sin))):
        given = cu_rows, cache_start, cache_len, max_rows, cu_keys, cos, sin, spans
        return reference.attention_step(q, k, v, k_cache, v_cache, *given, out)
    assert library is not None
    out = torch.empty(q.shape, dtype=q.dtype) if out is None else out
    heads, kv_heads, threads = q.shape[1], k.shape[1], torch.get_num_threads()
    own_keys = (cu_rows if cu_keys is None else cu_keys).tolist()
    places = pairwise(own_keys), cache_start.tolist(), cache_len.tolist()
    groups = list(zip(pairwise(cu_rows.tolist()), *places))
    # so many heads at once that every thread has some blocks of queries
    blocks = max(1, heads // kv_heads * -(-max_rows // _ROWS))
    at_once = min(kv_heads, -(-4 * threads // blocks))
    tiles = max(
        (-(-(end - key) // _TILE) + -(-length // _TILE) for _, (key, end), _, length in groups),
        default=0,
    )
    operand = ctypes.c_int64.in_dll(library, "operand_bytes").value
    packed = torch.empty(2 * at_once * tiles * _TILE * head_dim * operand, dtype=torch.uint8)
    for (start, stop), (key, end), first, length in groups:
        if start == stop:
            continue
        cached = _keys(k_cache, v_cache, first, length)
        own = _keys(k, v, key, end - key)
        angles = None
        if cos is not None and sin is not None:
            angles = ctypes.byref(_angles(cos, sin, start))
        library.attention_step(
            q.data_ptr() + start * q.stride(0) * q.element_size(),
            q.stride(0),
            out.data_ptr() + start * out.stride(0) * out.element_size(),
            out.stride(0),
            stop - start,
            heads,
            kv_heads,
            ctypes.byref(cached),
            ctypes.byref(own),
            packed.data_ptr(),
            at_once,
            angles,
            threads,
        )
    return out


def _keys(k: Tensor, v: Tensor, first: int, count: int) -> _Keys:
    size = k.element_size()
    return _Keys(
        k.data_ptr() + first * k.stride(0) * size,
        v.data_ptr() + first * v.stride(0) * size,
        k.stride(0),
        v.stride(0),
        count,
    )


def _angles(cos: Tensor, sin: Tensor, first: int) -> _Angles:
    """From a row on."""
    places = [one.data_ptr() + first * one.stride(0) * one.element_size() for one in (cos, sin)]
    return _Angles(*places, cos.stride(0), sin.stride(0))


# What is here; the reference does the rest.
OPERATIONS: dict[str, Callable[..., Tensor | None]] = {
    "rms_norm": rms_norm,
    "rope_": rope_,
    "rope_cache_": rope_cache_,
    "swiglu": swiglu,
    "attention_step": attention_step,
}
