"""A GPU that is not there: whole calls on tensors of a fake `cuda:0`, and a judge of their order.

PyTorch's FakeTensorMode has shapes and devices without values, so it needs no GPU, but a build of
PyTorch for CUDA. What it can't know is stood in for here: streams, events, page-locked memory and
captures are recorders over `timeline`. The operations are their contracts and the memory that they
allocate. Raised as a Fault:

- a step that waits for the device, reads a tensor on the host, or uses the CPU's memory
- a capture that does so, leaves its stream, or leaves memory of its own behind
- a replay that uses memory that is gone
- accesses that no stream, event or wait of the host orders, frees among them

Tensors of two devices in one operation raise FakeTensorMode's own error.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import traceback
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from fake_torch import DATA, File, Generator, Watch, move_module
from omnigen_fast.kernels import contract, launch, ops, widened
from timeline import Actor, Fault, Memory, Part, Work, memories
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from omnigen_fast import graph
from omnigen_fast.denoise import Loop
from omnigen_fast.vae import vae
from omnigen_fast.weights import files, lora_sources

CUDA = torch.device("cuda:0")
CAPABILITY = (9, 0)
_TOTAL = 80 << 30
_PAGE = 4096


def reason_to_skip() -> str | None:
    """Why there is no fake GPU with this PyTorch; None where there is."""
    if torch.version.cuda is None:
        return "this PyTorch is not built for CUDA; `make test-newest` installs one that is"
    if torch.cuda.is_available():
        return "a GPU is there; `python -m bench.gpu_check` uses it"
    return None


class Stream:
    """Stands in for `torch.cuda.Stream`."""

    def __init__(self, gpu: FakeGpu, name: str) -> None:
        self.gpu, self.actor, self.device = gpu, Actor(name), CUDA
        gpu.streams.append(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.gpu)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        self.gpu.not_while_captured("a stream waits for another's event", self)
        self.actor.wait(event.mark)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.gpu.host_waits(f"{self.actor.name}.synchronize()", self)

    def query(self) -> bool:
        return self.gpu.host.is_after(self.actor, self.actor.seen.get(self.actor, 0))


class Event:
    """Stands in for `torch.cuda.Event`."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.mark = gpu, {}

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.gpu.current
        stream.actor.wait(self.gpu.host.mark())
        self.mark = stream.actor.mark()

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.gpu.current).wait_event(self)

    def synchronize(self) -> None:
        self.gpu.judge_wait("an event's synchronize()")
        self.gpu.host.wait(self.mark)


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`: what was captured, issued again by a replay."""

    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.work: list[Work] = []
        self.own: set[Memory] = set()  # from the graph's own pool

    def replay(self) -> None:
        self.gpu.replays += 1
        for one in self.work:
            kept = [
                tuple(part for part in parts if part.memory not in self.own)
                for parts in (one.reads, one.writes)
            ]
            self.gpu.issue(Work(f"replayed {one.what}", *kept), self.gpu.current)


class FakeGpu:
    """One device, its streams, and what was done on it.

    Attributes:
        waits: how often the host has waited for the device.
        captures: graphs that were recorded.
        replays: how often one was launched.
        captured_bytes: what captures allocated for themselves.
        faults: of frees, which no exception can leave.
    """

    def __init__(self) -> None:
        self.host = Actor("the host")
        self.streams: list[Stream] = []
        self.default = Stream(self, "the default stream")
        self.current = self.default
        self.capture: Graph | None = None
        self.in_step = False
        self.waits = self.captures = self.replays = self.captured_bytes = 0
        self.kernels: set[str] = set()
        self.faults: list[str] = []
        self._memories: dict[int, Memory] = {}
        self._addresses: dict[int, int] = {}
        self._next_address = 1 << 40
        self._locked: set[Memory] = set()
        self._named = 0

    # memory

    def part(self, tensor: Tensor) -> Part:
        """The bytes that a tensor covers, gaps of a strided one included."""
        item = tensor.element_size()
        first = tensor.storage_offset() * item
        if not tensor.numel():
            return Part(self.memory(tensor), first, first)
        spans = ((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        return Part(self.memory(tensor), first, first + (sum(spans) + 1) * item)

    def memory(self, tensor: Tensor) -> Memory:
        """That of a tensor's storage; known from now on until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._memories:
            on_device = tensor.device.type == "cuda"
            self._named += 1
            place = "device" if on_device else "host"
            found = Memory(
                f"{place} memory {self._named} {tuple(tensor.shape)}",
                self.current.actor if on_device else self.host,
            )
            self._memories[key] = found
            self._addresses[key] = self._next_address
            self._next_address += math.ceil((storage.nbytes() + 1) / _PAGE) * _PAGE
            weakref.finalize(storage, self._free, key)
            if self.capture is not None and on_device:
                self.capture.own.add(found)
                self.captured_bytes += storage.nbytes()
        return self._memories[key]

    def address(self, tensor: Tensor) -> int:
        """What stands for `data_ptr()`."""
        part = self.part(tensor)
        return self._addresses[tensor.untyped_storage()._cdata] + part.first

    def lock(self, address: int, size: int) -> int:
        """`cudaHostRegister`."""
        found = [key for key, start in self._addresses.items() if start == address]
        assert len(found) == 1, "page-locked memory that no tensor has"
        self._locked.add(self._memories[found[0]])
        return 0

    def is_locked(self, tensor: Tensor) -> bool:
        return self.memory(tensor) in self._locked

    def _free(self, key: int) -> None:
        memory = self._memories.pop(key)
        del self._addresses[key]
        self._locked.discard(memory)
        try:
            memory.free(self.host)
        except Fault as fault:
            self.faults.append(str(fault))

    # order

    def issue(self, work: Work, stream: Stream) -> None:
        """Puts work on a stream."""
        if self.capture is not None:
            self.not_while_captured(work.what, stream)
            self.capture.work.append(work)
            return
        stream.actor.wait(self.host.mark())  # a launch comes after what the host has waited for
        work.run(stream.actor)

    def on_host(self, work: Work) -> None:
        """The host does it itself, now."""
        work.run(self.host)

    def host_waits(self, what: str, stream: Stream) -> None:
        """The host waits for all that a stream has been given."""
        self.judge_wait(what)
        self.host.wait(stream.actor.mark())

    def judge_wait(self, what: str) -> None:
        self.waits += 1
        if self.capture is not None:
            raise Fault(f"a capture waits for the device: {what}")
        if self.in_step:
            raise Fault(f"a step waits for the device: {what}")

    def not_while_captured(self, what: str, stream: Stream) -> None:
        if self.capture is not None and stream is not self.current:
            raise Fault(f"a capture leaves its stream: {what}")

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around a step of a loop: nothing in it may wait."""
        before, self.in_step = self.in_step, True
        try:
            yield
        finally:
            self.in_step = before

    # stand-ins of torch.cuda

    @contextlib.contextmanager
    def on_stream(self, stream: Stream | None) -> Iterator[None]:
        before = self.current
        self.current = stream or before
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def capturing(self, recorded: Graph, pool: Any = None, stream: Any = None) -> Iterator[None]:
        """`torch.cuda.graph`."""
        assert stream is not None and stream is not self.default
        self.synchronize()
        with self.on_stream(stream):
            self.capture = recorded
            try:
                yield
            finally:
                self.capture = None
        alive = [one.name for one in recorded.own if not one.freed]
        if alive:
            raise Fault(f"a capture leaves memory of its own in use: {', '.join(sorted(alive))}")
        if not memories(recorded.work):
            raise Fault("a capture holds nothing")
        self.captures += 1

    def synchronize(self, device: Any = None) -> None:
        for stream in self.streams:
            self.host_waits("torch.cuda.synchronize()", stream)

    def empty_cache(self) -> None:
        self.judge_wait("torch.cuda.empty_cache()")

    def _cuda(self) -> dict[str, Any]:
        """Names in `torch.cuda` and what stands for them."""
        nothing = contextlib.nullcontext
        runtime = SimpleNamespace(
            cudaHostRegister=lambda address, size, flags: self.lock(address, size),
            cudaHostUnregister=lambda address: 0,
        )
        properties = SimpleNamespace(name="fake", total_memory=_TOTAL, multi_processor_count=132)
        return {
            "Stream": lambda device=None, priority=0: Stream(self, f"stream {len(self.streams)}"),
            "Event": lambda *_, **__: Event(self),
            "CUDAGraph": lambda: Graph(self),
            "graph": self.capturing,
            "stream": self.on_stream,
            "current_stream": lambda device=None: self.current,
            "default_stream": lambda device=None: self.default,
            "device": lambda device: nothing(),
            "current_device": lambda: 0,
            "synchronize": self.synchronize,
            "empty_cache": self.empty_cache,
            "cudart": lambda: runtime,
            "mem_get_info": lambda device=None: (_TOTAL - (1 << 30), _TOTAL),
            "memory_reserved": lambda device=None: 0,
            "memory_allocated": lambda device=None: 0,
            "max_memory_reserved": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "get_device_capability": lambda device=None: CAPABILITY,
            "get_device_properties": lambda device=None: properties,
        }

    @contextlib.contextmanager
    def present(self) -> Iterator[FakeGpu]:
        """Inside, there is this GPU; on the way out its faults are raised."""
        # what would else be imported inside, among stand-ins
        importlib.import_module("diffusers.models.autoencoders.autoencoder_kl")
        caches = (graph._capture_stream, launch.capability_of, ops._why_not)
        for one in caches:
            one.cache_clear()
        with contextlib.ExitStack() as stack:
            patch = mock.patch.object
            for name, value in self._cuda().items():
                stack.enter_context(patch(torch.cuda, name, value))
            stack.enter_context(patch(torch, "Generator", Generator))
            stack.enter_context(patch(Tensor, "data_ptr", lambda tensor: self.address(tensor)))
            stack.enter_context(patch(ops, "_why_not", lambda device: None))
            stack.enter_context(patch(ops, "_implementation", lambda x: self._operations))
            for one in (files, lora_sources):
                stack.enter_context(patch(one, "open_file", partial(File, one.open_file)))
            # a product on the host would not pass for one of a CPU
            stack.enter_context(patch(widened, "faster", lambda dtype: dtype == torch.bfloat16))
            stack.enter_context(patch(vae, "_move", move_module))
            stack.enter_context(patch(Tensor, "data", DATA))
            stack.enter_context(patch(Loop, "step", self._judged(Loop.step)))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(Watch(self))
            try:
                yield self
            except BaseException as error:
                traceback.clear_frames(error.__traceback__)  # they hold tensors
                raise
            finally:
                gc.collect()  # page-locked memory is given back to the stand-in
                for one in caches:
                    one.cache_clear()
        self.check()

    def check(self) -> None:
        """Raises what frees have found."""
        if self.faults:
            raise Fault("; ".join(self.faults))

    def _judged(self, step: Callable[..., None]) -> Callable[..., None]:
        def judged(*args: Any) -> None:
            with self.step():
                step(*args)

        return judged

    @property
    def _operations(self) -> SimpleNamespace:
        return SimpleNamespace(**{name: self._operation(name) for name in ops.OPERATIONS})

    def _operation(self, name: str) -> Callable[..., Any]:
        """An operation's contract as its kernel has it, and the memory that it allocates."""
        operation = ops.OPERATIONS[name]
        schema = getattr(torch.ops.omnigen_fast, name).default._schema
        written = [bool(one.alias_info and one.alias_info.is_write) for one in schema.arguments]

        def run(*args: Any) -> Any:
            self.kernels.add(name)
            inputs, out = args[: operation.inputs], operation.out(args)
            getattr(contract, name)(*inputs, fused=True)
            if out is not None:
                contract.same("out", out, operation.like(args[0]))
            result = getattr(ops._SHAPES, name)(*args)
            tensors = [(one, w) for one, w in zip(inputs, written) if isinstance(one, Tensor)]
            if isinstance(result, Tensor):
                tensors.append((result, True))
            for one, _ in tensors:
                if one.device != CUDA:
                    raise Fault(f"{name} has a tensor on {one.device}")
            work = Work(
                name,
                tuple(self.part(one) for one, _ in tensors),
                tuple(self.part(one) for one, writes in tensors if writes),
            )
            self.issue(work, self.current)
            return result

        return run
