"""The head: the linear whose output is the logits."""

from __future__ import annotations

from torch import fx

from mqc.analysis.index_trace import is_view
from mqc.ir import Component
from mqc.ir.edit import aten


def find_head(component: Component) -> fx.Node | None:
    """The linear that gives a component's output whose rows the host asks for, or None."""
    for port in component.outputs:
        if port.axis("row") is None:
            continue
        node = component.output_value(port.name)
        while is_view(node):
            node = node.all_input_nodes[0]
        if node.target == aten.linear.default:
            return node
    return None
