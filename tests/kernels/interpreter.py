"""Asks for Triton's interpreter, makes its bfloat16 that of a GPU, and spares it needless work."""

from __future__ import annotations

import os
import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import torch


def start() -> None:
    """From here on Triton kernels run in the interpreter, in this process.

    Raises:
        RuntimeError: triton was imported before, and compiles.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        if "triton" in sys.modules:
            raise RuntimeError(
                "triton was imported before its interpreter was asked for; set TRITON_INTERPRET=1"
            )
        os.environ["TRITON_INTERPRET"] = "1"
    _mend_narrow_floats()
    _look_up_once()


def _look_up_once() -> None:
    """Replaces the language's functions once for each function that uses them.

    The interpreter does so at every call of a function inside a kernel, and lists the dtypes for
    every value: a third of its time.
    """
    from triton.runtime import interpreter

    replace, dtype_of = interpreter._patch_lang, interpreter._get_np_dtype
    dtypes: dict[str, np.dtype] = {}

    @cache
    def replaced(function):
        replace(function)
        return SimpleNamespace(restore=lambda: None)  # nothing here compiles

    def known(dtype):
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = dtype_of(dtype)
        return dtypes[name]

    interpreter._patch_lang = replaced
    interpreter._get_np_dtype = known


def _mend_narrow_floats() -> None:
    """Makes conversions to bfloat16 and fp8 round to nearest even, and products of them products.

    The interpreter cuts the low bits off where every GPU rounds, and multiplies bfloat16 matrices
    by their bits as integers.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    formats = {
        tl.bfloat16: (torch.bfloat16, np.uint16, torch.int16),
        tl.float8e4nv: (torch.float8_e4m3fn, np.uint8, torch.uint8),
    }

    def narrow(src, dst_type):
        to, bits, same = formats[dst_type.scalar]
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(to)
        data = rounded.view(same).numpy().view(bits).reshape(src.data.shape)
        return TensorHandle(data, dst_type.scalar)

    def widen(src):
        if src.dtype.scalar not in formats:
            return src
        if src.dtype.scalar == tl.bfloat16:
            wide = (src.data.astype(np.uint32) << 16).view(np.float32)
            return TensorHandle(wide, tl.float32)
        held, bits, _ = formats[src.dtype.scalar]
        data = torch.from_numpy(np.ascontiguousarray(src.data).view(bits))
        wide = data.view(held).float().numpy().reshape(src.data.shape)
        return TensorHandle(wide, tl.float32)

    def mended(convert):
        def cast(self, src, dst_type, *rest):
            if src.dtype.scalar == tl.float32 and dst_type.scalar in formats:
                return narrow(src, dst_type)
            if src.dtype.scalar in formats and dst_type.scalar == tl.float32:
                return widen(src)
            return convert(self, src, dst_type, *rest)

        return cast

    multiply = InterpreterBuilder.create_dot

    def dot(self, a, b, *rest):
        return multiply(self, widen(a), widen(b), *rest)

    InterpreterBuilder.cast_impl = mended(InterpreterBuilder.cast_impl)
    InterpreterBuilder.create_fp_to_fp = mended(InterpreterBuilder.create_fp_to_fp)
    InterpreterBuilder.create_dot = dot
