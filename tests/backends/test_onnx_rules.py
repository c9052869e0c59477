"""Every translation rule, one operator at a time, against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from onnx_cases import actual, aten, relative
from torch import fx

from mqc.backends.onnx import emit as emit_module
from mqc.backends.onnx.builder import Unsupported
from mqc.backends.onnx.emit import emit
from mqc.backends.onnx.rules import RULES
from mqc.backends.onnx.translate import translate
from mqc.errors import TargetError
from mqc.ir import SCALAR, Component, ParamStore, Port, Program, TensorType

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
N = torch.tensor([[2, 0, 1], [1, 1, 0]])
B = torch.tensor([[True, False, True], [False, False, True]])
Z = X[0]
IMAGE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(2))
KERNEL = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(3))
Q = torch.randn(2, 4, 5, 8, generator=torch.Generator().manual_seed(4))
K = torch.randn(2, 2, 7, 8, generator=torch.Generator().manual_seed(5))
MASK = torch.ones(2, 1, 5, 7).tril(2).bool()

CASES: list[tuple[Any, ...]] = [
    (aten.reshape.default, X, [2, 12]),
    (aten.reshape.default, X, [-1, 2, 2]),
    (aten.view.default, X, [6, 4]),
    (aten._unsafe_view.default, X, [6, 4]),
    (aten.flatten.using_ints, X, 1, 2),
    (aten.unflatten.int, X, 2, [2, 2]),
    (aten.squeeze.default, X[:1]),
    (aten.squeeze.dim, X[:1], 0),
    (aten.squeeze.dims, X[:1, :1], [0, 1]),
    (aten.unsqueeze.default, X, -2),
    (aten.contiguous.default, X),
    (aten.clone.default, X),
    (aten.alias.default, X),
    (aten.detach.default, X),
    (aten.permute.default, X, [2, 0, -2]),
    (aten.transpose.int, X, -1, 0),
    (aten.t.default, Z),
    (aten.expand.default, X[:, :1], [5, 2, 3, -1]),
    (aten.expand.default, X, [2, 3, 4]),
    (aten.repeat.default, X, [2, 1, 3, 1]),
    (aten.repeat_interleave.self_int, X, 2, 1),
    (aten.repeat_interleave.self_int, X, 3, -1),
    (aten.softplus.default, 12 * X),
    (aten.slice.Tensor, X, -1, 1, 3),
    (aten.slice.Tensor, X, 1, -2, 9223372036854775807, 1),
    (aten.slice.Tensor, X, 2, 0, 9223372036854775807, 2),
    (aten.slice.Tensor, X, 0),
    (aten.select.int, X, 1, -1),
    (aten.cat.default, [X, Y[:, :1]], 1),
    (aten.cat.default, [N, X[..., 0]], -1),
    (aten.stack.default, [X, Y], -1),
    (aten.roll.default, X, [1, -1], [1, 2]),
    (aten.embedding.default, Z, N),
    (aten.index_select.default, X, -1, N[0]),
    (aten.gather.default, X[..., 0], 1, N),
    (aten.index.Tensor, X, [None, N[0]]),
    (aten.index.Tensor, X, [B[:, 1:].long(), N[:, :2]]),
    (aten.index.Tensor, X, [N[1, :1, None], N[0]]),
    (aten.scatter.src, N, 1, torch.tensor([[2, 0, 1], [0, 1, 2]]), N),
    (aten.where.self, B, N, X[..., 0]),
    (aten.where.ScalarOther, B, X[..., 0], 2),
    (aten.where.ScalarSelf, B, 2.5, X[..., 0]),
    (aten.where.Scalar, B, 2.5, 1.0),
    (aten.masked_fill.Scalar, X[..., 0], B, -1.5),
    (aten.argsort.default, N, -1, False),
    (aten.argsort.stable, B, {"stable": True, "dim": 1, "descending": True}),
    (aten.cumsum.default, N, 1),
    (aten.cumsum.default, B, 1),
    (aten.arange.default, 5),
    (aten.arange.start, 2, 5, {"dtype": torch.float32}),
    (aten.arange.start_step, 1, 9, 3),
    (aten.full.default, [2, 3], 1.5),
    (aten.zeros.default, [2], {"dtype": torch.int64}),
    (aten.ones.default, [2, 1], {"dtype": torch.bool}),
    (aten.full_like.default, X, 2.0),
    (aten.zeros_like.default, N),
    (aten.ones_like.default, X),
    (aten.new_full.default, X, [3], 7.0),
    (aten.new_zeros.default, X, [3, 1]),
    (aten.new_ones.default, N, [2]),
    (aten.scalar_tensor.default, 3.5),
    (aten.add.Tensor, X, Y, {"alpha": 2}),
    (aten.add.Tensor, X[..., 0], N),
    (aten.add.Tensor, N, B),
    (aten.add.Scalar, N, 2),
    (aten.sub.Tensor, X, 1.5),
    (aten.sub.Scalar, X, 1.5),
    (aten.rsub.Scalar, X, 1.5),
    (aten.mul.Tensor, X[..., 0], B),
    (aten.mul.Scalar, X, 3),
    (aten.div.Tensor, N, 2),
    (aten.div.Scalar, X, 3),
    (aten.minimum.default, X, Y),
    (aten.maximum.default, X, Y),
    *((getattr(aten, name).Tensor, N, N.flip(0)) for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    *((getattr(aten, name).Scalar, N, 0.5) for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    *((op, B, B.flip(0)) for op in (aten.logical_and.default, aten.logical_or.default)),
    *((op, B, B.flip(0)) for op in (aten.bitwise_and.Tensor, aten.bitwise_or.Tensor)),
    *((op, B, B.flip(0)) for op in (aten.__and__.Tensor, aten.__or__.Tensor)),
    (aten.logical_not.default, B),
    (aten.bitwise_not.default, B),
    *((getattr(aten, n).default, X) for n in "neg exp sin cos tanh sigmoid relu erf".split()),
    *((getattr(aten, n).default, X) for n in "abs floor round silu reciprocal".split()),
    *((getattr(aten, n).default, X.abs() + 0.5) for n in ("sqrt", "log", "rsqrt")),
    (aten.gelu.default, X),
    (aten.gelu.default, X, {"approximate": "tanh"}),
    (aten.pow.Tensor_Scalar, X, 2),
    (aten.clamp.default, X, -0.5),
    (aten.clamp.default, X, None, 0.5),
    (aten.to.dtype, N, torch.float32),
    (aten._to_copy.default, B, {"dtype": torch.int64}),
    (aten.mean.dim, X, [-1], True),
    (aten.sum.dim_IntList, X, [0, 2]),
    (aten.sum.dim_IntList, B, [1]),
    (aten.amax.default, X, [1]),
    (aten.amin.default, X, [1]),
    (aten.any.dim, B, 1),
    (aten.all.dim, B, -1, True),
    (aten.softmax.int, X, -2),
    (aten._softmax.default, X, 1, False),
    (aten.rms_norm.default, X, [4], Z[0], 1e-6),
    (aten.rms_norm.default, X, [4]),
    (aten.layer_norm.default, X, [4], Z[0], Z[1], 1e-6),
    (aten.layer_norm.default, X, [3, 4]),
    (aten.matmul.default, X, Y.transpose(1, 2)),
    (aten.mm.default, Z, Z.t()),
    (aten.bmm.default, X, Y.transpose(1, 2)),
    (aten.linear.default, X, Z, Z[:, 0]),
    (aten.linear.default, X, Z),
    (aten.conv1d.default, X, torch.ones(2, 3, 2), None, [2]),
    (aten.conv2d.default, IMAGE, KERNEL, Z[0], [2, 2], [1, 1]),
    (aten.conv3d.default, IMAGE[None], KERNEL[None, :2, None, 0], None, [1], [1, 0, 0]),
    (aten.scaled_dot_product_attention.default, Q, Q, Q),
    (aten.scaled_dot_product_attention.default, Q[0], Q[0], Q[0], {"scale": 0.3}),
    (aten.scaled_dot_product_attention.default, Q, K, K, MASK, {"enable_gqa": True}),
    (aten.scaled_dot_product_attention.default, Q, K, K, MASK[:1] * 1.0, {"enable_gqa": True}),
]


def single(target: Any, *args: Any) -> tuple[Program, dict[str, torch.Tensor], torch.Tensor]:
    """A program of one call; tensors among ``args`` are inputs, a last dict holds keywords."""
    kwargs = dict(args[-1]) if args and isinstance(args[-1], dict) else {}
    args = args[: len(args) - bool(kwargs)]
    graph, inputs = fx.Graph(), {}

    def enter(value: Any) -> Any:
        if isinstance(value, list):
            return [enter(item) for item in value]
        if not isinstance(value, torch.Tensor):
            return value
        node = graph.placeholder(f"input_{len(inputs)}")
        node.meta = {"type": TensorType.of(value)}
        inputs[node.name] = value.contiguous()
        return node

    entered = [enter(value) for value in args]
    if not inputs:  # a graph needs an input
        enter(X)
    node = graph.call_function(target, tuple(entered), kwargs)
    want = target(*args, **kwargs)
    node.meta = {"type": TensorType.of(want), "module": "layer.0"}
    graph.output((node,))
    ports = [Port(n, TensorType.of(v), (None,) * v.dim()) for n, v in inputs.items()]
    out = Port("result", TensorType.of(want), (None,) * want.dim())
    return (
        Program({"one": Component("one", graph, ports, [out])}, ParamStore(), [], {}),
        inputs,
        want,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case[0]))
def test_rule(case: tuple[Any, ...], tmp_path: Path) -> None:
    program, inputs, want = single(*case)
    translate(program.components["one"])  # by its own rule, not by torch.onnx
    emit(program, tmp_path)
    (got,) = actual(tmp_path / "one.onnx", inputs)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if want.dtype.is_floating_point:
        assert relative(got, want) <= 1e-6
    else:
        assert torch.equal(got, want)


def test_every_rule_is_tested() -> None:
    assert {str(target) for target in RULES} == {str(case[0]) for case in CASES}


@pytest.mark.parametrize(
    "case",
    [
        (aten.flip.default, X, [1]),
        (aten.avg_pool2d.default, IMAGE, [2, 2]),
    ],
    ids=lambda case: str(case[0]),
)
def test_rare_operators_take_the_road_of_torch(case: tuple[Any, ...], tmp_path: Path) -> None:
    program, inputs, want = single(*case)
    with pytest.raises(Unsupported, match="has no rule"):
        translate(program.components["one"])
    emit(program, tmp_path)
    (got,) = actual(tmp_path / "one.onnx", inputs)
    assert relative(got, want) <= 1e-6
    assert b"/site-packages/" not in (tmp_path / "one.onnx").read_bytes()


def test_unknown_operator() -> None:
    program, _, _ = single(aten.median.default, X)
    with pytest.raises(TargetError, match="component one cannot be written as ONNX") as caught:
        emit_module.to_onnx(program.components["one"])
    assert "aten.median.default" in caught.value.message
    assert "--target reference" in str(caught.value.hint)


def test_computed_sizes(tmp_path: Path) -> None:
    """[n, m] -> arange(n * m // 2 + 3), reshaped, and a repeated column."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta = {"type": TensorType(("n", "2*m"), torch.float32)}

    def add(target: Any, args: tuple[Any, ...], kind: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = {"type": kind}
        return node

    import operator

    n = add(aten.sym_size.int, (x, 0), SCALAR)
    width = add(aten.sym_size.int, (x, -1), SCALAR)
    half = add(operator.floordiv, (width, 2), SCALAR)
    size = add(operator.mul, (n, half), SCALAR)
    more = add(operator.add, (size, 3), SCALAR)
    steps = add(aten.arange.default, (more,), TensorType(("m*n + 3",), torch.int64))
    body = add(aten.slice.Tensor, (steps, 0, 0, size), TensorType(("m*n",), torch.int64))
    table = add(aten.reshape.default, (body, [n, half]), TensorType(("n", "m"), torch.int64))
    column = add(aten.sum.dim_IntList, (table, [1], True), TensorType(("n", 1), torch.int64))
    wide = add(aten.expand.default, (column, [-1, half]), TensorType(("n", "m"), torch.int64))
    zeros = add(aten.zeros_like.default, (wide,), TensorType(("n", "m"), torch.int64))
    total = add(aten.add.Tensor, (wide, zeros), TensorType(("n", "m"), torch.int64))
    graph.output((table, total, x))
    kinds = [TensorType(("n", "m"), torch.int64)] * 2 + [x.meta["type"]]
    outputs = [Port(f"y{i}", kind, (None, None)) for i, kind in enumerate(kinds)]
    ports = [Port("x", x.meta["type"], (None, None))]
    program = Program({"one": Component("one", graph, ports, outputs)}, ParamStore(), [], {})
    emit(program, tmp_path)
    for rows, columns in ((2, 6), (1, 2), (5, 8)):
        value = torch.randn(rows, columns)
        want = program.module("one")(value)
        for got, wanted in zip(actual(tmp_path / "one.onnx", {"x": value}), want, strict=True):
            assert torch.equal(got, wanted)
