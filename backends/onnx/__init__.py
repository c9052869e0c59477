"""Target ``onnx``: files that a stock onnxruntime runs, and the engine that runs them."""

from mqc.backends.onnx.library import ops_library
from mqc.backends.onnx.target import OnnxTarget

__all__ = ["OnnxTarget", "ops_library"]
