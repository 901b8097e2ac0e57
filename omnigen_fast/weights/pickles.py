"""Weights in files of `torch.save`, read without running what a pickle may ask for."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..config_settings import words
from ..errors import CheckpointError, brief
from ..regular_files import check_regular

_MAX_PICKLE_BYTES = 512 << 10  # the released model's state dict takes 40 KB
_MAX_ENTRIES = 1 << 16
_STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_GLOBALS = {  # all that a state dict of dense tensors refers to
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3",
    "torch.storage UntypedStorage",
    "torch float8_e4m3fn",
    "torch float8_e5m2",
    *(f"torch {kind}Storage" for kind in _STORAGES),
}
_OPCODES = words(
    """
    PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1
    BINFLOAT BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND
    APPENDS EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET
    """
)
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_WRAPPERS = ("model", "state_dict", "module", "transformer")
_TRAINING = (  # of a trainer's files: averages of the weights, and the optimizer
    "ema",
    "ema_model",
    "ema_state_dict",
    "shadow_params",
    "opt",
    "optimizer",
    "optimizer_states",
    "optimizer_state_dict",
    "param_groups",
    "exp_avg",
)


def read_pickle(path: str) -> dict[str, Tensor]:
    """The state dict in a file of `torch.save`; tensors are mapped from it.

    The pickle's instructions are looked through before any is carried out, and then PyTorch
    rebuilds tensors and nothing else (`weights_only`).

    Raises:
        CheckpointError: not such a file, it asks for other code than a state dict does, or it holds
            other things than the weights of a model.
    """
    check_regular(path, "weights")
    _check_pickle(path, _pickle_in(path))
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # of many kinds for malformed files
        raise CheckpointError(
            f"{path} can't be read as a state dict; its records do not fit its tensors, or it is "
            "cut short"
        ) from error
    return _state_dict(path, found)


def _pickle_in(path: str) -> bytes:
    """The bytes of the one pickle in a zip file of `torch.save`."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > _MAX_ENTRIES:
                raise CheckpointError(f"{path} has {len(entries)} records; at most {_MAX_ENTRIES}")
            found = [one for one in entries if one.filename.endswith("/data.pkl")]
            scripts = [one for one in entries if "/code/" in one.filename]
            if len(found) != 1 or scripts:
                raise CheckpointError(
                    f"{path} is no file of torch.save with one state dict (TorchScript?); save "
                    "model.state_dict()"
                )
            if any(one.compress_type != zipfile.ZIP_STORED for one in entries):
                raise CheckpointError(f"{path} is compressed, which torch.save never does")
            if found[0].file_size > _MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"{path} has a pickle of {found[0].file_size} bytes; at most "
                    f"{_MAX_PICKLE_BYTES} are read"
                )
            return archive.read(found[0])
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is not a file of torch.save, as PyTorch has written them since 1.6"
        ) from error


def _check_pickle(path: str, data: bytes) -> None:
    """Raises CheckpointError for instructions that a state dict's pickle does not have."""
    previous = ""
    tuples: set[Any] = set()  # slots of the memo that hold one
    try:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "GLOBAL" and argument not in _GLOBALS:
                called = ".".join(str(argument).split(" "))
                raise CheckpointError(
                    f"{path} is no state dict: its pickle calls {brief(called)}, which was not "
                    "run; save model.state_dict()"
                )
            if name not in _OPCODES:
                raise CheckpointError(
                    f"{path} is no state dict: its pickle has the instruction {name}, which was "
                    "not run; save model.state_dict()"
                )
            if name.endswith("PUT"):
                (tuples.add if previous in _TUPLES else tuples.discard)(argument)
            elif name.endswith("GET") and argument in tuples:
                # tuples of tuples of one tuple take forever to hash
                raise CheckpointError(f"{path} is no state dict: its pickle uses a tuple twice")
            previous = name
    except CheckpointError:
        raise
    except (ValueError, IndexError) as error:  # genops' own
        raise CheckpointError(f"{path} holds a damaged pickle") from error


def _state_dict(path: str, found: Any) -> dict[str, Tensor]:
    """The tensors in what was loaded, out of one wrapper such as {"model": ...}."""
    if isinstance(found, Mapping):
        training = [name for name in found if name in _TRAINING]
        if training:
            raise CheckpointError(
                f"{path} holds the state of a training run ({training[0]}), not only a model; give "
                "the trainer's model.pt"
            )
        inner = [name for name in _WRAPPERS if isinstance(found.get(name), Mapping)]
        others = [one for one in found.values() if isinstance(one, Tensor | Mapping)]
        if len(inner) == 1 and len(others) == 1:
            return _state_dict_of(path, found[inner[0]])
    return _state_dict_of(path, found)


def _state_dict_of(path: str, found: Any) -> dict[str, Tensor]:
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(f"{path} holds no state dict, but {type(found).__name__}")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path} is no state dict of a model: it has {type(tensor).__name__} under "
                f"{brief(name)}"
            )
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise CheckpointError(f"{path}: {name} is no dense tensor")
    return {name: tensor.detach() for name, tensor in found.items()}
