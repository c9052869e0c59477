"""The built-in passes by name."""

from __future__ import annotations

from mqc.passes.aifs_reorder import AifsReorder
from mqc.passes.canonicalize import Canonicalize
from mqc.passes.cleanup import Cleanup
from mqc.passes.expert_slices import ExpertSlices
from mqc.passes.fuse_angles import FuseAngles
from mqc.passes.fuse_attention import FuseAttention
from mqc.passes.fuse_norm import FuseNorm
from mqc.passes.fuse_order import FuseOrder
from mqc.passes.fuse_quantize import FuseQuantize
from mqc.passes.fuse_residual import FuseResidual
from mqc.passes.fuse_tower_attention import FuseTowerAttention
from mqc.passes.hadamard_fuse import HadamardFuse
from mqc.passes.hadamard_online import HadamardOnline
from mqc.passes.merge_linears import MergeLinears
from mqc.passes.modality_split import ModalitySplit
from mqc.passes.quantize_cache import QuantizeCache
from mqc.passes.quantize_weights import QuantizeWeights
from mqc.passes.rms_suppress import RmsSuppress
from mqc.passes.route_experts import RouteExperts
from mqc.passes.select_rows import SelectRows
from mqc.passes.static_scales import StaticScales
from mqc.transform import Pass

PASSES: dict[str, type[Pass]] = {
    item.name: item
    for item in (
        Canonicalize,
        FuseNorm,
        HadamardFuse,
        HadamardOnline,
        RmsSuppress,
        ModalitySplit,
        QuantizeWeights,
        StaticScales,
        AifsReorder,
        ExpertSlices,
        Cleanup,
        MergeLinears,
        FuseQuantize,
        FuseAttention,
        FuseResidual,
        FuseTowerAttention,
        FuseOrder,
        FuseAngles,
        SelectRows,
        RouteExperts,
        QuantizeCache,
    )
}
"""In the order of the default pipeline, then those that targets lower with."""
