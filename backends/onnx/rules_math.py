"""ATen operators in ONNX: element by element, reductions, products, norms, attention."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from mqc.backends.onnx.builder import Builder, Unsupported, type_of
from mqc.backends.onnx.rules import Call, Rule, aten, rule
from mqc.ir import TensorType

FORBIDDEN = float(torch.finfo(torch.float32).min)
"""Additive mask of a key that a row may not attend: exp() of it is 0 beside any allowed score, and
no row can become NaN."""


def _kind(value: Any) -> Any:
    """What torch's promotion rules look at: an example of an operand."""
    if isinstance(value, fx.Node):
        kind = value.meta["type"]
        return torch.empty([1] * kind.rank, dtype=kind.dtype) if _is_tensor(kind) else 1
    return value


def _is_tensor(kind: Any) -> bool:
    return isinstance(kind, TensorType)


# ---- two operands ------------------------------------------------------------------------------


def _arithmetic(op_type: str, reverse: bool = False) -> Rule:
    def apply(b: Builder, call: Call) -> str:
        dtype, alpha = call.type.dtype, call._values.get("alpha", 1)
        left, right = (b.operand(call[key], dtype) for key in ("self", "other"))
        if reverse:
            left, right = right, left
        if alpha not in (1, None):
            right = b("Mul", right, b.constant(np.array(alpha), dtype))
        return b(op_type, left, right)

    return apply


for _name, _op, _reverse in (
    ("add.Tensor", "Add", False),
    ("add.Scalar", "Add", False),
    ("sub.Tensor", "Sub", False),
    ("sub.Scalar", "Sub", False),
    ("rsub.Scalar", "Sub", True),
    ("mul.Tensor", "Mul", False),
    ("mul.Scalar", "Mul", False),
    ("div.Tensor", "Div", False),
    ("div.Scalar", "Div", False),
    ("minimum.default", "Min", False),
    ("maximum.default", "Max", False),
):
    _packet, _overload = _name.split(".")
    rule(getattr(getattr(aten, _packet), _overload))(_arithmetic(_op, _reverse))


def _comparison(op_type: str, negate: bool = False) -> Rule:
    def apply(b: Builder, call: Call) -> str:
        dtype = torch.result_type(_kind(call["self"]), _kind(call["other"]))
        left, right = (b.operand(call[key], dtype) for key in ("self", "other"))
        result = b(op_type, left, right)
        return b("Not", result) if negate else result

    return apply


for _name, _op, _negate in (
    ("eq", "Equal", False),
    ("ne", "Equal", True),
    ("lt", "Less", False),
    ("le", "LessOrEqual", False),
    ("gt", "Greater", False),
    ("ge", "GreaterOrEqual", False),
):
    _packet = getattr(aten, _name)
    rule(_packet.Tensor, _packet.Scalar)(_comparison(_op, _negate))


def _logical(op_type: str) -> Rule:
    def apply(b: Builder, call: Call) -> str:
        if call.type.dtype != torch.bool:
            raise Unsupported("bitwise operators on integers")
        return b(op_type, *(b.operand(call[key], torch.bool) for key in ("self", "other")))

    return apply


rule(aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor)(_logical("And"))
rule(aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor)(_logical("Or"))


@rule(aten.logical_not.default, aten.bitwise_not.default)
def _not(b: Builder, call: Call) -> str:
    if type_of(call["self"]).dtype != torch.bool:
        raise Unsupported("the complement of integers")
    return b("Not", b.name(call["self"]))


# ---- one operand -------------------------------------------------------------------------------


def _unary(op_type: str) -> Rule:
    return lambda b, call: b(op_type, b.operand(call["self"], call.type.dtype))


for _name, _op in (
    ("neg", "Neg"),
    ("sqrt", "Sqrt"),
    ("reciprocal", "Reciprocal"),
    ("exp", "Exp"),
    ("log", "Log"),
    ("sin", "Sin"),
    ("cos", "Cos"),
    ("tanh", "Tanh"),
    ("sigmoid", "Sigmoid"),
    ("relu", "Relu"),
    ("erf", "Erf"),
    ("abs", "Abs"),
    ("floor", "Floor"),
    ("round", "Round"),
):
    rule(getattr(aten, _name).default)(_unary(_op))


@rule(aten.rsqrt.default)
def _rsqrt(b: Builder, call: Call) -> str:
    return b("Reciprocal", b("Sqrt", b.operand(call["self"], call.type.dtype)))


@rule(aten.silu.default)
def _silu(b: Builder, call: Call) -> str:
    name = b.name(call["self"])
    return b("Mul", name, b("Sigmoid", name))


@rule(aten.softplus.default)
def _softplus(b: Builder, call: Call) -> str:
    if call["beta"] != 1:
        raise Unsupported("softplus with a beta")
    return b("Softplus", b.operand(call["self"], call.type.dtype))


@rule(aten.gelu.default)
def _gelu(b: Builder, call: Call) -> str:
    return b("Gelu", b.name(call["self"]), approximate=str(call["approximate"]))


@rule(aten.pow.Tensor_Scalar)
def _pow(b: Builder, call: Call) -> str:
    dtype = call.type.dtype
    return b("Pow", b.operand(call["self"], dtype), b.operand(call["exponent"], dtype))


@rule(aten.clamp.default)
def _clamp(b: Builder, call: Call) -> str:
    dtype = call.type.dtype
    bounds = ["" if call[k] is None else b.operand(call[k], dtype) for k in ("min", "max")]
    return b("Clip", b.operand(call["self"], dtype), *bounds)


@rule(aten.to.dtype, aten._to_copy.default)
def _to(b: Builder, call: Call) -> str:
    return b.operand(call["self"], call.type.dtype)


# ---- reductions --------------------------------------------------------------------------------


def _reduction(op_type: str) -> Rule:
    def apply(b: Builder, call: Call) -> str:
        axes = call["dim"]
        axes = [axes] if isinstance(axes, int) else list(axes or range(type_of(call["self"]).rank))
        name = b.operand(call["self"], call.type.dtype)
        return b(op_type, name, b.ints(*axes), keepdims=int(bool(call["keepdim"])))

    return apply


rule(aten.mean.dim)(_reduction("ReduceMean"))
rule(aten.sum.dim_IntList)(_reduction("ReduceSum"))
rule(aten.amax.default)(_reduction("ReduceMax"))
rule(aten.amin.default)(_reduction("ReduceMin"))


@rule(aten.any.dim, aten.all.dim)
def _any(b: Builder, call: Call) -> str:
    op_type = "ReduceMax" if call.node.target is aten.any.dim else "ReduceMin"
    flags = b.cast(b.operand(call["self"], torch.bool), torch.int32)
    keep = int(bool(call["keepdim"]))
    return b.cast(b(op_type, flags, b.ints(call.axis()), keepdims=keep), torch.bool)


@rule(aten.softmax.int, aten._softmax.default)
def _softmax(b: Builder, call: Call) -> str:
    return b("Softmax", b.operand(call["self"], call.type.dtype), axis=call.axis())


# ---- norms -------------------------------------------------------------------------------------


@rule(aten.rms_norm.default)
def _rms_norm(b: Builder, call: Call) -> str:
    """The form that onnxruntime fuses into one kernel."""
    kind, x = type_of(call["input"]), b.name(call["input"])
    if len(call["normalized_shape"]) != 1:
        raise Unsupported("an RMSNorm over several axes")
    eps = torch.finfo(kind.dtype).eps if call["eps"] is None else call["eps"]
    square = b("Pow", x, b.constant(2.0, kind.dtype))
    mean = b("ReduceMean", square, b.ints(-1), keepdims=1)
    root = b("Sqrt", b("Add", mean, b.constant(eps, kind.dtype)))
    normal = b("Div", x, root)
    weight = call["weight"]
    # The fused kernel needs a gain; without one it is ones, which costs nothing.
    gain = (
        b.constant(np.ones(int(kind.shape[-1])), kind.dtype) if weight is None else b.name(weight)
    )
    return b("Mul", normal, gain)


@rule(aten.layer_norm.default)
def _layer_norm(b: Builder, call: Call) -> str:
    shape = [int(size) for size in call["normalized_shape"]]
    kind = type_of(call["input"])
    weight = call["weight"]
    gain = b.constant(np.ones(shape), kind.dtype) if weight is None else b.name(weight)
    bias = [] if call["bias"] is None else [b.name(call["bias"])]
    epsilon, axis = float(call["eps"]), -len(shape)
    return b("LayerNormalization", b.name(call["input"]), gain, *bias, epsilon=epsilon, axis=axis)


# ---- products ----------------------------------------------------------------------------------


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default)
def _matmul(b: Builder, call: Call) -> str:
    other = call._values.get("other", call._values.get("mat2"))
    return b("MatMul", b.name(call["self"]), b.name(other))


@rule(aten.linear.default)
def _linear(b: Builder, call: Call) -> str:
    turned = b("Transpose", b.name(call["weight"]), perm=[1, 0])
    result = b("MatMul", b.name(call["input"]), turned)
    return result if call["bias"] is None else b("Add", result, b.name(call["bias"]))


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def _conv(b: Builder, call: Call) -> str:
    rank = type_of(call["weight"]).rank - 2
    settings = {k: _spread(call[k], rank) for k in ("stride", "padding", "dilation")}
    names = [b.name(call[k]) for k in ("input", "weight", "bias") if call[k] is not None]
    return b(
        "Conv",
        *names,
        strides=settings["stride"],
        pads=settings["padding"] * 2,
        dilations=settings["dilation"],
        group=int(call["groups"]),
    )


def _spread(value: Any, rank: int) -> list[int]:
    if isinstance(value, str):
        raise Unsupported(f"padding {value!r}")
    items = [value] if isinstance(value, int) else list(value)
    return items * rank if len(items) == 1 else items


# ---- attention ---------------------------------------------------------------------------------


@rule(aten.scaled_dot_product_attention.default)
def _attention(b: Builder, call: Call) -> str:
    """[B,H,T,D], [B,G,L,D], [B,G,L,D] -> [B,H,T,D].

    Grouped keys and values are never repeated: the H / G query heads that share a key head are
    stacked along T, one matrix product a key head. The additive mask is made once for all layers.
    """
    if call["dropout_p"] or call["is_causal"]:
        raise Unsupported("attention with dropout or an implicit causal mask")
    query, key = type_of(call["query"]), type_of(call["key"])
    rank, width = query.rank, query.shape[-1]
    heads, groups = query.shape[-3], key.shape[-3]
    stacked = bool(call["enable_gqa"]) and heads != groups
    if not isinstance(width, int) or not isinstance(heads, int) or not isinstance(groups, int):
        raise Unsupported("attention with a dynamic number of heads")
    scale = 1 / math.sqrt(width) if call["scale"] is None else float(call["scale"])
    mask = _additive(b, call["attn_mask"], heads // groups if stacked else 1)
    q = b("Mul", b.name(call["query"]), b.constant(scale, query.dtype))
    if stacked:
        q = b("Reshape", q, b.ints(0, groups, -1, width))
    order = [*range(rank - 2), rank - 1, rank - 2]
    scores = b("MatMul", q, b("Transpose", b.name(call["key"]), perm=order))
    if mask is not None:
        scores = b("Add", scores, mask)
    result = b("MatMul", b("Softmax", scores, axis=-1), b.name(call["value"]))
    return b("Reshape", result, b.ints(0, heads, -1, width)) if stacked else result


def _additive(b: Builder, mask: fx.Node | None, times: int) -> str | None:
    """The mask as numbers to add; for stacked query heads, ``times`` copies along T."""
    if mask is None:
        return None
    kind, name = type_of(mask), b.name(mask)
    if kind.dtype == torch.bool:
        allowed, forbidden = b.constant(np.float32(0)), b.constant(np.float32(FORBIDDEN))
        name = b.once(("additive", mask), lambda: b("Where", b.name(mask), allowed, forbidden))
    if times == 1:
        return name
    if kind.rank != 4 or kind.shape[1] != 1:
        raise Unsupported("grouped attention with a mask per head")
    return b.once(("stacked", mask, times), lambda: b("Concat", *([name] * times), axis=-2))


# ---- sizes -------------------------------------------------------------------------------------


def size_rule(b: Builder, node: fx.Node) -> str:
    """Symbolic sizes: ``sym_size``, numbers in tensors and Python arithmetic, as int64 [1]."""
    if node.target is aten.sym_size.int:
        source, axis = node.args
        assert isinstance(source, fx.Node) and isinstance(axis, int)
        axis %= type_of(source).rank
        size = type_of(source).shape[axis]
        if isinstance(size, int):
            return b.ints(size)
        return b("Shape", b.name(source), start=axis, end=axis + 1)
    if node.target is aten.item.default:
        return b("Reshape", b.operand(node.args[0], torch.int64), b.ints(1))
    op_type = _ARITHMETIC.get(node.target)
    if op_type is None:
        raise Unsupported(f"{node.target} on a size")
    return b(op_type, *(b.size(value) for value in node.args))


_ARITHMETIC: dict[Any, str] = {
    operator.add: "Add",
    operator.sub: "Sub",
    operator.mul: "Mul",
    operator.floordiv: "Div",
    operator.mod: "Mod",
    operator.neg: "Neg",
    torch.sym_max: "Max",
    torch.sym_min: "Min",
}
