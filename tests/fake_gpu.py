"""A GPU that computes nothing: code for CUDA devices runs on fake tensors, its rules are checked.

Tensors on ``cuda`` are torch's fake tensors, so operands on two devices are errors as they are on a
GPU. Addresses are made up: every kernel launch is checked for pointers that lead to living device
memory large enough for what the kernel reads and writes, and the library's own checks run on them.
There are two devices: a kernel gets memory and a stream of the current one, or that is an error.
Results whose shape depends on values are errors, as they wait for the device.
While a graph is recorded, copies between host and device, values read by the host and
synchronisation are errors; a replay finds memory that was freed since.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_emulator import Emulated
from kernel_memory import extents
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mqc.cuda.library import Arguments

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
DEVICES = 2
_READS = {
    torch.Tensor.item: 0,
    torch.Tensor.__bool__: True,
    torch.Tensor.__int__: 0,
    torch.Tensor.__float__: 0.0,
    torch.Tensor.__index__: 0,
}
"""What the host gets where it reads a value that nobody computed."""
_CASTS = {
    torch.Tensor.double: torch.float64,
    torch.Tensor.float: torch.float32,
    torch.Tensor.long: torch.int64,
}


class Memory:
    """Made-up addresses of device storages, and which of them live."""

    def __init__(self) -> None:
        self.capturing = False
        self.captured: dict[int, StorageWeakRef] = {}  # used by the graph, made before it
        self._known: dict[int, tuple[StorageWeakRef, int, int, bool, int]] = {}
        self._next = 1 << 40

    def note(self, tensor: Tensor) -> tuple[int, int]:
        """(address, bytes) of a tensor's storage."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        if known is None or known[0].expired():
            size = storage.nbytes()
            place = tensor.device.index or 0
            known = (StorageWeakRef(storage), self._next, size, self.capturing, place)
            self._known[key] = known
            self._next += (size + 4096) // 256 * 256
        if self.capturing and not known[3]:
            self.captured[key] = known[0]
        return known[1], known[2]

    def address(self, tensor: Tensor) -> int:
        return self.note(tensor)[0] + tensor.storage_offset() * tensor.element_size()

    def behind(self, address: int, device: int) -> int:
        """Bytes from an address to the end of its memory, for a kernel on a device."""
        for reference, start, size, _, place in self._known.values():
            if start <= address < start + max(size, 1):
                assert not reference.expired(), "a kernel gets memory that was freed"
                assert place == device, f"a kernel on cuda:{device} gets memory of cuda:{place}"
                return start + size - address
        raise AssertionError(f"a kernel gets {address:#x}, which is no device memory")


class _Watch(TorchDispatchMode):
    """Sees every operator below torch's Python functions."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        args, kwargs = tree_map_only(Tensor, self._fake, (args, kwargs))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = func(*args, **kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        kinds = {t.device.type for t in (*given, *made) if t.dim() or t.device.type != "cpu"}
        if self.gpu.memory.capturing:
            assert len(kinds) < 2, f"{func} goes between host and device while a graph is recorded"
        for tensor in (*given, *made):
            if tensor.device.type == "cuda":
                self.gpu.memory.note(tensor)
        return result

    def _fake(self, tensor: Tensor) -> Tensor:
        """Without a value that torch would compute with, on the device too."""
        if not isinstance(tensor, FakeTensor):
            tensor = self.gpu.mode.from_tensor(tensor)
        tensor.constant = None
        return tensor


class _Python(TorchFunctionMode):
    """What fake tensors or a torch without CUDA cannot do: addresses, values, indexing."""

    def __init__(self, gpu: FakeGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(kwargs.get("generator"), _Generator):
            kwargs = {k: v for k, v in kwargs.items() if k != "generator"}
        if func is torch.tensor and kwargs.get("device") is not None:
            kwargs = dict(kwargs)
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if isinstance(first, FakeTensor):
            if func in _READS:
                assert not self.gpu.memory.capturing, f"{func} waits while a graph is recorded"
                return _READS[func]
            if first.device.type == "cuda":
                if func is torch.Tensor.data_ptr:
                    return self.gpu.memory.address(first)
                if func is torch.Tensor.__getitem__:
                    return _index(first, args[1])
                if func is torch.Tensor.__setitem__:
                    return _copy(_index(first, args[1]), args[2])
                if func is torch.Tensor.contiguous:
                    kept = torch.contiguous_format
                    return first if first.is_contiguous() else aten.clone(first, memory_format=kept)
                if func in _CASTS:
                    return first.to(_CASTS[func])
                if func in _INSTEAD:
                    return _INSTEAD[func](*args, **kwargs)
        return func(*args, **kwargs)


def _index(x: Tensor, index: Any) -> Tensor:
    """x[index] without torch's guard of the device."""
    items = index if isinstance(index, tuple) else (index,)
    taken = sum(item is not None and item is not Ellipsis for item in items)
    whole = [slice(None)] * (x.dim() - taken)
    if Ellipsis not in [item for item in items if not isinstance(item, Tensor)]:
        items = (*items, Ellipsis)
    axis = 0
    for item in items:
        if item is Ellipsis:
            axis += len(whole)
        elif item is None:
            x, axis = aten.unsqueeze(x, axis), axis + 1
        elif isinstance(item, slice):
            step = 1 if item.step is None else item.step
            x, axis = aten.slice(x, axis, item.start, item.stop, step), axis + 1
        elif isinstance(item, Tensor):
            x, axis = aten.index(x, [None] * axis + [item]), axis + item.dim()
        else:
            x = aten.select(x, axis, int(item))
    return x


def _copy(x: Tensor, value: Any, non_blocking: bool = False) -> Tensor:
    if isinstance(value, Tensor):
        return aten.copy_(x, value, non_blocking)
    return aten.fill_(x, value)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Attention's shapes; a bias of torch.nn.attention would ask the device for its kernels."""
    assert q.dtype == k.dtype == v.dtype and k.shape[:3] == v.shape[:3]
    grouped = options.get("enable_gqa", False)
    assert q.shape[1] == k.shape[1] or (grouped and q.shape[1] % k.shape[1] == 0)
    if attn_mask is not None:
        wanted = (*q.shape[:2], q.shape[2], k.shape[2])
        if attn_mask.dim() == 2:
            assert tuple(attn_mask.shape) == wanted[2:]
        else:
            pairs = zip(attn_mask.shape, wanted, strict=True)
            assert all(size in (1, full) for size, full in pairs)
            assert attn_mask.device == q.device
    return torch.empty_like(q, memory_format=torch.contiguous_format)


_INSTEAD: dict[Any, Callable[..., Tensor]] = {
    torch.Tensor.__invert__: aten.bitwise_not,
    torch.Tensor.copy_: _copy,
    aten.rms_norm.default: lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    scaled_dot_product_attention: _attend,
}
"""What on the device would ask torch's own CUDA code."""


class FakeLibrary(Emulated):
    """The library's checks and choices; no kernel runs."""

    def __init__(self, path: Any, gpu: FakeGpu) -> None:
        super().__init__(path)
        self.gpu = gpu
        self.launches: list[str] = []
        self.asked: set[int] = set()  # devices whose facts were asked for

    def launch(self, name: str, arguments: Arguments, stream: int = 0) -> None:
        current = torch.cuda.current_stream()
        assert stream == current.cuda_stream, "a kernel on another stream"
        pointers = {field for field, kind in arguments._fields_ if kind.__name__ == "c_void_p"}
        sizes = extents(name, arguments)
        assert pointers == set(sizes), f"extents of {name}: {pointers ^ set(sizes)}"
        for field, size in sizes.items():
            address = getattr(arguments, field)
            if address:
                found = self.gpu.memory.behind(address, self.gpu.current)
                assert found >= size, f"{name}: {field} needs {size} bytes, there are {found}"
        super().launch(name, arguments, stream)
        self.launches.append(name)

    def workspace(self, name: str, arguments: Arguments) -> int:
        self.asked.add(self.gpu.current)
        return super().workspace(name, arguments)

    def check_device(self) -> None:
        self.asked.add(self.gpu.current)


class _Generator(torch.Generator):
    """One that says it belongs to the device."""

    device = DEVICE  # type: ignore[assignment]

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls)

    def manual_seed(self, seed: int) -> _Generator:
        return self


class _Stream:
    def __init__(self, number: int, device: int) -> None:
        self.cuda_stream = number
        self.device = device

    def wait_stream(self, other: _Stream) -> None:
        assert isinstance(other, _Stream) and other.device == self.device


class FakeGpu:
    """The modes, and torch.cuda's functions, while :meth:`running`."""

    def __init__(self, emulated: Emulated) -> None:
        self.memory = Memory()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        emulated.configure(seed=0, asynchrony=3, sms=132)
        self.library = FakeLibrary(emulated.path, self)
        self.replays = 0
        self.current = 0
        self._streams = [_Stream(-device, device) for device in range(DEVICES)]

    @contextlib.contextmanager
    def running(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
        """Fake tensors everywhere, and a torch.cuda that stands for two H100."""
        streams = iter(range(1, 1 << 30))

        def synchronize(*_: Any) -> None:
            assert not self.memory.capturing, "synchronisation while a graph is recorded"

        functions: dict[str, Callable[..., Any]] = {
            "Stream": lambda *_, **__: _Stream(next(streams), self.current),
            "stream": self._on,
            "device": self._device,
            "device_count": lambda: DEVICES,
            "current_stream": lambda device=None: self._streams[self._index(device)],
            "CUDAGraph": lambda: SimpleNamespace(replay=None),
            "graph": self._graph,
            "synchronize": synchronize,
            "Event": lambda **_: _event(synchronize),
            "empty_cache": synchronize,
            "init": lambda: None,
            "is_available": lambda: True,
            "current_device": lambda: self.current,
            "get_device_properties": lambda *_: SimpleNamespace(L2_cache_size=50 << 20),
        }
        for name, function in functions.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch, "Generator", _Generator)
        # A subclass of Tensor, which fake tensors cannot be.
        monkeypatch.setattr("torch.nn.attention.bias.causal_lower_right", _lower_right)
        with self.mode, _Watch(self), _Python(self):
            yield self

    def _index(self, device: Any) -> int:
        if device is None:
            return self.current
        index = device if isinstance(device, int) else torch.device(device).index
        return self.current if index is None else index

    @contextlib.contextmanager
    def _device(self, device: Any) -> Iterator[None]:
        before, self.current = self.current, self._index(device)
        assert self.current < DEVICES, f"no device {self.current}"
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def _on(self, stream: _Stream) -> Iterator[None]:
        """As torch does: a stream's device is the current one."""
        with self._device(stream.device):
            before = self._streams[stream.device]
            self._streams[stream.device] = stream
            yield
            self._streams[stream.device] = before

    @contextlib.contextmanager
    def _graph(self, graph: Any, stream: _Stream | None = None, **_: Any) -> Iterator[None]:
        self.memory.capturing, self.memory.captured = True, {}
        with self._on(stream or _Stream(-DEVICES, 0)):  # torch keeps one, of the first device
            yield
        self.memory.capturing = False
        used = list(self.memory.captured.values())

        def replay() -> None:
            assert not any(item.expired() for item in used), "a graph uses memory that was freed"
            self.replays += 1

        graph.replay = replay


def _lower_right(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool, device=DEVICE)


def _event(synchronize: Callable[..., None]) -> SimpleNamespace:
    return SimpleNamespace(
        record=lambda *_: None, synchronize=synchronize, elapsed_time=lambda other: 1.0
    )
