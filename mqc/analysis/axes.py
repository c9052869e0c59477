"""How operators that treat all channels alike move one axis of their first input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from mqc.ir.edit import argument, aten, is_tensor, tensor_type

Place = tuple[int, int]
"""Axis (negative) and blocks."""

Move = Callable[[fx.Node, Sequence[Any], int, int], Place | None]
"""``(node, shape before, place of the axis, blocks) -> new place``."""

_ELEMENTWISE_KEEP = (
    aten.mul.Scalar,
    aten.div.Scalar,
    aten.contiguous.default,
    aten.clone.default,
    aten.dropout.default,
)


def move_axis(node: fx.Node, axis: int, blocks: int) -> Place | None:
    """Where ``node`` takes the axis ``axis`` (negative) of its first argument.

    Returns ``(axis, blocks)`` in the output (``blocks`` grows when neighbours are concatenated
    onto the last axis), or None if the operator does not keep the axis whole. Sizes are compared
    as text, so symbolic sizes never guard.
    """
    source = argument(node, 0)
    if not is_tensor(source):
        return None
    before = tensor_type(source).shape
    rank = len(before)
    place = axis % rank
    rule = _MOVES.get(node.target)
    if rule is not None:
        return rule(node, before, place, blocks)
    if node.target in _ELEMENTWISE_KEEP:
        return axis, blocks
    return None


def _dim(node: fx.Node, index: int, rank: int, default: int = 0) -> int:
    value = argument(node, index)
    return (default if value is None else int(value)) % rank


def _transpose(node: fx.Node, before: Sequence[Any], place: int, blocks: int) -> Place | None:
    rank = len(before)
    one, two = _dim(node, 1, rank), _dim(node, 2, rank)
    return {one: two, two: one}.get(place, place) - rank, blocks


def _permute(node: fx.Node, before: Sequence[Any], place: int, blocks: int) -> Place | None:
    order = argument(node, 1)
    rank = len(before)
    return [int(dim) % rank for dim in order].index(place) - rank, blocks


def _reshape(node: fx.Node, before: Sequence[Any], place: int, blocks: int) -> Place | None:
    after = tensor_type(node).shape
    rank = len(before)
    size = before[place]
    if not isinstance(size, int):
        return None
    if place == rank - 1:
        last = after[-1] if after else None
        if last == size:
            return -1, blocks
        if isinstance(last, int) and last > size and last % size == 0:
            return -1, blocks * (last // size)
        return None
    if all(dim == 1 for dim in before[place + 1 :]) and after and after[-1] == size:
        return -1, blocks
    # Leading axes untouched, the rest regrouped: the axis stays where it is.
    if tuple(after[: place + 1]) == tuple(before[: place + 1]):
        return place - len(after), blocks
    tail = rank - place
    if len(after) >= tail and tuple(after[-tail:]) == tuple(before[-tail:]):
        return -tail, blocks
    return None


def _unsqueeze(node: fx.Node, before: Sequence[Any], place: int, blocks: int) -> Place | None:
    rank = len(before) + 1
    dim = _dim(node, 1, rank)
    return (place + 1 if dim <= place else place) - rank, blocks


def _drop_dim(node: fx.Node, before: Sequence[Any], place: int, blocks: int) -> Place | None:
    """``select`` and ``squeeze(dim)``: one other axis goes away."""
    rank = len(before)
    dim = _dim(node, 1, rank)
    if dim == place:
        return None
    if len(tensor_type(node).shape) == rank:  # squeeze of an axis that is not 1: nothing happens
        return place - rank, blocks
    return (place - 1 if dim < place else place) - (rank - 1), blocks


def _unless_dim(index: int) -> Move:
    """Operators that work along one axis (slice, flip, roll): fine unless it is this one."""

    def rule(node: fx.Node, before: Sequence[Any], place: int, blocks: int) -> Place | None:
        rank = len(before)
        return None if _dim(node, index, rank) == place else (place - rank, blocks)

    return rule


def _same_rank(node: fx.Node, before: Sequence[Any], place: int, blocks: int) -> Place | None:
    after = tensor_type(node).shape
    axis = place - len(before)
    return (axis, blocks) if after[axis] == before[place] else None


def _index(node: fx.Node, before: Sequence[Any], place: int, blocks: int) -> Place | None:
    """``index.Tensor`` picks rows; the last axis stays if it is not indexed."""
    indices = argument(node, 1)
    if place == len(before) - 1 and len(indices) <= place:
        return -1, blocks
    return None


def _reduce(node: fx.Node, before: Sequence[Any], place: int, blocks: int) -> Place | None:
    """``sum`` and ``mean`` over other axes."""
    rank, dims = len(before), argument(node, 1)
    if not dims or any(int(dim) % rank == place for dim in dims):
        return None
    if argument(node, 2):
        return place - rank, blocks
    ahead = sum(int(dim) % rank < place for dim in dims)
    return place - ahead - (rank - len(dims)), blocks


def _spatial(node: fx.Node, before: Sequence[Any], place: int, blocks: int) -> Place | None:
    """Pooling and resizing of planes: each channel for itself."""
    return (-3, blocks) if place == len(before) - 3 else None


_MOVES: dict[Any, Move] = {
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.reshape.default: _reshape,
    aten.view.default: _reshape,
    aten.flatten.using_ints: _reshape,
    aten.unflatten.int: _reshape,
    aten.unsqueeze.default: _unsqueeze,
    aten.select.int: _drop_dim,
    aten.squeeze.dim: _drop_dim,
    aten.slice.Tensor: _unless_dim(1),
    aten.roll.default: _same_rank,
    aten.index_select.default: _unless_dim(1),
    aten.expand.default: _same_rank,
    aten.repeat.default: _same_rank,
    aten.gather.default: _same_rank,
    aten.index.Tensor: _index,
    aten.sum.dim_IntList: _reduce,
    aten.mean.dim: _reduce,
    aten.avg_pool2d.default: _spatial,
    aten.adaptive_avg_pool2d.default: _spatial,
    aten.upsample_bilinear2d.vec: _spatial,
    aten.upsample_bicubic2d.vec: _spatial,
}
