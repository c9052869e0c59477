"""Linears on weights packed for the kernels, of 4 and 8 bits: mqc_cuda::linear of int8 activations,
mqc_cuda::linear_a16 of float ones.

The operators' CPU implementations unpack and call the definitions (`mqc.ops`); those for CUDA
devices are registered by :mod:`mqc.backends.cuda.register`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import mqc.ops  # noqa: F401  (the operators that this one is defined by)
from mqc.cuda.pack import Layout, unpack_scales, unpack_weight

LIBRARY = torch.library.Library("mqc_cuda", "DEF")
SCHEMA = (
    "(Tensor xq, Tensor weight, Tensor w_scale, Tensor x_scale, Tensor? modality, Tensor? bias, "
    "Tensor? x_split, Tensor? w_split, Tensor? residual, int layout, ScalarType dtype) -> Tensor"
)
SCHEMA_A16 = (
    "(Tensor x, Tensor weight, Tensor w_scale, Tensor? bias, Tensor? x_split, Tensor? w_split, "
    "Tensor? residual, int layout, ScalarType dtype) -> Tensor"
)


def reference(
    xq: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    x_scale: Tensor,
    modality: Tensor | None,
    bias: Tensor | None,
    x_split: Tensor | None,
    w_split: Tensor | None,
    residual: Tensor | None,
    layout: int,
    dtype: torch.dtype,
) -> Tensor:
    """round((xq . w^T) * w_scale * x_scale[row] + bias + x_split @ w_split^T) [+ residual].

    Args:
        xq: int8 [..., K].
        weight: uint8, an [N, K] weight packed in ``layout`` (:class:`mqc.cuda.pack.Layout`).
        w_scale: float32 [N]. Scales of groups, in layouts that have them, are part of ``weight``,
            and this is a factor of all.
        x_scale, modality: see `mqc.ops`.
        bias: float32 [N] or None.
        x_split, w_split: [..., k] in ``dtype`` and float32 [N, k], or None.
        residual: [..., N] in ``dtype``, added after rounding, or None.
        dtype: of the result [..., N]; the sum is float32 and rounded to it once.
    """
    integers, scales = unpack(weight, w_scale, Layout(layout), xq.shape[-1])
    return apply_unpacked(
        xq, integers, scales, x_scale, modality, bias, x_split, w_split, residual, dtype
    )


def unpack(weight: Tensor, w_scale: Tensor, layout: Layout, k: int) -> tuple[Tensor, Tensor]:
    """A packed weight as int8 [N, k] with its scales, [N] or [N, groups]."""
    n = w_scale.shape[0]
    integers = unpack_weight(weight, layout, n, k)
    if layout.group == 0:
        return integers, w_scale
    return integers, unpack_scales(weight, layout, n, k) * w_scale[:, None]


def apply_unpacked(
    xq: Tensor,
    integers: Tensor,
    w_scale: Tensor,
    x_scale: Tensor,
    modality: Tensor | None,
    bias: Tensor | None,
    x_split: Tensor | None,
    w_split: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`reference` on what :func:`unpack` gives."""
    terms = (bias, x_split, w_split)
    y: Tensor = torch.ops.mqc.linear_w8a8(xq, integers, w_scale, x_scale, modality, *terms)
    y = y.to(dtype)
    return y if residual is None else y + residual


def reference_a16(
    x: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_split: Tensor | None,
    w_split: Tensor | None,
    residual: Tensor | None,
    layout: int,
    dtype: torch.dtype,
) -> Tensor:
    """round(x @ (w * w_scale)^T + bias + x_split @ w_split^T) [+ residual]; sums in float32.

    Args:
        x: float [..., K].
        weight, w_scale, bias, x_split, w_split, residual, layout, dtype: as of :func:`reference`.
    """
    integers, scales = unpack(weight, w_scale, Layout(layout), x.shape[-1])
    return apply_unpacked_a16(x, integers, scales, bias, x_split, w_split, residual, dtype)


def apply_unpacked_a16(
    x: Tensor,
    integers: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    x_split: Tensor | None,
    w_split: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """:func:`reference_a16` on what :func:`unpack` gives."""
    wide = x.to(torch.float32)
    y: Tensor = torch.ops.mqc.linear_w8a16(wide, integers, w_scale, bias, x_split, w_split)
    y = y.to(dtype)
    return y if residual is None else y + residual


def fake(x: Tensor, weight: Tensor, w_scale: Tensor, *others: Any) -> Tensor:
    """Shape function of both: x's rows times N, in the type that comes last."""
    return x.new_empty((*x.shape[:-1], w_scale.shape[0]), dtype=others[-1])


LIBRARY.define(f"linear{SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("linear", reference, "CPU")
torch.library.register_fake("mqc_cuda::linear", fake, lib=LIBRARY)
LIBRARY.define(f"linear_a16{SCHEMA_A16}", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("linear_a16", reference_a16, "CPU")
torch.library.register_fake("mqc_cuda::linear_a16", fake, lib=LIBRARY)

LINEAR = torch.ops.mqc_cuda.linear.default
LINEAR_A16 = torch.ops.mqc_cuda.linear_a16.default
