"""ggml's products by ctypes, from the libraries inside llama-cpp-python.

Weights lie in the buffer that llama.cpp would choose for them (repacked, or for AMX), so that the
kernels are those a model runs.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

_VOID, _INT64, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_F32, _Q4_0 = 0, 2
_CPU_DEVICE = 0


class _Options(ctypes.Structure):
    """ggml_init_params."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", _VOID),
        ("no_alloc", ctypes.c_bool),
    )


class Ggml:
    """The functions that a product needs."""

    def __init__(self) -> None:
        import llama_cpp

        folder = Path(llama_cpp.__file__).parent / "lib"
        libraries = [
            ctypes.CDLL(str(folder / f"libggml{part}.so"), mode=ctypes.RTLD_GLOBAL)
            for part in ("-base", "-cpu", "")
        ]
        self._libraries = libraries

    def call(self, name: str, *arguments: Any, result: Any = _VOID) -> Any:
        """Call ``ggml_<name>``."""
        for library in self._libraries:
            function = getattr(library, f"ggml_{name}", None)
            if function is not None:
                function.restype = result
                return function(*arguments)
        raise RuntimeError(f"ggml has no function ggml_{name}")

    def context(self) -> Any:
        """Room for the descriptions of some hundred tensors and a graph."""
        size = 4096 * self.call("tensor_overhead", result=ctypes.c_size_t)
        return _VOID(self.call("init", _Options(size, None, True)))

    def buffers(self) -> list[Any]:
        """Buffer types for weights, the preferred ones first."""
        device = _VOID(self.call("backend_dev_by_type", _INT(_CPU_DEVICE)))
        registry = _VOID(self.call("backend_dev_backend_reg", device))
        name = b"ggml_backend_dev_get_extra_bufts"
        address = self.call("backend_reg_get_proc_address", registry, name)
        found: list[Any] = []
        if address:
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(_VOID), _VOID)(address)(device)
            index = 0
            while extra[index]:
                found.append(_VOID(extra[index]))
                index += 1
        return [*found, _VOID(self.call("backend_cpu_buffer_type"))]


class Linears:
    """Q4_0 products."""

    def __init__(self, threads: int) -> None:
        self.ggml = Ggml()
        self.backend = _VOID(self.ggml.call("backend_cpu_init"))
        self.ggml.call("backend_cpu_set_n_threads", self.backend, _INT(threads), result=None)
        self.kept: Any = None

    def linear(self, request: dict[str, Any]) -> Any:
        """A function that multiplies m rows with ``copies`` matrices."""
        ggml = self.ggml
        k, n, m, copies = (request[name] for name in ("k", "n", "m", "copies"))
        weights = ggml.context()
        tensors = [
            _VOID(ggml.call("new_tensor_2d", weights, _INT(_Q4_0), _INT64(k), _INT64(n)))
            for _ in range(copies)
        ]
        buffer = ggml.buffers()[0]
        if not ggml.call("backend_alloc_ctx_tensors_from_buft", weights, buffer):
            raise RuntimeError("ggml has no memory for the weights")
        import gguf

        values = np.random.default_rng(0).standard_normal((n, k)).astype(np.float32)
        data = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0)
        data = np.ascontiguousarray(data)
        for tensor in tensors:
            size = ctypes.c_size_t(data.nbytes)
            address = _VOID(data.ctypes.data)
            ggml.call("backend_tensor_set", tensor, address, ctypes.c_size_t(0), size, result=None)
        scratch = ggml.context()
        x = _VOID(ggml.call("new_tensor_2d", scratch, _INT(_F32), _INT64(k), _INT64(m)))
        graph_memory = ggml.context()
        graph = _VOID(ggml.call("new_graph", graph_memory))
        for tensor in tensors:
            y = _VOID(ggml.call("mul_mat", scratch, tensor, x))
            ggml.call("build_forward_expand", graph, y, result=None)
        plain = _VOID(ggml.call("backend_cpu_buffer_type"))
        if not ggml.call("backend_alloc_ctx_tensors_from_buft", scratch, plain):
            raise RuntimeError("ggml has no memory for the activations")
        rows = np.random.default_rng(1).standard_normal((m, k)).astype(np.float32)
        size = ctypes.c_size_t(rows.nbytes)
        address = _VOID(rows.ctypes.data)
        ggml.call("backend_tensor_set", x, address, ctypes.c_size_t(0), size, result=None)
        self.kept = (weights, scratch, graph_memory)

        def run() -> None:
            if ggml.call("backend_graph_compute", self.backend, graph, result=_INT):
                raise RuntimeError("ggml_backend_graph_compute failed")

        run()
        return run
