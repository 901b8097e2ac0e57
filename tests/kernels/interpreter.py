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
    _mend_bfloat16()
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


def _mend_bfloat16() -> None:
    """Makes conversions to bfloat16 round to nearest even, and products of it products.

    The interpreter cuts the low bits off where every GPU rounds, and multiplies bfloat16 matrices
    by their bits as integers.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cut = InterpreterBuilder.cast_impl

    def cast(self, src, dst_type):
        between = (src.dtype.scalar, dst_type.scalar)
        if between == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
            data = rounded.view(torch.int16).numpy().view(np.uint16).reshape(src.data.shape)
        elif between == (tl.bfloat16, tl.float32):
            data = (src.data.astype(np.uint32) << 16).view(np.float32)
        else:
            return cut(self, src, dst_type)
        return TensorHandle(data, dst_type.scalar)

    multiply = InterpreterBuilder.create_dot

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self, a, b, *rest):
        return multiply(self, widen(a), widen(b), *rest)

    InterpreterBuilder.cast_impl = cast
    InterpreterBuilder.create_dot = dot
