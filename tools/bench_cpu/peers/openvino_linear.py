"""OpenVINO's products: int4 g128 with int8 rows made while running, and static int8."""

from __future__ import annotations

from typing import Any

import numpy as np


class Linears:
    """One compiled model of ``copies`` products of the same rows."""

    def __init__(self, name: str, threads: int) -> None:
        import openvino as ov

        self.core = ov.Core()
        self.threads = threads
        self.build = self.int4 if name == "openvino-int4" else self.int8

    def linear(self, request: dict[str, Any]) -> Any:
        import openvino as ov

        from bench_cpu.peers.openvino import settings

        k, n, m, copies = (request[name] for name in ("k", "n", "m", "copies"))
        model = self.build(k, n, m, copies)
        compiled = self.core.compile_model(model, "CPU", settings(self.threads))
        infer = compiled.create_infer_request()
        rows = np.random.default_rng(1).standard_normal((m, k)).astype(np.float32)
        infer.set_input_tensor(ov.Tensor(rows, shared_memory=True))

        def run() -> None:
            infer.infer()

        run()
        self.kept = rows
        return run

    def int4(self, k: int, n: int, m: int, copies: int) -> Any:
        """Weights in groups of 128, symmetric, as nncf compresses them."""
        import openvino as ov
        from openvino import opset13 as ops

        x = ops.parameter([m, k], np.float32, name="x")
        rng = np.random.default_rng(0)
        results, self.weights = [], []
        for _ in range(copies):
            packed = rng.integers(0, 256, n * k // 2).astype(np.uint8)
            self.weights.append(packed)  # OpenVINO keeps the address alone
            tensor = ov.Tensor(packed, ov.Shape([n, k // 128, 128]), ov.Type.i4)
            scale = rng.random((n, k // 128, 1)).astype(np.float16) * 0.01
            weight = ops.convert(ops.constant(tensor), "f16")
            weight = ops.multiply(weight, ops.constant(scale))
            weight = ops.reshape(weight, np.array([n, k]), False)
            results.append(ops.matmul(x, ops.convert(weight, "f32"), False, True))
        return ov.Model(results, [x])

    def int8(self, k: int, n: int, m: int, copies: int) -> Any:
        """Rows quantized by a fixed scale, weights int8 by channel, results quantized again."""
        import openvino as ov
        from openvino import opset13 as ops

        x = ops.parameter([m, k], np.float32, name="x")

        def fixed(value: Any, limit: float) -> Any:
            low, high = (ops.constant(np.float32(v)) for v in (-limit * 128 / 127, limit))
            return ops.fake_quantize(value, low, high, low, high, 256)

        quantized = fixed(x, 4.0)
        rng = np.random.default_rng(0)
        results = []
        for _ in range(copies):
            values = rng.integers(-127, 128, (n, k)).astype(np.int8)
            scale = np.full((n, 1), 0.01, np.float32)
            weight = ops.multiply(ops.convert(ops.constant(values), "f32"), ops.constant(scale))
            results.append(ops.matmul(quantized, weight, False, True))
        return ov.Model(results, [x])
