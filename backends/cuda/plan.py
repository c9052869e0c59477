"""The static memory plan: which results live when, and where each lies in one arena.

At compile time a plan lists, for every result of a kernel, its symbolic shape and its life (first
and last step). At load time, with sizes known, :func:`solve` gives each an offset; lives that
overlap never share bytes. Smaller sizes than those solved for fit the same places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mqc.backends.cuda.ops import LINEAR, LINEAR_A16
from mqc.ir import Component, TensorType
from mqc.ir.dialect import VIEW_OPS
from mqc.ir.edit import tensor_type
from mqc.ir.symbols import evaluate_shape
from mqc.ir.types import Dim, dtype_from_name, dtype_name

ALIGNMENT = 256
"""Bytes; what CUDA's own allocator gives."""
ROW_ALIGNMENT = 16
"""Bytes between rows of int8 values are a multiple of this (the kernels' loads)."""

_mqc = torch.ops.mqc
KERNELS = frozenset(
    {
        LINEAR,
        LINEAR_A16,
        _mqc.quantize_static.default,
        _mqc.rms_norm_quantize.default,
        _mqc.activation_quantize.default,
        _mqc.hadamard.default,
        _mqc.embedding_w8.default,
        _mqc.attention.default,
    }
)
"""Operators whose results are planned; everything else gets memory from torch."""
_OWN = frozenset(
    {"aten.cat.default", "aten.stack.default", "aten.repeat.default", "aten.roll.default"}
    | {"aten.repeat_interleave.self_int", "aten.pixel_shuffle.default"}
    | {"aten.pixel_unshuffle.default"}
)
_ALIASING = (VIEW_OPS - _OWN) | {"aten.to.dtype", "aten.gather.default"}
"""Operators whose result may share memory with their first argument."""


@dataclass(frozen=True)
class Value:
    """One result of a kernel: node's name, index of the result, and its life in steps."""

    node: str
    index: int
    shape: tuple[Dim, ...]
    dtype: torch.dtype
    first: int
    last: int

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes at these sizes, rows of int8 padded. Raises ``KeyError`` for an unknown symbol."""
        return tensor_bytes(evaluate_shape(self.shape, sizes), self.dtype)

    def to_json(self) -> dict[str, Any]:
        return {
            "node": self.node,
            "index": self.index,
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "life": [self.first, self.last],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Value:
        first, last = data["life"]
        dtype = dtype_from_name(data["dtype"])
        return cls(data["node"], data["index"], tuple(data["shape"]), dtype, first, last)


def row_stride(width: int, dtype: torch.dtype) -> int:
    """Elements from one row to the next of a kernel's result."""
    return -(-width // ROW_ALIGNMENT) * ROW_ALIGNMENT if dtype == torch.int8 else width


def tensor_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a kernel's result of this shape."""
    count = row_stride(shape[-1], dtype) if shape else 1
    for size in shape[:-1]:
        count *= size
    return count * dtype.itemsize


def alias_source(node: fx.Node) -> fx.Node | None:
    """The value whose memory ``node`` may share, or None. Results of a tuple own theirs."""
    if node.op != "call_function" or not node.args or str(node.target) not in _ALIASING:
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) else None


def lifetimes(component: Component) -> list[Value]:
    """What of a component is planned. Results that leave the component are not."""
    nodes = list(component.graph.nodes)
    owner: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for step, node in enumerate(nodes):
        source = alias_source(node)
        owner[node] = owner[source] if source is not None else node
        for value in (node, *node.all_input_nodes):
            last[owner[value]] = step
    leaving = {owner[node] for node in component.output_node.all_input_nodes}
    found: list[Value] = []
    for step, node in enumerate(nodes):
        if node.target not in KERNELS:
            continue
        for index, readers in _results(node).items():
            if not leaving & set(readers):
                kind = tensor_type(readers[0])
                end = max(last[reader] for reader in readers)
                found.append(Value(node.name, index, kind.shape, kind.dtype, step, end))
    return found


def _results(node: fx.Node) -> dict[int, list[fx.Node]]:
    """Result index -> nodes that stand for it. Attention's caches are inputs, and not planned."""
    if isinstance(node.meta["type"], TensorType):
        return {0: [node]}
    found: dict[int, list[fx.Node]] = {}
    for user in node.users:
        index = user.args[1]
        assert isinstance(index, int)
        if index == 0 or node.target is not _mqc.attention.default:
            found.setdefault(index, []).append(user)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class Layout:
    """Offset and size in bytes of (node, result index), and the arena's size."""

    places: Mapping[tuple[str, int], tuple[int, int]]
    nbytes: int


def solve(values: Sequence[Value], sizes: Mapping[str, int]) -> Layout:
    """Offsets for values of these sizes, largest first, each at the lowest place that is free.

    Values with a symbol that ``sizes`` lacks are left out.
    """
    known: list[tuple[int, Value]] = []
    for value in values:
        try:
            known.append((value.nbytes(sizes), value))
        except KeyError:
            continue
    known.sort(key=lambda item: (-item[0], item[1].first, item[1].node, item[1].index))
    placed: list[tuple[int, int, Value]] = []
    total = 0
    for size, value in known:
        offset = 0
        for start, end, other in sorted(placed, key=lambda item: item[0]):
            if other.last < value.first or value.last < other.first:
                continue
            if offset + size <= start:
                break
            offset = max(offset, end)
        end = offset + -(-size // ALIGNMENT) * ALIGNMENT
        placed.append((offset, end, value))
        total = max(total, end)
    places = {(v.node, v.index): (start, end - start) for start, end, v in placed}
    return Layout(places, total)
