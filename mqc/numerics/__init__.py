"""Numerics without graphs: Hadamard matrices, packing, error statistics, weight quantizers."""

from mqc.numerics.gptq import HessianAccumulator, gptq_quantize
from mqc.numerics.hadamard import (
    HadamardPlan,
    apply_hadamard,
    hadamard_factors,
    hadamard_matrix,
    hadamard_plan,
    has_hadamard,
)
from mqc.numerics.packing import pack_int4, unpack_int4
from mqc.numerics.quantize import (
    ClipSearch,
    QuantizedWeight,
    quantize_rtn,
    weight_range,
    weight_scale,
)
from mqc.numerics.rotation import random_hadamard, rotation
from mqc.numerics.stats import cosine, kl_divergence, max_abs, relative_error, sqnr_db

__all__ = [
    "ClipSearch",
    "HadamardPlan",
    "HessianAccumulator",
    "QuantizedWeight",
    "apply_hadamard",
    "cosine",
    "gptq_quantize",
    "hadamard_factors",
    "hadamard_matrix",
    "hadamard_plan",
    "has_hadamard",
    "kl_divergence",
    "max_abs",
    "pack_int4",
    "quantize_rtn",
    "random_hadamard",
    "relative_error",
    "rotation",
    "sqnr_db",
    "unpack_int4",
    "weight_range",
    "weight_scale",
]
