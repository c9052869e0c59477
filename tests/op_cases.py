"""Calls of operators for tests: in torch, and a variant's body in stock onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper

import mqc.ops
from mqc.ops.onnx_functions import attach_functions, variant_inputs, variant_outputs

CONSTANT = {"scale", "split", "qweight", "w_scale", "x_scale", "bias", "w_split"}


def run_body(name: str, values: dict[str, Any]) -> list[torch.Tensor]:
    """One node of the variant that ``values`` needs, in stock onnxruntime; scales are constant."""
    op = mqc.ops.OPS[name]
    shaped = {k: _Onnx(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    op_type = "_".join((op.onnx.name, *op.onnx.flags(shaped)))
    made = {} if op.onnx.constants is None else op.onnx.constants(shaped)
    tensors = {k: v.numpy() for k, v in values.items() if isinstance(v, torch.Tensor)} | made
    names, outputs = variant_inputs(op_type), variant_outputs(op_type)
    fed = [n for n in names if n not in CONSTANT and n not in made]
    inputs = [
        helper.make_tensor_value_info(
            n,
            helper.np_dtype_to_tensor_dtype(tensors[n].dtype),
            [*(f"{n}{i}" for i in range(tensors[n].ndim - 1)), tensors[n].shape[-1]],
        )
        for n in fed
    ]
    graph = helper.make_graph(
        [helper.make_node(op_type, names, outputs, domain="ai.mqc", **op.attributes(values))],
        "node",
        inputs,
        [helper.make_empty_tensor_value_info(n) for n in outputs],
        [numpy_helper.from_array(np.asarray(tensors[n]), n) for n in names if n not in fed],
    )
    model = helper.make_model(graph, opset_imports=[], ir_version=10)
    attach_functions(model)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [torch.from_numpy(x) for x in session.run(None, {n: tensors[n] for n in fed})]


class _Onnx:
    """A tensor as variants see it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape = tuple(tensor.shape)
        self.dtype = {torch.bool: "BOOL", torch.int64: "INT64", torch.uint8: "UINT8"}.get(
            tensor.dtype, "FLOAT"
        )


def call(name: str, values: dict[str, Any]) -> Any:
    op = mqc.ops.OPS[name]
    return op.overload(*(values[k] for k in op.arguments if k in values))


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, form: str) -> torch.Tensor:
    result, size = x.clone(), cos.shape[-1]
    for i in range(size):
        half = size // 2
        partner = (i + half) % size if form == "half" else i ^ 1
        sign = -1 if (i < half if form == "half" else i % 2 == 0) else 1
        result[..., i] = x[..., i] * cos[..., None, i] + sign * x[..., partner] * sin[..., None, i]
    return result
