"""What the library refuses, by the operators' definitions on the same device.

On a CUDA device ``torch.ops.mqc`` leads back to the kernels (:mod:`mqc.backends.cuda.register`), so
the definitions are called as functions. Hadamard factors stay on the device: a copy from the host
cannot be recorded in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mqc.numerics.hadamard import apply_hadamard, hadamard_factors
from mqc.ops import activation_quantize, quantize_static, rms_norm_quantize
from mqc.ops._split import split_columns


class Definitions:
    """Operators of `mqc.ops` on one device, with their arguments and results."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._factors: dict[int, tuple[Tensor, ...]] = {}

    def hadamard(self, x: Tensor, block: int) -> Tensor:
        """``mqc::hadamard``."""
        if block not in self._factors:
            factors = (f.to(self.device, torch.float32) for f in hadamard_factors(block))
            self._factors[block] = tuple(factors)
        return apply_hadamard(x, block, self._factors[block])

    def rms_norm_quantize(
        self, x: Tensor, eps: float, scale: Tensor, modality: Tensor | None
    ) -> Tensor:
        """The integers of ``mqc::rms_norm_quantize``."""
        return rms_norm_quantize.reference(x, eps, scale, modality, None)[0]

    def activation_quantize(
        self,
        x: Tensor,
        activation: str,
        gated: bool,
        block: int,
        scale: Tensor,
        modality: Tensor | None,
        split: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """``mqc::activation_quantize``."""
        width = x.shape[-1] // 2 if gated else x.shape[-1]
        y = activation_quantize.ACTIVATIONS[activation](x[..., :width])
        if gated:
            y = y * x[..., width:]
        if block != 1:
            y = self.hadamard(y, block)
        return quantize_static.reference(y, scale, modality), split_columns(y, split)
