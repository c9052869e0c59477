"""Constants in front of a linear, moved behind it, where they part a norm from its readers."""

from __future__ import annotations

import torch
from torch import fx

from mqc.analysis.axes import move_axis
from mqc.analysis.flow import NORMS, is_linear
from mqc.ir import Component, Program, TensorType
from mqc.ir.edit import argument, aten, call, get_param, param_value, replace, tensor_type
from mqc.transform import PassContext

_LOOKUPS = (aten.embedding.default, aten.index.Tensor, aten.index_select.default)


def split_sums(program: Program, component: Component, ctx: PassContext) -> int:
    """``linear(norm(x) + c)`` as ``linear(norm(x)) + (c W^T)``, computed now; returns how many.

    ``c`` are positions: a parameter, or rows looked up in one. A resampler adds them to its keys
    and not to its values, so the norm's gain could move into the readers of neither.
    """
    count = 0
    for node in list(component.graph.nodes):
        if not is_linear(node):
            continue
        parts = _parts(node.args[0])
        if parts is not None and ctx.take():
            _split(program, node, *parts)
            count += 1
    return count


def _parts(value: object) -> tuple[fx.Node, fx.Node] | None:
    """(what a norm gives, what a parameter gives) where ``value`` is their sum."""
    if not isinstance(value, fx.Node) or value.target != aten.add.Tensor:
        return None
    if len(value.args) != 2 or value.kwargs:
        return None
    for normed, rows in (value.args, value.args[::-1]):
        if not (isinstance(normed, fx.Node) and isinstance(rows, fx.Node)):
            continue
        whole = tensor_type(normed).shape[-1] == tensor_type(rows).shape[-1]
        if whole and _from_norm(normed) and _from_table(rows):
            return normed, rows
    return None


def _from_norm(value: fx.Node) -> bool:
    """Whether ``value`` holds rows of a norm with a gain."""
    if value.target in NORMS:
        return argument(value, 2) is not None
    source = argument(value, 0)
    if not isinstance(source, fx.Node) or move_axis(value, -1, 1) != (-1, 1):
        return False
    return _from_norm(source)


def _from_table(value: fx.Node) -> bool:
    """Whether ``value`` holds rows of a parameter, moved by operators that name no width."""
    if value.op == "get_attr":
        return True
    source = argument(value, 0)
    if not isinstance(source, fx.Node) or value.target == aten.reshape.default:
        return False
    moves = value.target in _LOOKUPS or move_axis(value, -1, 1) == (-1, 1)
    return moves and value.target != aten.expand.default and _from_table(source)


def _split(program: Program, node: fx.Node, normed: fx.Node, rows: fx.Node) -> None:
    weight = param_value(program.params, node.args[1])
    assert weight is not None
    kind = tensor_type(normed)
    with node.graph.inserting_before(node):
        args = (normed, *node.args[1:])
        inner = call(node.graph, aten.linear.default, args, _wide(kind, len(weight)), node)
        moved = _projected(program, rows, weight, node)
        total = call(node.graph, aten.add.Tensor, (inner, moved), tensor_type(node), node)
    replace(node, total)


def _projected(program: Program, rows: fx.Node, weight: torch.Tensor, like: fx.Node) -> fx.Node:
    """``rows W^T``, with the product taken in the table that the rows come from."""
    if rows.op == "get_attr":
        table = program.params[str(rows.target)]
        product = table.to(torch.float64) @ weight.to(torch.float64).T
        return get_param(program, like.graph, str(rows.target), product.to(table.dtype))
    source = rows.args[0]
    assert isinstance(source, fx.Node)
    inner = _projected(program, source, weight, like)
    kind = _wide(tensor_type(rows), len(weight))
    return call(like.graph, rows.target, (inner, *rows.args[1:]), kind, rows)


def _wide(kind: TensorType, width: int) -> TensorType:
    return kind.with_shape(*kind.shape[:-1], width)
