"""The passes with which targets lower a program to the fused operators they have kernels for."""

from __future__ import annotations

from mqc.ir import Program
from mqc.passes.fuse_angles import FuseAngles
from mqc.passes.fuse_attention import FuseAttention
from mqc.passes.fuse_order import FuseOrder
from mqc.passes.fuse_quantize import FuseQuantize
from mqc.passes.fuse_residual import FuseResidual
from mqc.passes.fuse_tower_attention import FuseTowerAttention
from mqc.passes.merge_linears import MergeLinears
from mqc.passes.select_rows import SelectRows
from mqc.transform import Pass, PassContext, PassManager

LOWERING: tuple[type[Pass], ...] = (
    MergeLinears,
    FuseQuantize,
    FuseAttention,
    FuseResidual,
    FuseTowerAttention,
    FuseOrder,
    FuseAngles,
    SelectRows,
)
"""In the order in which they run."""


def fuse(program: Program, leave_out: tuple[str, ...] = ()) -> Program:
    """A copy of ``program`` after the lowering passes, but those named in ``leave_out``.

    What they did and could not do is added to the history.
    """
    passes = [item() for item in LOWERING if item.name not in leave_out]
    return PassManager(passes).run(program, PassContext())
