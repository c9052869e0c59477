"""Tidy a lowered program: fuse epilogues, share equal nodes, drop what nobody reads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from mqc.ir import Program
from mqc.ir.dialect import MQC_FLOAT_OPS, MQC_QUANTIZED_OPS
from mqc.ir.edit import aten, call, eliminate_dead_code, is_tensor, replace, tensor_type
from mqc.ir.serialize import encode, target_name
from mqc.transform import Pass, PassContext, PassResult

_mqc = torch.ops.mqc
_SPLIT_ARGUMENT: dict[Any, int] = {
    _mqc.linear_w4a8.default: 6,
    _mqc.linear_w8a8.default: 6,
    _mqc.linear_w4a16.default: 4,
    _mqc.linear_w8a16.default: 4,
}
"""Index of ``x_split`` (``w_split`` follows) in the operators that take a rank-k update."""


class Cleanup(Pass):
    """Fuse rank-k updates into the linears they follow, merge equal nodes, remove the dead.

    Postcondition: no two nodes of a graph compute the same value; every value is read; a program
    with integer operators is in dialect ``quantized``.
    """

    name = "cleanup"
    after = (
        "canonicalize",
        "fuse-norm",
        "hadamard-fuse",
        "hadamard-online",
        "rms-suppress",
        "modality-split",
        "quantize-weights",
        "static-scales",
        "aifs-reorder",
    )
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            for node in list(component.graph.nodes):
                if node.target == _mqc.rank_update.default and ctx.take():
                    result.counts["fused_updates"] += _fuse_update(node)
                elif _is_identity(node) and ctx.take():
                    replace(node, node.args[0])
                    result.counts["identities"] += 1
            result.counts["merged"] += _merge_equal(component.graph, ctx)
        result.counts["dead"] += eliminate_dead_code(program)
        integer = MQC_QUANTIZED_OPS - MQC_FLOAT_OPS
        targets = {target_name(n.target) for c in program for n in c.graph.nodes if _is_call(n)}
        if targets & integer:
            program.dialect = "quantized"
        return result


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function"


def _fuse_update(node: fx.Node) -> int:
    """``rank_update(linear(..), x, w)`` as arguments of the linear, if nobody else reads it."""
    linear, part, split = node.args
    assert isinstance(linear, fx.Node)
    index = _SPLIT_ARGUMENT.get(linear.target)
    if index is None or len(linear.users) > 1 or linear.args[index] is not None:
        return 0
    args = list(linear.args)
    args[index], args[index + 1] = part, split
    # The linear moves to the update's place: its new arguments are defined in between.
    with node.graph.inserting_before(node):
        fused = call(node.graph, linear.target, tuple(args), tensor_type(linear), linear)
    fused.meta = dict(linear.meta)
    replace(node, fused)
    node.graph.erase_node(linear)
    return 1


def _is_identity(node: fx.Node) -> bool:
    """Products and quotients by one, permutations and reshapes to the same type."""
    if not (_is_call(node) and node.args and is_tensor(node.args[0]) and is_tensor(node)):
        return False
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if tensor_type(source) != tensor_type(node):
        return False
    if node.target in (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar):
        factor = node.args[1]
        return isinstance(factor, (int, float)) and math.isclose(factor, 1.0, abs_tol=0.0)
    return node.target == aten.reshape.default


def _merge_equal(graph: fx.Graph, ctx: PassContext) -> int:
    """Common subexpressions: all operators are pure, so equal calls give equal values."""
    seen: dict[Any, fx.Node] = {}
    count = 0
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        kwargs = sorted(node.kwargs.items())
        key = (node.op, str(node.target), repr((encode(node.args), encode(kwargs))))
        first = seen.setdefault(key, node)
        if first is not node and ctx.take():
            replace(node, first)
            count += 1
    return count
