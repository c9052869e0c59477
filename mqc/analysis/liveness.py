"""How much memory the values of a graph need while it runs, at given sizes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from mqc.ir import Component, TensorType
from mqc.ir.edit import aten
from mqc.ir.symbols import evaluate_shape

VIEWS = frozenset(
    {
        aten.reshape.default,
        aten.view.default,
        aten.transpose.int,
        aten.permute.default,
        aten.expand.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.slice.Tensor,
        aten.select.int,
        aten.detach.default,
    }
)
"""Operators whose result shares its input's memory (a reshape of a moved axis copies: not seen)."""


def value_bytes(node: fx.Node, sizes: Mapping[str, int]) -> int:
    """Bytes of the tensor that ``node`` gives; 0 for scalars and tuples."""
    kind = node.meta.get("type")
    if not isinstance(kind, TensorType):
        return 0
    count = 1
    for size in evaluate_shape(kind.shape, sizes):
        count *= size
    return count * kind.dtype.itemsize


def peak_bytes(component: Component, sizes: Mapping[str, int]) -> int:
    """Largest sum of bytes of the values that are alive at once, parameters left out.

    A value lives from the node that makes it to the last node that reads it or a view of it;
    inputs live throughout. Temporaries inside of an operator are not counted. Raises ``KeyError``
    for a symbol that ``sizes`` lacks.
    """
    nodes = list(component.graph.nodes)
    owner: dict[fx.Node, fx.Node] = {}
    last_use: dict[fx.Node, int] = {}
    for index, node in enumerate(nodes):
        base = node.args[0] if node.target in VIEWS else node
        assert isinstance(base, fx.Node)
        owner[node] = owner.get(base, base)
        for value in (node, *node.all_input_nodes):
            last_use[owner[value]] = index
    live = sum(value_bytes(node, sizes) for node in nodes if node.op == "placeholder")
    peak = live
    dying: dict[int, list[fx.Node]] = {}
    for value, index in last_use.items():
        if value.op == "call_function":
            dying.setdefault(index, []).append(value)
    for index, node in enumerate(nodes):
        if node.op == "call_function" and owner[node] is node:
            live += value_bytes(node, sizes)
            peak = max(peak, live)
        for value in dying.get(index, ()):
            live -= value_bytes(value, sizes)
    return peak
