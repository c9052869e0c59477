"""mqc's W4A8 linear: the operator of the library in an onnxruntime session, as in an artifact."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench_cpu.peers.ort import runner, session_of


class Linears:
    """One session of ``copies`` LinearW4A8 nodes that read the same rows (uint8, per channel)."""

    def __init__(self, threads: int) -> None:
        from mqc.backends.onnx.library import onnx_ops_library

        self.threads = threads
        self.library = onnx_ops_library()

    def linear(self, request: dict[str, Any]) -> Any:
        from onnx import TensorProto, helper, numpy_helper

        from mqc.ops.onnx_functions import attach_functions, variant_inputs

        k, n, m, copies = (request[name] for name in ("k", "n", "m", "copies"))
        op_type = "LinearW4A8_c16k4"  # weights in the layout of the kernels, as artifacts have them
        rng = np.random.default_rng(0)
        scale = np.ones(1, np.float32)
        initializers = [numpy_helper.from_array(scale, "x_scale")]
        nodes, outputs = [], []
        for i in range(copies):
            weight = rng.integers(0, 256, (-(-n // 16), 1, k // 8, 16, 4)).astype(np.uint8)
            initializers.append(numpy_helper.from_array(weight, f"w{i}"))
            w_scale = rng.random(n).astype(np.float32)
            initializers.append(numpy_helper.from_array(w_scale, f"s{i}"))
            by_name = {"xq": "x", "qweight": f"w{i}", "w_scale": f"s{i}", "x_scale": "x_scale"}
            inputs = [by_name[name] for name in variant_inputs(op_type)]
            nodes.append(helper.make_node(op_type, inputs, [f"y{i}"], domain="ai.mqc"))
            outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [1, m, n]))
        x = helper.make_tensor_value_info("x", TensorProto.UINT8, [1, m, k])
        graph = helper.make_graph(nodes, "g", [x], outputs, initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.mqc", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        attach_functions(model)
        rows = rng.integers(1, 256, (1, m, k)).astype(np.uint8)
        return runner(session_of(model, self.threads, self.library), rows)
