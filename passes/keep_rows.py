"""Rows in their batch: undo the flattening of leading axes around row-wise operators."""

from __future__ import annotations

from torch import fx

from mqc.analysis.flow import NORMS, is_linear
from mqc.ir import Component
from mqc.ir.dialect import POINTWISE_OPS
from mqc.ir.edit import aten, is_tensor, replace, tensor_type
from mqc.ir.serialize import target_name
from mqc.ir.types import Dim
from mqc.transform import PassContext

_ALONG = (
    aten.softmax.int,
    aten.argsort.default,
    aten.slice.Tensor,
    aten.gather.default,
    aten.sum.dim_IntList,
    aten.any.dim,
)
"""Operators along one axis (argument 1): row-wise if it is the last."""


def keep_rows(component: Component, ctx: PassContext) -> int:
    """Let linears, norms and pointwise operators work on [batch, tokens, channels].

    Some models reshape to [batch * tokens, channels] for them and back. Quantization by modality
    needs to know a row's sequence, so both reshapes go where nothing in between mixes rows.
    Returns how many flattenings went.
    """
    count = 0
    for node in list(component.graph.nodes):
        if node.target == aten.reshape.default and _type(node.args[0]) == tensor_type(node):
            replace(node, node.args[0])
    for node in list(component.graph.nodes):
        if not _flattens(node):
            continue
        found = _region(node)
        if found is None or not ctx.take():
            continue
        inside, ends = found
        source = node.args[0]
        assert isinstance(source, fx.Node)
        lead = tensor_type(source).shape[:-1]
        for value in inside:
            kind = tensor_type(value)
            value.meta["type"] = kind.with_shape(*lead, kind.shape[-1])
            if value.target in _ALONG:  # the last axis, whatever the rank
                axis = [-1] if isinstance(value.args[1], (list, tuple)) else -1
                value.args = (value.args[0], axis, *value.args[2:])
        for end in ends:
            inner = end.args[0]
            assert isinstance(inner, fx.Node)
            replace(end, inner)
        replace(node, source)
        count += 1
    return count


def _type(value: object) -> object:
    return value.meta["type"] if isinstance(value, fx.Node) else None


def _flattens(node: fx.Node) -> bool:
    """A reshape of several leading axes to one."""
    if node.target != aten.reshape.default or not is_tensor(node.args[0]):
        return False
    before, after = tensor_type(node.args[0]).shape, tensor_type(node).shape  # type: ignore[arg-type]
    return len(before) > 2 and len(after) == 2 and before[-1] == after[-1]


def _region(start: fx.Node) -> tuple[list[fx.Node], list[fx.Node]] | None:
    """Row-wise values behind a flattening, and the reshapes that end it; None if others read it."""
    source = start.args[0]
    assert isinstance(source, fx.Node)
    lead, rows = tensor_type(source).shape[:-1], tensor_type(start).shape[0]
    inside: list[fx.Node] = []
    ends: list[fx.Node] = []
    stack = [start]
    while stack:
        value = stack.pop()
        for user in value.users:
            if user in inside or user in ends:
                continue
            if _ends(user, lead):
                ends.append(user)
            elif _row_wise(user) and tensor_type(user).shape[:-1] == (rows,):
                inside.append(user)
                stack.append(user)
            else:
                return None
    known = {start, *inside}
    for value in inside:
        operands = value.args[:1] if is_linear(value) else value.all_input_nodes
        if any(n not in known and not _per_channel(n) for n in operands):
            return None
    return inside, ends


def _ends(node: fx.Node, lead: tuple[Dim, ...]) -> bool:
    """A reshape back to the leading axes."""
    if node.target != aten.reshape.default:
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return tensor_type(node).shape == (*lead, tensor_type(source).shape[-1])


def _row_wise(node: fx.Node) -> bool:
    if not is_tensor(node):
        return False
    if node.target in NORMS:
        return len(node.args[1]) == 1  # type: ignore[arg-type]
    if node.target in _ALONG:
        return _along_channels(node)
    return is_linear(node) or target_name(node.target) in POINTWISE_OPS


def _along_channels(node: fx.Node) -> bool:
    """Whether an operator along one axis works inside each row, and keeps the rank."""
    source, axis = node.args[:2]
    if isinstance(axis, (list, tuple)):
        axis = axis[0] if len(axis) == 1 else None
    rank = tensor_type(node).rank
    same_rank = isinstance(source, fx.Node) and tensor_type(source).rank == rank
    return same_rank and isinstance(axis, int) and axis % rank == rank - 1


def _per_channel(value: object) -> bool:
    """A parameter that is the same for all rows."""
    return isinstance(value, fx.Node) and value.op == "get_attr" and tensor_type(value).rank <= 1
