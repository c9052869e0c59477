"""Heads of attention: keys and values that are repeated for grouped query heads."""

from __future__ import annotations

from typing import Any

from torch import fx

from mqc.ir import TensorType
from mqc.ir.edit import aten, tensor_type

_VIEWS = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


def unrepeated(node: Any) -> fx.Node | None:
    """K [B,G,L,D] behind ``reshape(expand(unsqueeze(K, 2)), [B,H,L,D])``, or None."""
    if not isinstance(node, fx.Node) or node.target not in _VIEWS:
        return None
    expand = node.args[0]
    if not isinstance(expand, fx.Node) or expand.target is not aten.expand.default:
        return None
    unsqueeze = expand.args[0]
    if not isinstance(unsqueeze, fx.Node):
        return None
    source = _before_unsqueeze(unsqueeze)
    if source is None:
        return None
    batch, groups, length, width = tensor_type(source).shape
    wide, result = tensor_type(expand).shape, tensor_type(node).shape
    repeats = wide[2]
    if not isinstance(groups, int) or not isinstance(repeats, int):
        return None
    expected = (batch, groups, repeats, length, width)
    if wide != expected or result != (batch, groups * repeats, length, width):
        return None
    return source


def _before_unsqueeze(node: fx.Node) -> fx.Node | None:
    """X [B,G,L,D] where ``node`` is X[:, :, None] as unsqueeze or as a reshape."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("type"), TensorType):
        return None
    kind = tensor_type(source)
    if kind.rank != 4:
        return None
    while True:
        if node.target is aten.unsqueeze.default and node.args[1] in (2, -3):
            return source
        if node.target in _VIEWS:
            batch, groups, length, width = kind.shape
            return source if tensor_type(node).shape == (batch, groups, 1, length, width) else None
        return None
