"""Whole rows of [batch, tokens, channels] picked by number."""

from __future__ import annotations

from torch import fx

from mqc.ir.edit import aten, tensor_type


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
