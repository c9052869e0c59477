"""Feed-forward pairs: a linear whose input is a pointwise non-linear function of other linears.

Between the two no offline rotation is possible (the non-linearity sits in the way), so this is
where an online Hadamard goes, and where a channel can be scaled in a branch that is only
multiplied (``up`` in ``silu(gate) * up``).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from mqc.analysis.flow import is_linear
from mqc.analysis.index_trace import CLONES
from mqc.ir import Program
from mqc.ir.dialect import POINTWISE_OPS
from mqc.ir.edit import aten, is_tensor, tensor_type
from mqc.ir.serialize import target_name

ACTIVATIONS = frozenset(
    (
        aten.silu.default,
        aten.gelu.default,
        aten.relu.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.erf.default,
        aten.softplus.default,
    )
)


@dataclass(frozen=True)
class FeedForward:
    """``down(f(up..., gate...))``; ``scalable`` are the linears that reach it by products only."""

    component: str
    down: fx.Node
    up: tuple[fx.Node, ...]
    scalable: tuple[fx.Node, ...]


def find_feed_forward(program: Program) -> list[FeedForward]:
    """Every feed-forward pair of the program in graph order."""
    found = []
    for component in program:
        for node in component.graph.nodes:
            if is_linear(node):
                up, scalable, active = _sources(node)
                if active and up:
                    found.append(FeedForward(component.name, node, up, scalable))
    return found


def _sources(down: fx.Node) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, ...], bool]:
    """Linears behind ``down``'s input through pointwise operators; none if anything else is met."""
    start = down.args[0]
    assert isinstance(start, fx.Node)
    width = tensor_type(start).shape[-1]
    linears: dict[fx.Node, bool] = {}
    active = False
    stack = [(start, True)]
    seen: set[tuple[fx.Node, bool]] = set()
    while stack:
        node, linear_path = stack.pop()
        if (node, linear_path) in seen:
            continue
        seen.add((node, linear_path))
        linear = node.args[0] if _takes_channels(node) else node
        if isinstance(linear, fx.Node) and is_linear(linear):
            if tensor_type(node).shape[-1] != width:
                return (), (), False
            linears[linear] = linears.get(linear, True) and linear_path
        elif node.op == "get_attr":
            continue
        elif node.op == "call_function" and _pointwise(node):
            active = active or node.target in ACTIVATIONS
            through = linear_path and node.target == aten.mul.Tensor
            stack += [(n, through) for n in node.all_input_nodes if is_tensor(n)]
        else:
            return (), (), False
    path = {node for node, _ in seen} | set(linears)
    private = all(set(n.users) <= path | {down} for n, through in seen if through)
    return tuple(linears), tuple(n for n in linears if linears[n] and private), active


def _takes_channels(node: fx.Node) -> bool:
    """Whether ``node`` is some of the channels of its argument: one of several fused linears."""
    if node.target != aten.slice.Tensor:
        return False
    axis, rank = node.args[1], tensor_type(node).rank
    return isinstance(axis, int) and axis % rank == rank - 1


def _pointwise(node: fx.Node) -> bool:
    name = target_name(node.target)
    return name in POINTWISE_OPS or name in CLONES
