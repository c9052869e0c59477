"""Hadamard transforms at run time, where no offline rotation can reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mqc.analysis.mlp import find_feed_forward
from mqc.ir import Program
from mqc.ir.edit import insert_after, set_param, tensor_type
from mqc.numerics.hadamard import apply_hadamard, hadamard_plan
from mqc.transform import Pass, PassContext, PassResult, Skip


class HadamardOnline(Pass):
    """Spread outliers at the inputs of down projections by an online Hadamard transform.

    For ``y = W x`` behind a non-linearity: ``y = (W H^T)(H x)`` with the first factor folded and
    ``H x`` computed by a fast transform (MQuant section 3.4, QuaRot). The order follows the width:
    the full order where one is known, else blocks (``hadamard_plan``).

    Postcondition: every feed-forward down projection reads ``mqc::hadamard``, or a skip says why.
    """

    name = "hadamard-online"
    after = ("canonicalize", "fuse-norm", "hadamard-fuse")
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        transformed: dict[Any, fx.Node] = {}
        for pair in find_feed_forward(program):
            where = f"{pair.component}.%{pair.down.name}"
            value, weight = pair.down.args[0], pair.down.args[1]
            width = tensor_type(value).shape[-1]  # type: ignore[arg-type]
            assert isinstance(width, int)
            plan = hadamard_plan(width)
            if plan.is_identity:
                result.skips.append(Skip(where, f"no Hadamard matrix fits {width} channels"))
                continue
            if not ctx.take():
                continue
            matrix = program.params[str(weight.target)].to(torch.float64)  # type: ignore[union-attr]
            folded = apply_hadamard(matrix, plan.block).to(program.dtype)
            set_param(program, pair.down, 1, folded)
            if value in transformed:
                pair.down.replace_input_with(value, transformed[value])  # type: ignore[arg-type]
            else:
                transformed[value] = insert_after(
                    value,  # type: ignore[arg-type]
                    torch.ops.mqc.hadamard.default,
                    (plan.block,),
                    users=[pair.down],
                )
            result.counts["online"] += 1
            result.counts["full_order" if plan.is_full else "blocks"] += 1
            result.details.append(
                {"layer": str(weight.target), "width": width, "block": plan.block}  # type: ignore[union-attr]
            )
        return result
