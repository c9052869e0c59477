"""Rotary embeddings as models write them, found in a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from mqc.ir.edit import aten, tensor_type

_END = 2**31


@dataclass(frozen=True)
class Rotary:
    """``source`` [B, H, S, D] (or with heads and tokens changed) turned by angles [B, S, R].

    Without a batch axis: [S, H, D] by angles [S, R].

    ``form`` is "half" (column i with i + R/2) or "interleaved" (2i with 2i + 1); R <= D.
    """

    source: fx.Node
    cos: fx.Node
    sin: fx.Node
    form: str


def find_rotary(node: Any, heads: int) -> Rotary | None:
    """The rotary embedding whose result is ``node``, or None.

    ``node`` has heads on axis ``heads`` and rank 4, or 3 for one sequence without a batch axis.
    """
    kind = tensor_type(node)
    if kind.rank not in (3, 4):
        return None
    if node.target is aten.cat.default and len(node.args[0]) == 2:
        turned, rest = node.args[0]
        found = _turned(turned, heads)
        kept = _columns(rest)
        if found is None or kept is None:
            return None
        size = tensor_type(turned).shape[-1]
        head = _columns(found.source)
        if head is None or head[0] is not kept[0]:
            return None
        if head[1:] != (0, size, 1) or kept[1] != size or kept[3] != 1 or not _to_end(kept):
            return None
        return Rotary(head[0], found.cos, found.sin, found.form)
    return _turned(node, heads)


def _turned(node: Any, heads: int) -> Rotary | None:
    """``x * cos + t * sin`` over all columns."""
    if not isinstance(node, fx.Node) or node.target is not aten.add.Tensor:
        return None
    for first, second in (node.args[:2], node.args[1::-1]):
        for x, cos in _factors(first):
            for t, sin in _factors(second):
                form = _partner(t, x)
                turns, lifts = (_angles(angles, x, heads) for angles in (cos, sin))
                if form is not None and turns is not None and lifts is not None:
                    return Rotary(x, turns, lifts, form)
    return None


def _factors(node: Any) -> list[tuple[fx.Node, fx.Node]]:
    """Both orders of a product of two tensors."""
    if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor:
        return []
    left, right = node.args[:2]
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return []
    return [(left, right), (right, left)]


def _angles(node: fx.Node, x: fx.Node, heads: int) -> fx.Node | None:
    """The angles [B, S, R] (or [S, R]) that turn x: ``unsqueeze(angles, heads)``.

    Heads first, [1, S, R] turns x as it is: the missing axis is that of the batch.
    """
    rank, kind = tensor_type(x).rank, tensor_type(node)
    if rank == 4 and heads == 1 and kind.rank == 3 and kind.shape[0] == 1:
        return node
    if node.target is not aten.unsqueeze.default or kind.rank != rank:
        return None
    source, axis = node.args
    assert isinstance(source, fx.Node) and isinstance(axis, int)
    return source if axis % rank == heads else None


def _partner(node: Any, x: fx.Node) -> str | None:
    """How ``node`` pairs the columns of x: "half", "interleaved", or None."""
    size = tensor_type(x).shape[-1]
    if not isinstance(size, int):
        return None
    if node.target is aten.cat.default:
        negated, plain = node.args[0]
        if _is_last(node, node.args[1]) and _negated(negated, x, size // 2, size, 1):
            found = _columns(plain)
            return "half" if found is not None and found == (x, 0, size // 2, 1) else None
        return None
    if node.target is not aten.reshape.default or tensor_type(node) != tensor_type(x):
        return None
    stack: Any = node.args[0]
    if getattr(stack, "target", None) is not aten.stack.default:
        return None
    negated, plain = stack.args[0]
    found = _columns(plain)
    if not _is_last(stack, stack.args[1]) or found is None:
        return None
    even = found[0] is x and found[1] == 0 and found[3] == 2 and found[2] >= size - 1
    return "interleaved" if even and _negated(negated, x, 1, size, 2) else None


def _is_last(node: fx.Node, axis: Any) -> bool:
    return bool(axis % tensor_type(node).rank == tensor_type(node).rank - 1)


def _negated(node: Any, x: fx.Node, start: int, end: int, step: int) -> bool:
    if not isinstance(node, fx.Node) or node.target is not aten.neg.default:
        return False
    found = _columns(node.args[0])
    return (
        found is not None
        and (found[0], found[1], found[3]) == (x, start, step)
        and (found[2] >= end)
    )


def _columns(node: Any) -> tuple[fx.Node, int, int, int] | None:
    """(source, start, end, step) of a slice of the last axis."""
    if not isinstance(node, fx.Node) or node.target is not aten.slice.Tensor:
        return None
    args: list[Any] = [*node.args, *[None] * (5 - len(node.args))]
    source, axis, start, end, step = args[0], args[1] or 0, args[2] or 0, args[3], args[4] or 1
    end = _END if end is None else end
    assert isinstance(source, fx.Node) and isinstance(axis, int)
    rank = tensor_type(source).rank
    numbers = all(isinstance(value, int) for value in (start, end, step))
    if axis % rank != rank - 1 or not numbers:
        return None
    return source, int(start), int(end), int(step)


def _to_end(columns: tuple[fx.Node, int, int, int]) -> bool:
    size = tensor_type(columns[0]).shape[-1]
    return isinstance(size, int) and columns[2] >= size
