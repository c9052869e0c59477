"""Target ``onnx``: files that a stock onnxruntime runs, and the engine that runs them.

Importing this package loads neither torch nor onnxruntime: :func:`mqc.onnx_ops_library` serves
programs that have only the latter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mqc.backends.onnx.library import ops_library

if TYPE_CHECKING:
    from mqc.backends.onnx.target import OnnxTarget

__all__ = ["OnnxTarget", "ops_library"]


def __getattr__(name: str) -> Any:
    if name != "OnnxTarget":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mqc.backends.onnx.target import OnnxTarget

    return OnnxTarget
