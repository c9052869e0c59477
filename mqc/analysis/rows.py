"""Rows of [batch, tokens, channels]: operators that work on each alone, rows picked by number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

import mqc.ops  # noqa: F401  (registers the operators)
from mqc.analysis.flow import NORMS
from mqc.ir import TUPLE
from mqc.ir.dialect import POINTWISE_OPS
from mqc.ir.edit import aten, is_tensor, tensor_type
from mqc.ir.serialize import target_name
from mqc.ir.types import Dim

_mqc = torch.ops.mqc
_ALONG: dict[Any, tuple[int, ...]] = {
    aten.softmax.int: (0,),
    aten.argsort.default: (0,),
    aten.slice.Tensor: (0,),
    aten.index_select.default: (0,),
    aten.gather.default: (0, 2),
    aten.sum.dim_IntList: (0,),
    aten.any.dim: (0,),
}
"""Operators along one axis (argument 1), row-wise if it is the last."""
_ROWS: dict[Any, tuple[int, ...]] = {
    aten.linear.default: (0,),
    **dict.fromkeys(NORMS, (0,)),
    **_ALONG,
    _mqc.hadamard.default: (0,),
    _mqc.rank_update.default: (0, 1),
    _mqc.quantize_static.default: (0,),
    _mqc.rms_norm_quantize.default: (0,),
    _mqc.activation_quantize.default: (0,),
    _mqc.linear_w4a8.default: (0, 6, 8),
    _mqc.linear_w8a8.default: (0, 6, 8),
    _mqc.linear_w4a16.default: (0, 4, 6),
    _mqc.linear_w8a16.default: (0, 4, 6),
}
"""Operators that work on each row [.., channels] by itself -> arguments that are rows."""
MODALITY: dict[Any, int] = {
    _mqc.quantize_static.default: 2,
    _mqc.rms_norm_quantize.default: 3,
    _mqc.activation_quantize.default: 5,
    _mqc.linear_w4a8.default: 4,
    _mqc.linear_w8a8.default: 4,
}
"""Row-wise operator -> its argument ``modality``."""


def row_region(end: fx.Node, lead: tuple[Dim, ...], start: fx.Node | None = None) -> list[fx.Node]:
    """Row-wise values [*lead, channels] that lead to ``end`` and nowhere else, in order; only those
    behind ``start``, if given."""
    inside: dict[fx.Node, None] = {}
    node = end.prev
    while node.op != "root" and node is not start:
        only_here = all(user is end or user in inside for user in node.users)
        if node.users and only_here and is_row_wise(node, lead):
            inside[node] = None
        node = node.prev
    return list(inside)[::-1]


def is_row_wise(node: fx.Node, lead: tuple[Dim, ...]) -> bool:
    """Whether ``node`` makes each row [*lead, channels] from that row of its operands alone."""
    if node.op != "call_function":
        return False
    if target_name(node.target) == "operator.getitem":
        made = node.args[0]
        return isinstance(made, fx.Node) and made.target in _ROWS
    if node.meta.get("type") != TUPLE and not _has_lead(node, lead):
        return False
    if node.target in _ROWS:
        if node.target in NORMS and len(node.args[1]) != 1:  # type: ignore[arg-type]
            return False
        if node.target in _ALONG and not _along_channels(node):
            return False
        return all(_has_lead(value, lead) for value in row_operands(node))
    if target_name(node.target) not in POINTWISE_OPS:
        return False
    tensors = [value for value in node.all_input_nodes if is_tensor(value)]
    return all(_has_lead(value, lead) or tensor_type(value).rank <= 1 for value in tensors)


def _along_channels(node: fx.Node) -> bool:
    axis: Any = node.args[1]
    if isinstance(axis, (list, tuple)):
        axis = axis[0] if len(axis) == 1 else None
    return axis in (2, -1)


def _has_lead(value: Any, lead: tuple[Dim, ...]) -> bool:
    if not is_tensor(value):
        return False
    kind = tensor_type(value)
    return kind.rank == 3 and kind.shape[:2] == lead


def row_operands(node: fx.Node) -> Iterator[fx.Node]:
    """Arguments that are rows; those of a pointwise operator with three axes."""
    if node.target in _ROWS:
        for place in _ROWS[node.target]:
            value = node.args[place] if place < len(node.args) else None
            if isinstance(value, fx.Node):
                yield value
    elif target_name(node.target) != "operator.getitem":
        for value in node.all_input_nodes:
            if is_tensor(value) and tensor_type(value).rank == 3:
                yield value


def picked_rows(node: fx.Node) -> fx.Node | None:
    """``rows`` [B, R] where ``node`` gathers x[b, rows[b, r], :] of x [B, T, K]; else None."""
    if node.target is not aten.gather.default:
        return None
    value, axis, index = node.args[:3]
    if not isinstance(value, fx.Node) or not isinstance(index, fx.Node):
        return None
    source = tensor_type(value)
    if source.rank != 3 or axis not in (1, -2) or index.target is not aten.expand.default:
        return None
    inner = index.args[0]
    assert isinstance(inner, fx.Node)
    widened = inner.target is aten.unsqueeze.default and inner.args[1] in (2, -1)
    if not widened and inner.target is not aten.reshape.default:
        return None
    rows = inner.args[0]
    assert isinstance(rows, fx.Node)
    shape = tensor_type(rows).shape
    # A reshape counts where it adds an axis of one behind those of the rows.
    same = len(shape) == 2 and tensor_type(inner).shape == (*shape, 1)
    same = same and shape[0] == source.shape[0]
    return rows if same and tensor_type(index).shape == (*shape, source.shape[2]) else None
