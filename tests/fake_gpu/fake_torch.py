"""PyTorch on fake tensors: what each operation reads and writes, and what fake tensors can't do."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from timeline import Fault, Part, Work
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from fake_device import FakeGpu

_ALLOCATES = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")
_HOST_READS = ("aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero")


class Watch(TorchDispatchMode):
    """Tells a fake GPU of every operation of PyTorch, and answers where the host wants a value."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self._gpu = gpu
        # what is asked of values: whether all are right, or whether any is wrong
        self._answers: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), named: Any = None
    ) -> Any:
        gpu, named = self._gpu, named or {}
        name, schema = function._schema.name, function._schema
        if function.namespace == "prim":  # asks for a property
            return function(*arguments, **named)
        reads, writes = _arguments(schema, arguments, named)
        if name in _HOST_READS:
            return self._read(name, arguments, reads)
        result = function(*arguments, **named)
        if function.is_view or name in ("aten::detach", "aten::lift_fresh"):
            return result
        known = {one.untyped_storage()._cdata for one in (*reads, *writes)}
        made = [
            one
            for one in tree_leaves(result)
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in known
        ]
        for one in made:
            gpu.memory(one)
            if name.startswith("aten::any"):
                self._answers[one] = False
        if name not in _ALLOCATES:
            writes = [*writes, *made]
        self._judge_devices(name, [*reads, *writes, *made])
        if name in ("aten::copy_", "aten::_to_copy"):
            wanted = named.get("non_blocking", arguments[2] if len(arguments) > 2 else False)
            self._copied(name, reads, writes, bool(wanted))
        elif name not in _ALLOCATES:
            work = Work(name, _parts(gpu, reads), _parts(gpu, writes))
            if any(one.device.type == "cuda" for one in (*reads, *writes)):
                gpu.issue(work, gpu.current)
            else:
                gpu.on_host(work)
        return result

    def _judge_devices(self, name: str, tensors: list[Tensor]) -> None:
        gpu = self._gpu
        if (gpu.in_step or gpu.capture is not None) and any(
            one.device.type == "cpu" for one in tensors
        ):
            # copies from page-locked memory are those of a ring's lane
            if (
                gpu.capture is None
                and name == "aten::copy_"
                and all(one.device.type == "cuda" or gpu.is_locked(one) for one in tensors)
            ):
                return
            where = "a capture" if gpu.capture is not None else "a step"
            raise Fault(f"{where} has a tensor on the CPU: {name}")

    def _copied(self, name: str, reads: list[Tensor], writes: list[Tensor], wanted: bool) -> None:
        """A copy: on the device, on the host, or between them."""
        gpu = self._gpu
        work = Work(name, _parts(gpu, reads), _parts(gpu, writes))
        target = writes[0]
        source = next((one for one in reads if one is not target), target)
        kinds = {source.device.type, target.device.type}
        if kinds == {"cpu"}:
            gpu.on_host(work)
            return
        if kinds == {"cuda"}:
            gpu.issue(work, gpu.current)
            return
        host = source if source.device.type == "cpu" else target
        # PyTorch page-locks what a copy to the host returns if nobody is to wait for it
        locked = gpu.is_locked(host) or (name == "aten::_to_copy" and host is target)
        gpu.issue(work, gpu.current)
        if not (wanted and locked):
            gpu.host_waits(f"{name} between the host and the device", gpu.current)

    def _read(self, name: str, arguments: Any, reads: list[Tensor]) -> Any:
        """What the host reads: no value is there, so calls go the way of healthy ones."""
        gpu = self._gpu
        if any(one.device.type == "cuda" for one in reads):
            gpu.host_waits(f"the host reads a value ({name})", gpu.current)
        gpu.on_host(Work(name, _parts(gpu, reads), ()))
        if name == "aten::equal":
            return True
        if name == "aten::_local_scalar_dense" and arguments[0].dtype == torch.bool:
            return self._answers.get(arguments[0], True)
        if name == "aten::_local_scalar_dense" and arguments[0].dtype.is_floating_point:
            return 1.0
        raise Fault(f"the host wants to know a value that is not there: {name}")


def _arguments(schema: Any, arguments: Any, named: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that an operation reads and those that it writes."""
    reads, writes = [], []
    given = dict(zip((one.name for one in schema.arguments), arguments)) | dict(named)
    for one in schema.arguments:
        tensors = [x for x in tree_leaves(given.get(one.name)) if isinstance(x, Tensor)]
        is_written = bool(one.alias_info and one.alias_info.is_write)
        (writes if is_written else reads).extend(tensors)
    return reads, writes


def _parts(gpu: FakeGpu, tensors: list[Tensor]) -> tuple[Part, ...]:
    return tuple(gpu.part(one) for one in tensors)


def set_data(tensor: Tensor, value: Tensor) -> None:
    """As PyTorch does, which leaves a fake tensor on its old device."""
    torch._C.TensorBase.data.__set__(tensor, value)
    if isinstance(tensor, FakeTensor) and isinstance(value, FakeTensor):
        tensor.fake_device = value.fake_device


DATA = property(torch._C.TensorBase.data.__get__, set_data)


def move_module(module: nn.Module, device: torch.device) -> None:
    """`module.to(device)`, which swaps tensors in place; fake ones can't be swapped."""
    for one in module.modules():
        for name, value in list(one.named_parameters(recurse=False)):
            moved = nn.Parameter(value.detach().to(device), requires_grad=False)
            one.register_parameter(name, moved)


class Generator(torch.Generator):
    """A CPU's in place of a GPU's: nothing is drawn."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")


class File:
    """A safetensors file: read on the CPU without any mode, then moved as if it had no values."""

    def __init__(self, opens: Callable[..., Any], path: str, device: torch.device) -> None:
        self._file, self._device = opens(path, torch.device("cpu")), device
        self.keys, self.metadata = self._file.keys, self._file.metadata
        self.get_slice = self._file.get_slice

    def __enter__(self) -> File:
        self._file.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.__exit__(*exception)

    def get_tensor(self, name: str) -> Tensor:
        with _disable_current_modes():
            found = self._file.get_tensor(name)
        return torch.empty(found.shape, dtype=found.dtype, device="cpu").to(self._device)
