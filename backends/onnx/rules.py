"""ATen operators in ONNX: moving, selecting and making values.

A rule takes the builder and the node and returns the name of the result. Arguments are read by
:class:`Call`, which knows an operator's schema, so positional, keyword and default arguments look
alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from mqc.analysis.rows import picked_rows
from mqc.backends.onnx.builder import Builder, Unsupported, type_of
from mqc.ir import TensorType
from mqc.ir.types import Dim

aten = torch.ops.aten
_END = np.iinfo(np.int64).max


class Call:
    """The arguments of a node by name, and its type."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        schema = node.target._schema  # type: ignore[union-attr]
        self._values: dict[str, Any] = {}
        for index, argument in enumerate(schema.arguments):
            if index < len(node.args):
                self._values[argument.name] = node.args[index]
            else:
                default = argument.default_value if argument.has_default_value() else None
                self._values[argument.name] = node.kwargs.get(argument.name, default)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    @property
    def type(self) -> TensorType:
        return type_of(self.node)

    def axis(self, name: str = "dim", of: str = "self", extra: int = 0) -> int:
        """An axis of tensor argument ``of``, counted from the front."""
        return int(self[name]) % (type_of(self[of]).rank + extra)


Rule = Callable[[Builder, Call], str]
RULES: dict[Any, Rule] = {}
"""Operator overload -> rule. A package that brings its own operators may add to it."""


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for operator overloads."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return add


# ---- views -------------------------------------------------------------------------------------


@rule(
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
def _reshape(b: Builder, call: Call) -> str:
    source, target = type_of(call["self"]).shape, call.type.shape
    if source == target:
        return b.name(call["self"])
    if call.node.target is aten.unsqueeze.default:
        return b("Unsqueeze", b.name(call["self"]), b.ints(call.axis(extra=1)))
    known = [isinstance(size, int) or size in source for size in target]
    sizes = (
        call["size"]
        if "size" in call._values
        else call["shape"]
        if "shape" in call._values
        else None
    )
    if sizes is not None and len(sizes) == len(target) and known.count(False) > 1:
        return b("Reshape", b.name(call["self"]), b.shape(list(sizes)))
    return b.reshape(b.name(call["self"]), source, target)


@rule(aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default)
def _same(b: Builder, call: Call) -> str:
    return b.name(call["self"])


@rule(aten.permute.default)
def _permute(b: Builder, call: Call) -> str:
    return _turn(b, call, [int(axis) % call.type.rank for axis in call["dims"]])


def _turn(b: Builder, call: Call, order: list[int]) -> str:
    """A transposition; where only axes of one move, a reshape, which copies nothing."""
    source, target = type_of(call["self"]).shape, call.type.shape
    wide = [axis for axis in order if source[axis] != 1]
    moved = [n for n, m in zip(target, source, strict=True) if isinstance(n, str) and n != m]
    if wide == sorted(wide) and len(moved) <= 1 and "past" not in source:
        return b.reshape(b.name(call["self"]), source, target)
    return b("Transpose", b.name(call["self"]), perm=order)


@rule(aten.transpose.int)
def _transpose(b: Builder, call: Call) -> str:
    order = list(range(call.type.rank))
    first, second = call.axis("dim0"), call.axis("dim1")
    order[first], order[second] = second, first
    return _turn(b, call, order)


@rule(aten.t.default)
def _t(b: Builder, call: Call) -> str:
    return b("Transpose", b.name(call["self"]), perm=list(range(call.type.rank))[::-1])


@rule(aten.expand.default)
def _expand(b: Builder, call: Call) -> str:
    source, target = type_of(call["self"]).shape, call.type.shape
    if source == target:
        return b.name(call["self"])
    padded: list[Dim] = [*[1] * (len(target) - len(source)), *source]
    sizes: list[Any] = []
    for given, own, size in zip(call["size"], padded, target, strict=True):
        if own == size:
            sizes.append(1)
        else:
            sizes.append(given if isinstance(given, fx.Node) else size)
    return b("Expand", b.name(call["self"]), b.shape(sizes))


@rule(aten.repeat.default)
def _repeat(b: Builder, call: Call) -> str:
    name, rank = b.name(call["self"]), type_of(call["self"]).rank
    times = list(call["repeats"])
    if len(times) > rank:
        name = b("Unsqueeze", name, b.ints(*range(len(times) - rank)))
    return b("Tile", name, b.shape(times))


@rule(aten.repeat_interleave.self_int)
def _repeat_interleave(b: Builder, call: Call) -> str:
    source, times, axis = type_of(call["self"]), call["repeats"], call["dim"]
    if axis is None or isinstance(times, fx.Node):
        raise Unsupported("repeat_interleave of a flattened tensor, or by a computed number")
    size = source.shape[axis]
    if not isinstance(size, int):
        raise Unsupported("repeat_interleave along an axis of a dynamic size")
    index = [place for place in range(size) for _ in range(times)]
    return b("Gather", b.name(call["self"]), b.ints(*index), axis=int(axis) % source.rank)


@rule(aten.slice.Tensor)
def _slice(b: Builder, call: Call) -> str:
    start, end, step = call["start"] or 0, call["end"], call["step"]
    end = _END if end is None else end
    whole = isinstance(end, int) and end >= _END // 2
    if start == 0 and step == 1 and (whole or type_of(call["self"]).shape == call.type.shape):
        return b.name(call["self"])
    bounds = [b.size(value) for value in (start, end)]
    return b("Slice", b.name(call["self"]), *bounds, b.ints(call.axis()), b.ints(int(step)))


@rule(aten.select.int)
def _select(b: Builder, call: Call) -> str:
    index = call["index"]
    if isinstance(index, fx.Node):
        raise Unsupported("select with a computed index")
    position = b.constant(np.array(index, np.int64))
    return b("Gather", b.name(call["self"]), position, axis=call.axis())


@rule(aten.cat.default)
def _cat(b: Builder, call: Call) -> str:
    parts = [b.operand(part, call.type.dtype) for part in call["tensors"]]
    return b("Concat", *parts, axis=int(call["dim"]) % call.type.rank)


@rule(aten.stack.default)
def _stack(b: Builder, call: Call) -> str:
    axis = int(call["dim"]) % call.type.rank
    parts = [b.operand(part, call.type.dtype) for part in call["tensors"]]
    return b("Concat", *[b("Unsqueeze", part, b.ints(axis)) for part in parts], axis=axis)


@rule(aten.roll.default)
def _roll(b: Builder, call: Call) -> str:
    name = b.name(call["self"])
    if not call["dims"]:
        raise Unsupported("roll over a flattened tensor")
    for shift, axis in zip(call["shifts"], call["dims"], strict=True):
        if isinstance(shift, fx.Node):
            raise Unsupported("roll by a computed distance")
        where = b.ints(axis)
        head = b("Slice", name, b.ints(-shift), b.ints(_END), where)
        tail = b("Slice", name, b.ints(0), b.ints(-shift), where)
        name = b("Concat", head, tail, axis=axis) if shift else name
    return name


# ---- selecting ---------------------------------------------------------------------------------


@rule(aten.embedding.default)
def _embedding(b: Builder, call: Call) -> str:
    return b("Gather", b.name(call["weight"]), b.name(call["indices"]), axis=0)


@rule(aten.index_select.default)
def _index_select(b: Builder, call: Call) -> str:
    return b("Gather", b.name(call["self"]), b.name(call["index"]), axis=call.axis())


@rule(aten.gather.default)
def _gather(b: Builder, call: Call) -> str:
    index = call["index"]
    rows = picked_rows(call.node)
    if rows is not None:  # whole rows: no index for every element
        places = b("Unsqueeze", b.name(rows), b.ints(-1))
        return b("GatherND", b.name(call["self"]), places, batch_dims=1)
    return b("GatherElements", b.name(call["self"]), b.name(index), axis=call.axis())


@rule(aten.index.Tensor)
def _index(b: Builder, call: Call) -> str:
    given = [(axis, index) for axis, index in enumerate(call["indices"]) if index is not None]
    if any(type_of(index).dtype == torch.bool for _, index in given):
        raise Unsupported("indexing by a mask")
    if len(given) == 1:
        axis, index = given[0]
        return b("Gather", b.name(call["self"]), b.name(index), axis=axis)
    if [axis for axis, _ in given] != list(range(len(given))):
        raise Unsupported("indices with gaps between them")
    shapes = [type_of(index).shape for _, index in given]
    rank = max(len(shape) for shape in shapes)
    parts = []
    target = call.type.shape[:rank]
    for (_, index), shape in zip(given, shapes, strict=True):
        name = b.operand(index, torch.int64)
        if shape != target:
            name = b("Expand", name, b.shape(list(target)))
        parts.append(b("Unsqueeze", name, b.ints(-1)))
    return b("GatherND", b.name(call["self"]), b("Concat", *parts, axis=-1))


@rule(aten.scatter.src)
def _scatter(b: Builder, call: Call) -> str:
    names = [b.name(call[key]) for key in ("self", "index", "src")]
    return b("ScatterElements", *names, axis=call.axis())


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(b: Builder, call: Call) -> str:
    dtype = call.type.dtype
    left, right = (b.operand(call[key], dtype) for key in ("self", "other"))
    return b("Where", b.operand(call["condition"], torch.bool), left, right)


@rule(aten.masked_fill.Scalar)
def _masked_fill(b: Builder, call: Call) -> str:
    value = b.constant(np.array(call["value"]), call.type.dtype)
    return b("Where", b.name(call["mask"]), value, b.name(call["self"]))


@rule(aten.argsort.default, aten.argsort.stable)
def _argsort(b: Builder, call: Call) -> str:
    """TopK breaks ties by the lower index: it is stable in both directions."""
    kind, axis = type_of(call["self"]), call.axis()
    name = b.name(call["self"])
    if kind.dtype in (torch.bool, torch.uint8, torch.int8, torch.int16):
        name = b.cast(name, torch.int32)
    length = kind.shape[axis]
    largest = int(bool(call["descending"]))
    values = b("TopK", name, b.size(length), axis=axis, largest=largest, sorted=1)
    indices = f"{values}.indices"
    b.nodes[-1].output.append(indices)
    return indices


@rule(aten.cumsum.default)
def _cumsum(b: Builder, call: Call) -> str:
    axis = b.constant(np.array(call.axis(), np.int64))
    return b("CumSum", b.operand(call["self"], call.type.dtype), axis)


# ---- making ------------------------------------------------------------------------------------


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def _arange(b: Builder, call: Call) -> str:
    dtype, values = call.type.dtype, call._values
    bounds = [values.get("start", 0), values["end"], values.get("step", 1)]
    if all(isinstance(value, (int, float)) for value in bounds):
        return b.constant(torch.arange(*bounds, dtype=dtype).numpy())
    scalars = [
        b("Squeeze", b.size(v), b.ints(0)) if isinstance(v, fx.Node) else b.constant(np.int64(v))
        for v in bounds
    ]
    result = b("Range", *scalars)
    return result if dtype == torch.int64 else b.cast(result, dtype)


@rule(
    aten.full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.new_full.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.scalar_tensor.default,
)
def _full(b: Builder, call: Call) -> str:
    kind, name = call.type, str(call.node.target)
    value = call._values.get("fill_value", call._values.get("s"))
    if value is None:
        value = 1 if "ones" in name else 0
    if isinstance(value, fx.Node):
        raise Unsupported("a tensor filled with a computed number")
    element = b.constant(np.array(value), kind.dtype)
    if not kind.shape:
        return element
    given = call._values.get("size")
    sizes = list(given) if given is not None else list(kind.shape)
    return b("Expand", element, b.shape(sizes))
