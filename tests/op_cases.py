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
    inferred = onnx.shape_inference.infer_shapes(model)
    _fill_ranks(inferred, call(name, values))
    onnx.checker.check_model(inferred)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [torch.from_numpy(x) for x in session.run(None, {n: tensors[n] for n in fed})]


def _fill_ranks(model: onnx.ModelProto, results: Any) -> None:
    """Sizes that depend on values are not inferred, but a checked output has a shape."""
    for info, result in zip(model.graph.output, _list(results), strict=False):
        kind = info.type.tensor_type
        if not kind.HasField("shape"):
            for axis in range(result.dim()):
                kind.shape.dim.add().dim_param = f"{info.name}{axis}"


def _list(results: Any) -> list[torch.Tensor]:
    return [results] if isinstance(results, torch.Tensor) else list(results)


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


def attention_values(
    rotary: str,
    packed: bool,
    batch: int = 2,
    tokens: int = 3,
    past: int = 4,
    spare: int | None = 2,
    heads: tuple[int, int] = (6, 2),
    width: int = 8,
    angles: int | None = None,
    value_width: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Arguments with a random mask; ``spare`` None is a cache of exactly the past rows."""
    query, groups = heads
    capacity = past if spare is None else past + tokens + spare
    mask = torch.rand(batch, 1, tokens, past + tokens) > 0.4
    mask[..., past:] |= torch.eye(tokens, dtype=torch.bool)
    values: dict[str, Any] = {
        "q": torch.randn(batch, tokens, query, width, dtype=dtype),
        "k": torch.randn(batch, tokens, groups, width, dtype=dtype),
        "v": torch.randn(batch, tokens, groups, value_width or width, dtype=dtype),
        "key_cache": torch.randn(batch, groups, capacity, width, dtype=dtype),
        "value_cache": torch.randn(batch, groups, capacity, value_width or width, dtype=dtype),
        "past": torch.tensor([past]),
        "mask": mask,
        "cos": None,
        "sin": None,
        "scale": 0.31,
        "rotary": rotary,
    }
    if rotary != "none":
        for name in ("cos", "sin"):
            values[name] = torch.randn(batch, tokens, angles or width, dtype=dtype)
    if packed:
        values["q"] = torch.cat([values["q"], values["k"], values["v"]], dim=2)
        values["k"] = values["v"] = None
    return values


ATTENTION_CASES: list[dict[str, Any]] = [
    {},
    {"past": 0, "spare": None},
    {"past": 0, "spare": 9},
    {"tokens": 1, "spare": None},
    {"tokens": 1, "spare": 0},
    {"heads": (3, 3), "batch": 1},
    {"heads": (5, 1)},
    {"angles": 6},
    {"angles": 2, "tokens": 1, "past": 7},
]
