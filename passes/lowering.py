"""The passes with which targets lower a program to the fused operators they have kernels for."""

from __future__ import annotations

from mqc.ir import Program
from mqc.passes.fuse_angles import FuseAngles
from mqc.passes.fuse_attention import BUFFER, FuseAttention
from mqc.passes.fuse_order import FuseOrder
from mqc.passes.fuse_quantize import FuseQuantize
from mqc.passes.fuse_residual import FuseResidual
from mqc.passes.fuse_tower_attention import FuseTowerAttention
from mqc.passes.merge_linears import MergeLinears
from mqc.passes.quantize_cache import QuantizeCache
from mqc.passes.route_experts import RouteExperts
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
    RouteExperts,
)
"""In the order in which they run."""


def fuse(program: Program, leave_out: tuple[str, ...] = ()) -> Program:
    """A copy of ``program`` after the lowering passes, but those named in ``leave_out``.

    What they did and could not do is added to the history.
    """
    passes = [item() for item in LOWERING if item.name not in leave_out]
    return PassManager(passes).run(program, PassContext())


def narrow_cache(program: Program, kind: str) -> Program:
    """``program`` with buffered caches of ``kind``: "float" as they are, or "int8".

    Of a program that no target lowered, attention is fused first.

    Raises:
        PassPreconditionError: its caches grow.
    """
    if kind == "float":
        return program
    passes: list[Pass] = [] if program.facts.get("cache") == BUFFER else [FuseAttention()]
    return PassManager([*passes, QuantizeCache()]).run(program, PassContext())
