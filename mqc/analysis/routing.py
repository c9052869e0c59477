"""Routers: linears whose output decides by comparison which expert a row goes to.

Rounding such a linear does not change a value a little; it sends rows elsewhere. They are small,
and stay in floating point.
"""

from __future__ import annotations

from torch import fx

from mqc.analysis.flow import is_linear
from mqc.ir import Component
from mqc.ir.edit import aten, is_tensor, tensor_type

_ORDERS = (aten.argsort.default, aten.argsort.stable, aten.topk.default, aten.argmax.default)


def find_routers(component: Component) -> list[fx.Node]:
    """Linears on the way to a sorting order, with no other linear in between."""
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    for node in component.graph.nodes:
        if node.op != "call_function" or node.target not in _ORDERS:
            continue
        stack = list(node.all_input_nodes)
        while stack:
            value = stack.pop()
            if value in seen or not is_tensor(value):
                continue
            seen.add(value)
            if is_linear(value):
                found[value] = None
            elif tensor_type(value).dtype.is_floating_point:
                stack += value.all_input_nodes
    return list(found)
