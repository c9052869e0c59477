"""The native library for tests: its C functions by ctypes, and sessions with and without it."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from mqc.backends.onnx.kernels import Kernels
from mqc.backends.onnx.library import MODEL_ENTRY, THREADS_ENTRY, build_hint, ops_library

LIBRARY = ops_library()
needs_library = pytest.mark.skipif(LIBRARY is None, reason=f"no operator library: {build_hint()}")
ISAS = ((b"portable", b"generic"), (b"avx2", b"avx2"), (b"avx512vnni", b"avx512"))
"""Instruction set, and the copy of the layers' kernels that it uses."""

Array = npt.NDArray[Any]
i64, f32, void = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def open_kernels() -> Iterator[Kernels]:
    """The library's C interface, for a fixture; its instruction set is put back at the end."""
    assert LIBRARY is not None
    made = Kernels(LIBRARY)
    before = made.isa
    yield made
    made.isa = before


def on_isa(kernels: Kernels, isa: str) -> Kernels:
    """``kernels`` on an instruction set; skips the test where it is not there."""
    if isa not in kernels.isas():
        pytest.skip(f"this processor or build has no {isa}")
    kernels.isa = isa
    assert kernels.isa == isa
    return kernels


class RowScales(ctypes.Structure):
    _fields_ = [("scale", void), ("mask", void), ("count", void), ("tokens", i64)]


class Activation(ctypes.Structure):
    _fields_ = [
        ("function", ctypes.c_int),
        ("gated", ctypes.c_int),
        ("plan", void),
        ("split", void),
        ("splits", i64),
        ("is_unsigned", ctypes.c_int),
    ]


class Attention(ctypes.Structure):
    _fields_ = [
        *((name, i64) for name in ("batch", "tokens", "heads", "kv_heads", "dim", "value_dim")),
        *((name, i64) for name in ("past", "capacity", "keys")),
        ("rotary", ctypes.c_int),
        *((name, i64) for name in ("rotary_dim", "angle_batch", "mask_batch", "mask_columns")),
        ("scale", f32),
        *((name, void) for name in ("q", "k", "v")),
        *((name, i64) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, void) for name in ("cosine", "sine", "mask", "key_cache", "value_cache", "out")),
        *((name, void) for name in ("key_bytes", "value_bytes", "key_scale", "value_scale")),
    ]


class AttentionPlan(ctypes.Structure):
    _fields_ = [
        (name, i64)
        for name in "appends packs tasks combines scratch workspace a b c".split()  # a..c: private
    ]


def pointer(array: Array | None) -> int | None:
    """The address of a dense array."""
    if array is None:
        return None
    assert array.flags.c_contiguous
    return array.ctypes.data


def functions() -> ctypes.CDLL:
    """The library's C functions with their types."""
    library = ctypes.CDLL(str(LIBRARY))
    for name in ("mqc_isa", "mqc_layers_isa"):
        getattr(library, name).restype = ctypes.c_char_p
    library.mqc_hadamard_create.restype = void
    library.mqc_hadamard_scratch.restype = i64
    library.mqc_activation_scratch.restype = i64
    scales = ctypes.POINTER(RowScales)
    library.mqc_quantize.argtypes = [void, i64, i64, i64, scales, ctypes.c_int, void]
    library.mqc_rms_norm_quantize.argtypes = [
        *(void, i64, i64, i64, f32, scales, ctypes.c_int, void),
        *(void, i64, void),
    ]
    library.mqc_hadamard_create.argtypes = [i64, ctypes.c_int, void]
    library.mqc_hadamard_free.argtypes = [void]
    library.mqc_hadamard_scratch.argtypes = [void]
    library.mqc_hadamard.argtypes = [void, void, i64, void, void]
    library.mqc_activation_scratch.argtypes = [ctypes.POINTER(Activation), i64]
    library.mqc_activation_quantize.argtypes = [
        *(ctypes.POINTER(Activation), void, i64, i64, i64, scales),
        *(void, void, void),
    ]
    plan, call = ctypes.POINTER(AttentionPlan), ctypes.POINTER(Attention)
    library.mqc_attention_prepare.argtypes = [call, plan]
    for phase in ("append", "pack", "combine"):
        getattr(library, f"mqc_attention_{phase}").argtypes = [call, plan, void, i64]
    library.mqc_attention_attend.argtypes = [call, plan, void, void, i64]
    return library


def session(
    model: bytes | str, *, native: bool, threads: int = 1, every: bool = False
) -> ort.InferenceSession:
    """A session of a model (or its path) through the library's kernels, or the bodies alone.

    The library registers the operators that the model holds, as for an artifact; with ``every`` it
    registers all, as for a host that does not name the model's file, which takes far longer.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if native:
        options.add_session_config_entry(THREADS_ENTRY, str(threads))
        if every:
            options.register_custom_ops_library(str(LIBRARY))
        else:
            with tempfile.NamedTemporaryFile() as file:
                file.write(model if isinstance(model, bytes) else Path(model).read_bytes())
                file.flush()
                options.add_session_config_entry(MODEL_ENTRY, file.name)
                options.register_custom_ops_library(str(LIBRARY))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def steps_apart(left: Array, right: Array) -> int:
    """Largest difference of two integer arrays."""
    assert left.shape == right.shape and left.dtype == right.dtype
    return int(np.abs(left.astype(np.int32) - right.astype(np.int32)).max(initial=0))


def relative(left: Array, right: Array) -> float:
    """Largest difference over the largest magnitude."""
    assert left.shape == right.shape
    return float(np.abs(left - right).max(initial=0) / max(np.abs(right).max(initial=0), 1e-30))


def scale_struct(
    scale: Array, mask: Array | None = None, count: Array | None = None, tokens: int = 1
) -> RowScales:
    """Row scales whose arrays the caller keeps alive."""
    return RowScales(pointer(scale), pointer(mask), pointer(count), tokens)


def attend(library: ctypes.CDLL, call: Attention) -> AttentionPlan:
    """Run all phases of a call, with memory of the sizes that its plan asks for."""
    plan = AttentionPlan()
    library.mqc_attention_prepare(call, plan)
    guard = 16
    workspace, scratch = (
        np.full(size + guard, np.nan, np.float32) for size in (plan.workspace, plan.scratch)
    )
    for phase in ("append", "pack"):
        for task in range(getattr(plan, f"{phase}s")):
            getattr(library, f"mqc_attention_{phase}")(call, plan, workspace.ctypes.data, task)
    for task in reversed(range(plan.tasks)):
        library.mqc_attention_attend(call, plan, workspace.ctypes.data, scratch.ctypes.data, task)
    for task in range(plan.combines):
        library.mqc_attention_combine(call, plan, workspace.ctypes.data, task)
    assert np.isnan(workspace[-guard:]).all() and np.isnan(scratch[-guard:]).all()
    return plan
