"""Random orthogonal rotations for residual streams, in float64.

With H of order n (normalised: row 0 all +1), D random signs and P a random permutation:

- plain stream: ``R = H D / sqrt(n)``, the randomised Hadamard of QuaRot (arXiv 2404.00456);
- LayerNorm stream (`keep_mean_row`): row 0 of R must be 1/sqrt(n), so that LayerNorm becomes
  RMSNorm after zeroing channel 0. Signs on the input side would break row 0; instead
  ``R = D H P / sqrt(n)`` with D_0 = +1: column permutations keep an all-ones row.

Where no H of order n exists, H is replaced by the Kronecker product ``Q (x) H_b`` of a
Haar-random orthogonal Q of order n/b and the largest Hadamard block b: it still mixes every
channel with every other one, which a block-diagonal matrix does not. For `keep_mean_row`, Q's
first row is 1/sqrt(n/b) (QR of a Gaussian matrix whose first column is constant).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mqc.numerics.hadamard import hadamard_matrix, hadamard_plan


def _random_orthogonal(n: int, generator: torch.Generator, keep_mean_row: bool) -> Tensor:
    """Haar-random orthogonal [n, n], or with a constant first row and Haar-random below."""
    gaussian = torch.randn(n, n, dtype=torch.float64, generator=generator)
    if keep_mean_row:
        gaussian[:, 0] = 1.0
    q, r = torch.linalg.qr(gaussian)
    orthogonal: Tensor = q * torch.sign(r.diagonal())
    return orthogonal.T.contiguous()


def rotation(n: int, generator: torch.Generator, *, keep_mean_row: bool = False) -> Tensor:
    """Random orthogonal R (float64 [n, n], y = R x) that spreads outliers over all channels.

    Args:
        n: channels of the stream.
        generator: a CPU generator; the result depends on its state alone.
        keep_mean_row: make row 0 exactly 1/sqrt(n), as a LayerNorm stream needs.
    """
    plan = hadamard_plan(n)
    h = hadamard_matrix(plan.block).to(torch.float64) / math.sqrt(plan.block)
    if not plan.is_full:
        h = torch.kron(_random_orthogonal(plan.blocks, generator, keep_mean_row), h)
    signs = torch.randint(0, 2, (n,), generator=generator).to(torch.float64) * 2 - 1
    if not keep_mean_row:
        return h * signs
    signs[0] = 1.0
    rotated = signs[:, None] * h[:, torch.randperm(n, generator=generator)]
    rotated[0] = 1.0 / math.sqrt(n)
    return rotated


def random_hadamard(n: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """`rotation` of a plain stream from an integer seed, rounded to `dtype`; [n, n]."""
    return rotation(n, torch.Generator().manual_seed(seed)).to(dtype)
