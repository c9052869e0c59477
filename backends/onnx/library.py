"""Where the native library of ``ai.mqc`` operators is, if there is one.

Every ``ai.mqc`` operator in a file has a body in standard operators, so no library is needed. A
custom-op library for onnxruntime (a shared object that exports ``RegisterCustomOps``) makes them
faster: its kernels take precedence over the bodies. Kernels are found by operator type, e.g.
``LinearW4A8_mask_bias``; :func:`mqc.ops.onnx_functions.variant_inputs` names the inputs of each.

mqc's own libraries are built from ``backends/onnx/native`` when the package is installed, and lie
beside this file: one for the CPU, one for the CUDA execution provider. A session takes the one of
its provider; the other would bring the same operator types a second time.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from mqc.errors import TargetError

VARIABLE = "MQC_ONNX_OPS"
"""Names another library; "none" runs the bodies."""
VARIABLE_CUDA = "MQC_ONNX_CUDA_OPS"
"""The same for the CUDA execution provider."""
LIBRARY = Path(__file__).parent / "libmqc_onnx.so"
LIBRARY_CUDA = Path(__file__).parent / "libmqc_onnx_cuda.so"
PROVIDERS = ("cpu", "cuda")
THREADS_ENTRY = "mqc.threads"
"""Session entry by which a library learns the number of threads; set it before registering."""
MODEL_ENTRY = "mqc.model"
"""Session entry that names the model's file: the library then registers only the operators that the
file may hold, which saves 16 MB a session. Set it before registering, too."""
LAYOUT = "c16k4"
"""The id, in manifests and operator types, of the layout in which files hold the weights of integer
linears: the kernels' own (:mod:`mqc.numerics.packing`), so that they read the mapped file. Weights
that it does not fit, and those of older files, are in the reference layout and packed at load."""
LAYOUT_FACT = "weight_layout"
"""The fact of a lowered program that names the layout."""


def ops_library(provider: str = "cpu") -> Path | None:
    """The library in use: the one ``MQC_ONNX_OPS`` (``MQC_ONNX_CUDA_OPS``) names, else mqc's own,
    else None.

    Raises:
        TargetError: the variable names a file that does not exist, or the provider is unknown.
    """
    name = os.environ.get(variable_of(provider))
    own = LIBRARY_CUDA if provider == "cuda" else LIBRARY
    if name == "none":
        return None
    if not name:
        return own if own.is_file() else None
    path = Path(name)
    if not path.is_file():
        variable = variable_of(provider)
        raise TargetError(
            f"the operator library {path} named by {variable} does not exist",
            hint=f"unset {variable} to use mqc's own, set it to none for no library, or correct it",
        )
    return path


def variable_of(provider: str) -> str:
    """The environment variable that names the library for a provider, "cpu" or "cuda"."""
    if provider not in PROVIDERS:
        raise TargetError(
            f"unknown onnxruntime provider {provider!r}", hint=f"use {' or '.join(PROVIDERS)}"
        )
    return VARIABLE_CUDA if provider == "cuda" else VARIABLE


def attention_in_place(provider: str = "cpu") -> bool:
    """Whether the library in use writes new keys and values into the cache it is given.

    A library says so by the C function ``int mqc_attention_in_place(void)``. Bodies in standard
    operators cannot: they would read what they have overwritten.
    """
    library = ops_library(provider)
    if library is None:
        return False
    try:
        promise = ctypes.CDLL(str(library)).mqc_attention_in_place
    except (OSError, AttributeError):
        return False
    return bool(promise())


def onnx_ops_library(provider: str = "cpu") -> str:
    """The path of mqc's custom-op library, for users of plain onnxruntime in any language.

    ``SessionOptions.register_custom_ops_library(mqc.onnx_ops_library())`` makes the artifacts of
    target ``onnx`` fast; without it they run through the bodies in the files.

    Args:
        provider: "cpu", or "cuda" for sessions of ``CUDAExecutionProvider`` (in place of the
            other). That one opens ``libmqc_cuda.so``, which ``MQC_CUDA_LIBRARY`` may name.

    Raises:
        TargetError: the library was not built (the hint says how to build it), or the provider is
            unknown.
    """
    path = ops_library(provider)
    if path is None:
        raise TargetError("the operator library is not there", hint=build_hint())
    return str(path)


def build_hint() -> str:
    """How to get the library where it is missing."""
    return (
        "install a C++ compiler, CMake and onnxruntime's headers (Debian: apt-get install g++ "
        "cmake; the headers are fetched, or set MQC_ORT_INCLUDE), then install mqc again "
        "(in a checkout: make native)"
    )
