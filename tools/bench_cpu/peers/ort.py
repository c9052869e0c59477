"""onnxruntime's own products: MatMulNBits int4 g128 (accuracy level 4), QLinearMatMul u8 x s8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def prepare(name: str, part: str, cache: Path) -> None:
    """Nothing: models are made in memory."""


def open_peer(name: str, part: str, cache: Path, threads: int) -> Any:
    """Products of one kind."""
    return Linears(name, threads)


def session_of(model: Any, threads: int, library: str | None = None) -> Any:
    """A session of a model, with settings that keep threads awake between its nodes."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if library:
        options.add_session_config_entry("mqc.threads", str(threads))
        options.register_custom_ops_library(library)
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


class Linears:
    """One session of ``copies`` nodes that read the same rows."""

    def __init__(self, name: str, threads: int) -> None:
        self.build = nbits if name == "ort-nbits" else qlinear
        self.threads = threads

    def linear(self, request: dict[str, Any]) -> Any:
        model, x = self.build(*(request[name] for name in ("k", "n", "m", "copies")))
        return runner(session_of(model, self.threads), x)


def runner(session: Any, x: np.ndarray[Any, Any]) -> Any:
    """A function that runs a session with its outputs left in its own memory."""
    binding = session.io_binding()
    binding.bind_cpu_input("x", x)
    for output in session.get_outputs():
        binding.bind_output(output.name)

    def run() -> None:
        session.run_with_iobinding(binding)

    run()
    return run


def graph_model(nodes: list[Any], initializers: list[Any], x: Any, outputs: list[Any]) -> Any:
    """A model of some nodes."""
    from onnx import helper

    graph = helper.make_graph(nodes, "g", [x], outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def nbits(k: int, n: int, m: int, copies: int) -> tuple[Any, np.ndarray[Any, Any]]:
    """MatMulNBits, symmetric, blocks of 128, int8 activations made while running."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    nodes, initializers, outputs = [], [], []
    for i in range(copies):
        weight = rng.integers(0, 256, (n, k // 128, 64)).astype(np.uint8)
        scale = rng.random(n * k // 128).astype(np.float32)
        initializers += [numpy_helper.from_array(weight, f"w{i}")]
        initializers += [numpy_helper.from_array(scale, f"s{i}")]
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                ["x", f"w{i}", f"s{i}"],
                [f"y{i}"],
                domain="com.microsoft",
                K=k,
                N=n,
                bits=4,
                block_size=128,
                accuracy_level=4,
            )
        )
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [m, n]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])
    rows = rng.standard_normal((m, k)).astype(np.float32)
    return graph_model(nodes, initializers, x, outputs), rows


def qlinear(k: int, n: int, m: int, copies: int) -> tuple[Any, np.ndarray[Any, Any]]:
    """QLinearMatMul: uint8 rows, int8 weights, uint8 result."""
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    scalars = {
        "xs": np.float32(0.02),
        "xz": np.uint8(128),
        "ys": np.float32(1.0),
        "yz": np.uint8(128),
    }
    initializers = [numpy_helper.from_array(np.array(v), name) for name, v in scalars.items()]
    initializers.append(numpy_helper.from_array(np.full(n, 0.01, np.float32), "ws"))
    initializers.append(numpy_helper.from_array(np.zeros(n, np.int8), "wz"))
    nodes, outputs = [], []
    for i in range(copies):
        weight = rng.integers(-127, 128, (k, n)).astype(np.int8)
        initializers.append(numpy_helper.from_array(weight, f"w{i}"))
        inputs = ["x", "xs", "xz", f"w{i}", "ws", "wz", "ys", "yz"]
        nodes.append(helper.make_node("QLinearMatMul", inputs, [f"y{i}"]))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.UINT8, [m, n]))
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [m, k])
    return graph_model(nodes, initializers, x, outputs), rng.integers(0, 256, (m, k), np.uint8)
