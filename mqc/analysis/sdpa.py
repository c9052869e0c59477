"""What a call of scaled dot product attention is given, and where its heads stand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mqc.analysis.index_trace import EMPTY, IndexTrace, is_view
from mqc.ir import TensorType
from mqc.ir.edit import aten, tensor_type
from mqc.ir.symbols import ExampleSizes

SDPA = aten.scaled_dot_product_attention.default
_TRACED = (2, 3)
"""Values of every symbol when the places of elements are compared."""


@dataclass(frozen=True)
class Sdpa:
    """One attention: q [B, H, S, D], k and v [B, H, T, D]; the mask bool [B or 1, 1, S, T]."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    scale: float


def read_sdpa(node: fx.Node) -> Sdpa | str:
    """The arguments of ``node``, or why no operator of this package computes it."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    query, mask = given["query"], given.get("attn_mask")
    if given.get("dropout_p") or given.get("is_causal"):
        return "it has dropout or an implicit causal mask"
    if any(tensor_type(given[name]).rank != 4 for name in names[:3]):
        return "its rows have no axis of heads"
    if mask is not None and tensor_type(mask).dtype != torch.bool:
        return "its mask is not one of booleans"
    if mask is not None and (tensor_type(mask).rank != 4 or tensor_type(mask).shape[1] != 1):
        return "its mask is not the same for all heads"
    heads = [tensor_type(given[name]).shape[1] for name in names[:3]]
    width = tensor_type(query).shape[3]
    if not all(isinstance(size, int) for size in (*heads, width)):
        return "its number of heads is not fixed"
    scale = given.get("scale")
    scale = 1 / math.sqrt(int(width)) if scale is None else float(scale)
    return Sdpa(node, query, given["key"], given["value"], mask, scale)


def swaps(node: Any, first: int, second: int) -> bool:
    """Whether ``node`` swaps these two axes of its input, ``first`` the smaller."""
    if not isinstance(node, fx.Node) or not node.args:
        return False
    if node.target is aten.transpose.int:
        rank = tensor_type(node).rank
        axes: Any = node.args[1:3]
        return sorted(int(axis) % rank for axis in axes) == [first, second]
    if node.target is not aten.permute.default:
        return False
    order = list(range(tensor_type(node).rank))
    order[first], order[second] = second, first
    given: Any = node.args[1]
    return [int(axis) % len(order) for axis in given] == order


def token_major(value: fx.Node) -> fx.Node | None:
    """What ``value`` [B, H, S, D] was before heads and tokens changed places, or None.

    [B, S, H, D], or [S, H, D] where the batch of one was added afterwards.
    """
    inner: Any = value.args[0] if value.args else None
    if swaps(value, 1, 2):
        return inner  # type: ignore[no-any-return]
    if value.target is aten.unsqueeze.default and value.args[1] == 0 and swaps(inner, 0, 1):
        return inner.args[0]  # type: ignore[no-any-return]
    return None


@dataclass(frozen=True)
class Columns:
    """Heads that are columns [start, start + H * D) of the rows of ``base`` [..., N]."""

    base: fx.Node
    start: int
    heads: int
    width: int

    @property
    def end(self) -> int:
        return self.start + self.heads * self.width


def find_columns(value: fx.Node, heads: int) -> Columns | None:
    """The adjacent columns of one value's rows that ``value`` is a view of, or None.

    Args:
        value: rank 3 or 4, heads on axis ``heads``, head width on the last, and tokens (after the
            batch, if there is one) on the other.

    Which element of the base stands where is found by evaluating the views on indices, at two
    values of every symbol; rows are in the order of (batch, token) in both.
    """
    base: Any = value
    while is_view(base):
        inputs = [n for n in base.all_input_nodes if isinstance(n.meta.get("type"), TensorType)]
        if len(inputs) != 1:
            return None
        base = inputs[0]
    kind, shape = tensor_type(base), tensor_type(value).shape
    count, width, columns = shape[heads], shape[-1], kind.shape[-1] if kind.rank > 1 else None
    if not (isinstance(count, int) and isinstance(width, int) and isinstance(columns, int)):
        return None
    starts = {_start(base, value, heads, size) for size in _TRACED}
    start = starts.pop()
    return None if starts or start is None else Columns(base, start, count, width)


def _start(base: fx.Node, value: fx.Node, heads: int, size: int) -> int | None:
    trace = IndexTrace(ExampleSizes(size))
    shape = torch.Size(trace.shape(base))
    trace.seed(base, torch.arange(shape.numel()).reshape(shape))
    found = trace.get(value).movedim(heads, -2).flatten(0, -3)
    rows, count, width = found.shape
    if rows * shape[-1] != shape.numel() or bool((found == EMPTY).any()):
        return None
    start = int(found[0, 0, 0])
    places = torch.arange(count * width).reshape(count, width) + start
    expected = torch.arange(rows)[:, None, None] * shape[-1] + places
    return start if bool((found == expected).all()) else None
