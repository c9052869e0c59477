"""Where the native library of ``ai.mqc`` operators is, if there is one.

Every ``ai.mqc`` operator in a file has a body in standard operators, so no library is needed. A
custom-op library for onnxruntime (a shared object that exports ``RegisterCustomOps``) makes them
faster: its kernels take precedence over the bodies. Kernels are found by operator type, e.g.
``LinearW4A8_mask_bias``; :func:`mqc.ops.onnx_functions.variant_inputs` names the inputs of each.

mqc's own library is built from ``backends/onnx/native`` when the package is installed, and lies
beside this file.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from mqc.errors import TargetError

VARIABLE = "MQC_ONNX_OPS"
"""Names another library; "none" runs the bodies."""
LIBRARY = Path(__file__).parent / "libmqc_onnx.so"
THREADS_ENTRY = "mqc.threads"
"""Session entry by which a library learns the number of threads; set it before registering."""
LAYOUT = "c16k4"
"""The id, in manifests and operator types, of the layout in which files hold the weights of integer
linears: the kernels' own (:mod:`mqc.numerics.packing`), so that they read the mapped file. Weights
that it does not fit, and those of older files, are in the reference layout and packed at load."""
LAYOUT_FACT = "weight_layout"
"""The fact of a lowered program that names the layout."""


def ops_library() -> Path | None:
    """The library in use: the one ``MQC_ONNX_OPS`` names, else mqc's own, else None.

    Raises:
        TargetError: the variable names a file that does not exist.
    """
    name = os.environ.get(VARIABLE)
    if name == "none":
        return None
    if not name:
        return LIBRARY if LIBRARY.is_file() else None
    path = Path(name)
    if not path.is_file():
        raise TargetError(
            f"the operator library {path} named by {VARIABLE} does not exist",
            hint=f"unset {VARIABLE} to use mqc's own, set it to none for no library, or correct it",
        )
    return path


def attention_in_place() -> bool:
    """Whether the library in use writes new keys and values into the cache it is given.

    A library says so by the C function ``int mqc_attention_in_place(void)``. Bodies in standard
    operators cannot: they would read what they have overwritten.
    """
    library = ops_library()
    if library is None:
        return False
    try:
        promise = ctypes.CDLL(str(library)).mqc_attention_in_place
    except (OSError, AttributeError):
        return False
    return bool(promise())


def onnx_ops_library() -> str:
    """The path of mqc's custom-op library, for users of plain onnxruntime in any language.

    ``SessionOptions.register_custom_ops_library(mqc.onnx_ops_library())`` makes the artifacts of
    target ``onnx`` fast; without it they run through the bodies in the files.

    Raises:
        TargetError: the library was not built; the hint says how to build it.
    """
    path = ops_library()
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
