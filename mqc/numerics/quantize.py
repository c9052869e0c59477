"""Symmetric weight quantization: scales, clip search, round to nearest.

The integer range of b bits is [-2^(b-1), 2^(b-1) - 1], but [-127, 127] for 8 bits. A scale maps
the largest magnitude of its channel or group to 2^(b-1) - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mqc.errors import CalibrationError, UsageError
from mqc.numerics.packing import pack_int4

_CACHED_VALUES = 2**16
"""Weights that the clip search works on at a time."""

_RANGES = {8: (-127, 127), 4: (-8, 7), 3: (-4, 3), 2: (-2, 1)}


@dataclass(frozen=True)
class ClipSearch:
    """Search of the clip that minimises sum |w - dequant(quant(w))|^norm per channel or group.

    The defaults are those of the GPTQ and QuaRot code: the range shrinks in 80 steps of 1 %.
    """

    steps: int = 80
    max_shrink: float = 0.8
    norm: float = 2.4


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix: q int8 [N, K], scale float32 [N] (per channel) or [N, G] (groups)."""

    q: Tensor
    scale: Tensor
    bits: int
    group_size: int | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """q * scale, [N, K]; the product is taken in `dtype`."""
        q = self.q.to(dtype)
        if self.group_size is None:
            return q * self.scale.to(dtype)[:, None]
        grouped = q.reshape(q.shape[0], -1, self.group_size)
        return (grouped * self.scale.to(dtype)[:, :, None]).reshape(q.shape)

    def packed(self) -> Tensor:
        """uint8 [N, ceil(K/2)] for bits <= 4."""
        if self.bits > 4:
            raise UsageError(f"{self.bits}-bit weights are stored as int8, not packed")
        return pack_int4(self.q)


def weight_range(bits: int) -> tuple[int, int]:
    """Smallest and largest integer of a signed weight of `bits` bits (8, 4, 3 or 2)."""
    if bits not in _RANGES:
        raise UsageError(f"weights of {bits} bits are not supported", hint="use 8, 4, 3 or 2")
    return _RANGES[bits]


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise CalibrationError where a tensor holds a NaN or an infinity."""
    bad = tensor.numel() - int(torch.isfinite(tensor).sum())
    if bad:
        raise CalibrationError(
            f"{name} holds {bad} NaN or infinite values of {tensor.numel()}",
            hint="check the checkpoint's weights, and the calibration run in float32",
        )


def _grouped(weight: Tensor, group_size: int | None) -> Tensor:
    """View [N, K] as [N, G, K/G]; G = 1 per channel."""
    n, k = weight.shape
    size = k if group_size is None else group_size
    if size < 1 or k % size:
        raise UsageError(
            f"group size {size} does not divide the {k} input channels",
            hint="choose a divisor, or per-channel scales",
        )
    return weight.reshape(n, k // size, size)


def weight_scale(
    weight: Tensor, bits: int, *, group_size: int | None = None, clip: ClipSearch | None = None
) -> Tensor:
    """Scales of a weight [N, K]: float32 [N], or [N, K / group_size] for groups; all > 0.

    A channel or group of zeros gets scale 1.

    Raises:
        CalibrationError: on NaN or infinite weights.
        UsageError: on an unknown bit width or a group size that does not divide K.
    """
    require_finite("the weight", weight)
    low, high = weight_range(bits)
    w = _grouped(weight.detach(), group_size)
    w = w.to(torch.float64 if w.dtype == torch.float64 else torch.float32)
    full = (w.abs().amax(dim=-1) / high).to(torch.float32)
    scale = torch.where(full > 0, full, torch.ones_like(full))
    if clip is not None:
        # A few rows at a time: the search passes over them 80 times, so they should stay cached.
        rows = max(1, _CACHED_VALUES // weight.shape[1])
        for start in range(0, w.shape[0], rows):
            span = slice(start, start + rows)
            scale[span] = _search_clip(w[span], scale[span], low, high, clip)
    return scale[:, 0].contiguous() if group_size is None else scale


def _search_clip(w: Tensor, full: Tensor, low: int, high: int, clip: ClipSearch) -> Tensor:
    """The best of `clip.steps` shrunken scales for groups w [N, G, K/G] with scales [N, G]."""
    best = full
    best_error = torch.full(full.shape, torch.inf, dtype=w.dtype, device=w.device)
    for step in range(clip.steps):
        scale = full * (1.0 - clip.max_shrink * step / clip.steps)
        scale = torch.where(scale > 0, scale, full)
        wide = scale[..., None].to(w.dtype)
        error = torch.round(w / wide).clamp_(low, high).mul_(wide).sub_(w).abs_()
        # error^norm as exp(norm log error): three times as fast as pow, and 0 stays 0.
        total = error.log_().mul_(clip.norm).exp_().sum(dim=-1)
        better = total < best_error
        best = torch.where(better, scale, best)
        best_error = torch.where(better, total, best_error)
    return best


def quantize_rtn(
    weight: Tensor, bits: int, *, group_size: int | None = None, clip: ClipSearch | None = None
) -> QuantizedWeight:
    """Quantize a weight [N, K] by rounding each value to the nearest level (half to even)."""
    low, high = weight_range(bits)
    scale = weight_scale(weight, bits, group_size=group_size, clip=clip)
    w = _grouped(weight, group_size)
    q = torch.round(w / scale.reshape(*w.shape[:2], 1)).clamp_(low, high)
    return QuantizedWeight(q.reshape(weight.shape).to(torch.int8), scale, bits, group_size)
