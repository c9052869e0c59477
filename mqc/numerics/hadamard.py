"""Hadamard matrices, constructed: Sylvester, Paley I and II over GF(q), Kronecker products.

An order n is written n = base * 2^k with k as large as a construction of `base` allows:
``H_n = H_base (x) S_{2^k}`` with S Sylvester's matrix. Every matrix is normalised so that row 0
and column 0 are all +1 (sign flips of rows and columns keep orthogonality), so output channel 0
of ``H x`` is always the sum over x. The fast transform applies one small factor an axis:
``(A (x) B) vec(X) = vec(A X B^T)``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mqc.errors import UsageError
from mqc.numerics.galois import jacobsthal, prime_power

MAX_BASE = 2048
"""Largest dense factor of a plan: a transform costs about 2 * base operations a value."""

MAX_FACTOR_LOG2 = 7
"""Sylvester factors above 2^7 are split in two or more in the fast transform."""

_Matrix = npt.NDArray[np.int8]


@dataclass(frozen=True)
class HadamardPlan:
    """How an axis of n values is transformed: n / block blocks of order block = base * 2^log2.

    ``block == 1`` is the identity: n has no usable order at all (n odd, say).
    """

    n: int
    block: int
    base: int
    log2: int

    @property
    def blocks(self) -> int:
        """Number of diagonal blocks."""
        return self.n // self.block

    @property
    def is_full(self) -> bool:
        """Whether one Hadamard matrix covers the whole axis."""
        return self.block == self.n

    @property
    def is_identity(self) -> bool:
        """Whether the transform does nothing."""
        return self.block == 1


def _odd_part(n: int) -> int:
    return n // (n & -n)


def _paley_kind(n: int) -> int:
    """1 or 2 where Paley I or II gives order n, else 0."""
    if n % 4:
        return 0
    if (n - 1) % 4 == 3 and prime_power(n - 1):
        return 1
    if (n // 2 - 1) % 4 == 1 and prime_power(n // 2 - 1):
        return 2
    return 0


@functools.cache
def _kronecker_pair(n: int) -> tuple[int, int] | None:
    """Orders (a, b) with a * b = n, both with an odd factor: what 2^k cannot split off."""
    for a in range(12, math.isqrt(n) + 1, 4):
        b, rest = divmod(n, a)
        if rest or b % 4 or _odd_part(a) == 1 or _odd_part(b) == 1:
            continue
        if has_hadamard(a) and has_hadamard(b):
            return a, b
    return None


@functools.cache
def _base(n: int) -> int | None:
    """Smallest base with n = base * 2^k that a construction exists for, or None."""
    odd = _odd_part(n)
    if odd == 1:
        return 1
    base = 4 * odd
    while n % base == 0:
        if _paley_kind(base) or _kronecker_pair(base):
            return base
        base *= 2
    return None


def has_hadamard(n: int) -> bool:
    """Whether `hadamard_matrix(n)` can be constructed here."""
    return n > 0 and _base(n) is not None


def _paley(n: int) -> _Matrix:
    kind = _paley_kind(n)
    q = n - 1 if kind == 1 else n // 2 - 1
    s = np.zeros((q + 1, q + 1), dtype=np.int8)
    s[1:, 1:] = jacobsthal(q)
    s[0, 1:] = 1
    s[1:, 0] = -1 if kind == 1 else 1
    identity = np.eye(q + 1, dtype=np.int8)
    if kind == 1:
        return identity + s
    plus = np.array([[1, 1], [1, -1]], dtype=np.int8)
    minus = np.array([[1, -1], [-1, -1]], dtype=np.int8)
    return np.kron(s, plus) + np.kron(identity, minus)


def _sylvester(log2: int) -> _Matrix:
    h = np.ones((1, 1), dtype=np.int8)
    for _ in range(log2):
        h = np.block([[h, h], [h, -h]])
    return h


def _normalised(h: _Matrix) -> _Matrix:
    h = h * h[0][None, :]
    return h * h[:, 0][:, None]


@functools.lru_cache(maxsize=32)
def _base_matrix(base: int) -> _Matrix:
    """Normalised dense matrix of a base order; shared, read-only."""
    pair = _kronecker_pair(base)
    if base == 1:
        h = np.ones((1, 1), dtype=np.int8)
    elif _paley_kind(base):
        h = _normalised(_paley(base))
    elif pair is not None:
        h = np.kron(_dense(pair[0]), _dense(pair[1]))
    else:
        raise AssertionError(f"{base} is not a base order")
    h.setflags(write=False)
    return h


def _require_order(n: int) -> int:
    base = _base(n) if n > 0 else None
    if base is None:
        raise UsageError(
            f"no Hadamard matrix of order {n} can be constructed",
            hint="take the block of hadamard_plan(n), which divides the axis into known orders",
        )
    return base


def _dense(n: int) -> _Matrix:
    base = _require_order(n)
    return np.kron(_base_matrix(base), _sylvester((n // base).bit_length() - 1))


def hadamard_matrix(n: int) -> Tensor:
    """Hadamard matrix of order n: int8 [n, n] of +-1, H H^T = n I, row 0 and column 0 all +1.

    Raises:
        UsageError: where no construction of order n is known (see `has_hadamard`).
    """
    return torch.from_numpy(_dense(n).copy())


def hadamard_plan(n: int, *, min_block: int = 2, max_base: int = MAX_BASE) -> HadamardPlan:
    """Choose the transform of an axis of n values.

    The full order where it exists with a base up to `max_base`, else the largest block that
    divides n and has one. Where that is below `min_block` the plan is the identity.
    """
    if n < 1:
        raise UsageError(f"a Hadamard transform needs a positive size, got {n}")
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    divisors = [n // d for d in small] + small[::-1]  # descending
    for block in divisors:
        base = _base(block)
        if block >= min_block and base is not None and base <= max_base:
            return HadamardPlan(n, block, base, (block // base).bit_length() - 1)
    return HadamardPlan(n, 1, 1, 0)


def _factor_log2(log2: int) -> list[int]:
    """Split an exponent into near-equal parts of at most MAX_FACTOR_LOG2."""
    if log2 == 0:
        return []
    parts = -(-log2 // MAX_FACTOR_LOG2)
    return [log2 // parts + (i < log2 % parts) for i in range(parts)]


@functools.lru_cache(maxsize=64)
def _factors(block: int) -> tuple[_Matrix, ...]:
    base = _require_order(block)
    dense = [_base_matrix(base)] if base > 1 else []
    powers = [_sylvester(k) for k in _factor_log2((block // base).bit_length() - 1)]
    return tuple(dense + powers)


def hadamard_factors(block: int) -> tuple[Tensor, ...]:
    """Small +-1 matrices (int8) whose Kronecker product is `hadamard_matrix(block)`.

    Empty for block 1. The base comes first (where it is not 1), then Sylvester factors.
    """
    return tuple(torch.from_numpy(f.copy()) for f in _factors(block))


def apply_hadamard(x: Tensor, block: int, factors: Sequence[Tensor] | None = None) -> Tensor:
    """``x @ blockdiag(H_block, ...)^T / sqrt(block)`` over the last axis, by fast factors.

    Args:
        x: float [..., n] with n a multiple of `block`; half types are computed in float32.
        block: an order with a construction; 1 is the identity.
        factors: those of `hadamard_factors`, where the caller keeps them on x's device.

    Returns:
        A new tensor of x's shape and dtype.

    Raises:
        UsageError: where block does not divide n or has no construction.
    """
    n = x.shape[-1]
    factors = hadamard_factors(block) if factors is None else factors
    if n % block:
        raise UsageError(f"Hadamard block {block} does not divide the axis of {n} values")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(dtype) * (1.0 / math.sqrt(block))
    right = block
    for factor in factors:
        size = factor.shape[0]
        right //= size
        h = factor.to(device=x.device, dtype=dtype)
        if right == 1:
            y = y.reshape(-1, size) @ h.T
        else:
            y = h @ y.reshape(-1, size, right)
    return y.reshape(x.shape).to(x.dtype)
