"""Hadamard transforms at run time, where no offline rotation can reach."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from mqc.analysis.axes import move_axis
from mqc.analysis.flow import NORMS, is_linear
from mqc.analysis.mlp import find_feed_forward
from mqc.ir import Program
from mqc.ir.edit import argument, insert_after, set_param, tensor_type
from mqc.numerics.hadamard import apply_hadamard, hadamard_plan
from mqc.transform import Pass, PassContext, PassResult, Skip


class HadamardOnline(Pass):
    """Spread outliers where no offline rotation reaches, by an online Hadamard transform.

    For ``y = W x`` behind a non-linearity: ``y = (W H^T)(H x)`` with the first factor folded and
    ``H x`` computed by a fast transform (MQuant section 3.4, QuaRot). The order follows the width:
    the full order where one is known, else blocks (``hadamard_plan``). The same goes for the
    readers of a norm that kept its gain: in post-norm blocks the normalised value is both read
    and carried on, and a gain in between leaves no basis to rotate to.

    Postcondition: every feed-forward down projection, and every linear behind a norm with a gain,
    reads ``mqc::hadamard``, or a skip says why.
    """

    name = "hadamard-online"
    after = ("canonicalize", "fuse-norm", "hadamard-fuse")
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        transformed: dict[Any, fx.Node] = {}
        pairs = [(pair.component, pair.down) for pair in find_feed_forward(program)]
        for component, node in [*pairs, *_behind_gains(program)]:
            where = f"{component}.%{node.name}"
            value, weight = node.args[0], node.args[1]
            assert isinstance(value, fx.Node) and isinstance(weight, fx.Node)
            width = tensor_type(value).shape[-1]
            assert isinstance(width, int)
            plan = hadamard_plan(width)
            if plan.is_identity:
                result.skips.append(Skip(where, f"no Hadamard matrix fits {width} channels"))
                continue
            if not ctx.take():
                continue
            matrix = program.params[str(weight.target)].to(torch.float64)
            folded = apply_hadamard(matrix, plan.block).to(program.dtype)
            set_param(program, node, 1, folded)
            if value in transformed:
                node.replace_input_with(value, transformed[value])
            else:
                transformed[value] = insert_after(
                    value, torch.ops.mqc.hadamard.default, (plan.block,), users=[node]
                )
            result.counts["online"] += 1
            result.counts["full_order" if plan.is_full else "blocks"] += 1
            result.details.append(
                {"layer": str(weight.target), "width": width, "block": plan.block}
            )
        return result


def _behind_gains(program: Program) -> Iterator[tuple[str, fx.Node]]:
    """(component, linear) for every linear that reads a norm which kept its gain."""
    for component in program:
        for node in list(component.graph.nodes):
            if node.target in NORMS and argument(node, 2) is not None:
                yield from ((component.name, linear) for linear in _readers(node))


def _readers(value: fx.Node) -> list[fx.Node]:
    """Linears that read ``value``, or rows of it."""
    found = []
    for user in value.users:
        if is_linear(user) and user.args[0] is value:
            found.append(user)
        elif user.args[:1] == (value,) and move_axis(user, -1, 1) == (-1, 1):
            found += _readers(user)
    return found
