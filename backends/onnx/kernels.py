"""The native CPU kernels' linear through ctypes, for packing, tests and benchmarks.

onnxruntime reaches the same functions through the custom-op library; this module needs no
onnxruntime. The C interface is described in ``native/include/mqc_kernels.h``.
"""

from __future__ import annotations

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mqc.errors import UsageError

Array = NDArray[Any]

ISAS = ("portable", "avx2", "avxvnni", "avx512vnni", "amx", "dotprod", "i8mm")
"""Instruction sets, by the names the library knows them."""

LAYOUT_C16K4 = 1

_TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
_PARALLEL_FOR = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p
)


class Shape(ctypes.Structure):
    """mqc_linear_shape."""

    _fields_ = (
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("groups", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("layout", ctypes.c_int32),
    )


class Threads(ctypes.Structure):
    """mqc_threads."""

    _fields_ = (
        ("parallel_for", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
        ("threads", ctypes.c_int32),
    )


_WEIGHT = (
    ("shape", Shape),
    ("m", ctypes.c_int64),
    ("packed", ctypes.c_void_p),
    ("w_scale", ctypes.c_void_p),
)
_TERMS = (
    ("bias", ctypes.c_void_p),
    ("split", ctypes.c_int64),
    ("x_split", ctypes.c_void_p),
    ("w_split", ctypes.c_void_p),
    ("residual", ctypes.c_void_p),
    ("y", ctypes.c_void_p),
    ("workspace", ctypes.c_void_p),
)


class Call(ctypes.Structure):
    """mqc_linear_call."""

    _fields_ = (
        *_WEIGHT,
        ("xq", ctypes.c_void_p),
        ("x_unsigned", ctypes.c_int32),
        ("modality_form", ctypes.c_int32),
        ("modality", ctypes.c_void_p),
        ("sequence", ctypes.c_int64),
        ("x_scale", ctypes.c_void_p),
        *_TERMS,
    )


class FloatCall(ctypes.Structure):
    """mqc_float_linear_call."""

    _fields_ = (*_WEIGHT, ("x", ctypes.c_void_p), *_TERMS)


def aligned(shape: tuple[int, ...], dtype: Any, guard: int = 0) -> Array:
    """An uninitialized array at a multiple of 64 bytes, with ``guard`` bytes of 0xA5 behind it."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.full(size + guard + 64, 0xA5, np.uint8)
    start = -raw.ctypes.data % 64
    array: Array = raw[start : start + size].view(dtype).reshape(shape)
    return array


@dataclass(frozen=True)
class PackedLinear:
    """Weights in the kernels' layout: int4 or int8 values and scales of [n, groups].

    Attributes:
        shape: n, k, groups, bits and the layout id.
        weight: uint8, one axis.
        w_scale: float32, the columns form.
    """

    shape: Shape
    weight: Array
    w_scale: Array


class Kernels:
    """The functions of one shared library.

    Raises:
        UsageError: where the file cannot be loaded, and by every method where the library refuses.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.library = ctypes.CDLL(str(path))
        except OSError as error:
            raise UsageError(
                f"the kernel library {path} cannot be loaded: {error}",
                hint="build it: `make native`",
            ) from error
        for name in ("linear_packed_bytes", "columns_count", "linear_workspace_bytes"):
            getattr(self.library, f"mqc_{name}").restype = ctypes.c_int64
        self.library.mqc_float_linear_workspace_bytes.restype = ctypes.c_int64
        self.library.mqc_isa.restype = ctypes.c_char_p
        self.library.mqc_status_text.restype = ctypes.c_char_p
        self.library.mqc_probe_dot.restype = ctypes.c_double
        self.library.mqc_probe_read.restype = ctypes.c_uint64
        self._pools: dict[int, ThreadPoolExecutor] = {}

    def check(self, status: int) -> int:
        """``status`` where it is not negative."""
        if status < 0:
            text = self.library.mqc_status_text(ctypes.c_int32(status)).decode()
            raise UsageError(f"the linear kernels refuse: {text}")
        return status

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return str(self.library.mqc_isa().decode())

    @isa.setter
    def isa(self, name: str) -> None:
        self.check(self.library.mqc_set_isa(name.encode()))

    def isas(self) -> list[str]:
        """The instruction sets that this build and this processor can run."""
        return [name for name in ISAS if self.library.mqc_isa_supported(name.encode())]

    def columns(self, values: Array) -> Array:
        """Float32 [n, width] in the columns form."""
        values = np.ascontiguousarray(values, np.float32)
        n, width = map(ctypes.c_int64, values.shape)
        out = aligned((self.check(self.library.mqc_columns_count(n, width)),), np.float32)
        self.check(self.library.mqc_columns_pack(n, width, _address(values), _address(out)))
        return out

    def pack(self, weight: Array, w_scale: Array, k: int) -> PackedLinear:
        """Pack int8 [n, k], or packed int4 (uint8 [n, ceil(k / 2)]), with scales [n] or [n, G]."""
        weight, n = np.ascontiguousarray(weight), weight.shape[0]
        scale = w_scale.reshape(n, -1)
        bits = 8 if weight.dtype == np.int8 else 4
        shape = Shape(n, k, scale.shape[1], bits, LAYOUT_C16K4)
        size = self.check(self.library.mqc_linear_packed_bytes(ctypes.byref(shape)))
        packed = aligned((size,), np.uint8)
        call = self.library.mqc_linear_pack(ctypes.byref(shape), _address(weight), _address(packed))
        self.check(call)
        return PackedLinear(shape, packed, self.columns(scale))

    def unpack(self, linear: PackedLinear) -> Array:
        """The inverse of `pack`."""
        shape = linear.shape
        wide = shape.bits == 8
        columns = shape.k if wide else (shape.k + 1) // 2
        out = np.empty((shape.n, columns), np.int8 if wide else np.uint8)
        call = self.library.mqc_linear_unpack
        self.check(call(ctypes.byref(shape), _address(linear.weight), _address(out)))
        return out

    def call(self, linear: PackedLinear, xq: Array, y: Array, **optional: Array | None) -> Call:
        """Arguments of a call. It keeps the arrays alive.

        Args:
            xq: int8 or uint8 [..., K], contiguous.
            y: float32 [..., N], written.
            optional: x_scale, modality (bool rows, or int64 counts), bias, x_split, w_split
                (columns form), residual, workspace.
        """
        m = xq.size // linear.shape.k
        call = Call(shape=linear.shape, m=m, x_unsigned=int(xq.dtype == np.uint8))
        call.packed, call.w_scale = _address(linear.weight), _address(linear.w_scale)
        call.xq, call.y = _address(xq), _address(y)
        modality, x_split = optional.get("modality"), optional.get("x_split")
        if modality is not None:
            call.modality_form = 1 if modality.dtype == np.bool_ else 2
            call.sequence = m // modality.size if modality.size else 1
        if x_split is not None:
            call.split = x_split.shape[-1]
        for name, array in optional.items():
            setattr(call, name, _address(array) if array is not None else None)
        call.arrays = (linear, xq, y, optional)
        return call

    def threads(self, count: int) -> Threads:
        """``count`` threads of a pool of Python threads (the kernels release the interpreter)."""
        if count <= 1:
            return Threads(None, None, 1)
        if count not in self._pools:
            self._pools[count] = ThreadPoolExecutor(count)
            # An executor starts threads as it sees need, and may see none: start all of them now.
            everyone = threading.Barrier(count)
            list(self._pools[count].map(lambda _: everyone.wait(), range(count)))
        pool = self._pools[count]

        def parallel_for(_: int, tasks: int, task: int, context: int) -> None:
            function = _TASK(task)
            list(pool.map(lambda index: function(context, index), range(tasks)))

        callback = _PARALLEL_FOR(parallel_for)
        threads = Threads(ctypes.cast(callback, ctypes.c_void_p), None, count)
        threads.keep = callback
        return threads

    def float_call(
        self, linear: PackedLinear, x: Array, y: Array, **optional: Array | None
    ) -> FloatCall:
        """Arguments of a call with float activations. It keeps the arrays alive.

        Args:
            x: float32 [..., K], contiguous.
            y: float32 [..., N], written.
            optional: bias, x_split, w_split (columns form), residual, workspace.
        """
        call = FloatCall(shape=linear.shape, m=x.size // linear.shape.k)
        call.packed, call.w_scale = _address(linear.weight), _address(linear.w_scale)
        call.x, call.y = _address(x), _address(y)
        x_split = optional.get("x_split")
        call.split = x_split.shape[-1] if x_split is not None else 0
        for name, array in optional.items():
            setattr(call, name, _address(array) if array is not None else None)
        call.arrays = (linear, x, y, optional)
        return call

    def run(self, call: Call | FloatCall, threads: Threads) -> None:
        """mqc_linear, or mqc_float_linear."""
        floats = isinstance(call, FloatCall)
        function = self.library.mqc_float_linear if floats else self.library.mqc_linear
        self.check(function(ctypes.byref(call), ctypes.byref(threads)))

    def workspace_bytes(self, call: Call | FloatCall, threads: int) -> int:
        """Bytes of scratch memory for a call on that many threads."""
        name = "float_linear" if isinstance(call, FloatCall) else "linear"
        function = getattr(self.library, f"mqc_{name}_workspace_bytes")
        return self.check(function(ctypes.byref(call), threads))


def _address(array: Array) -> ctypes.c_void_p:
    if not array.flags.c_contiguous:
        raise UsageError("the kernels take contiguous arrays")
    return ctypes.c_void_p(array.ctypes.data)
