"""A linear whose result is added to something takes that as its residual."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mqc.errors import PassPostconditionError
from mqc.ir import Program
from mqc.ir.edit import aten, call, is_tensor, replace, tensor_type
from mqc.transform import Pass, PassContext, PassResult

_mqc = torch.ops.mqc
RESIDUAL: dict[Any, int] = {
    _mqc.linear_w4a8.default: 8,
    _mqc.linear_w8a8.default: 8,
    _mqc.linear_w4a16.default: 6,
    _mqc.linear_w8a16.default: 6,
}
"""Position of the argument ``residual``."""


class FuseResidual(Pass):
    """``add(x, linear(..))`` -> ``linear(.., residual=x)``, where shapes and dtypes are equal.

    The linear moves to the place of the sum. A linear that something else reads too stays.

    Postcondition: no such sum is left.
    """

    name = "fuse-residual"
    after = ("cleanup", "merge-linears")
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            for node in list(
                component.graph.find_nodes(op="call_function", target=aten.add.Tensor)
            ):
                found = _match(node)
                if found is not None and ctx.take():
                    _fuse(node, *found)
                    result.counts["residuals"] += 1
        return result

    def ensures(self, result: PassResult) -> None:
        for component in result.program:
            for node in component.graph.find_nodes(op="call_function", target=aten.add.Tensor):
                if _match(node) is not None:
                    raise PassPostconditionError(f"%{node.name} still adds a linear's result")


def _match(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(linear, the other summand), the later linear where both are linears."""
    left, right = node.args[:2]
    if node.kwargs or len(node.args) > 2 or left is right:
        return None
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return None
    if not (is_tensor(left) and is_tensor(right)) or tensor_type(left) != tensor_type(right):
        return None
    pairs = [(left, right), (right, left)]
    ready = [pair for pair in pairs if _is_free(pair[0])]
    return max(ready, key=lambda pair: pair[0]) if ready else None


def _is_free(node: fx.Node) -> bool:
    """A linear without residual that one node reads."""
    index = RESIDUAL.get(node.target)
    if index is None or len(node.users) != 1:
        return False
    return index >= len(node.args) or node.args[index] is None


def _fuse(total: fx.Node, linear: fx.Node, other: fx.Node) -> None:
    index = RESIDUAL[linear.target]
    args = (*linear.args, *[None] * (index - len(linear.args)))[:index]
    with total.graph.inserting_before(total):
        fused = call(total.graph, linear.target, (*args, other), tensor_type(total), linear)
    fused.meta = dict(linear.meta)
    replace(total, fused)
    total.graph.erase_node(linear)
