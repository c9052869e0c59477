"""Small finite fields GF(p^k): as much as the Paley constructions need.

Elements are the integers 0..q-1; the base-p digits of an element are the coefficients of a
polynomial over GF(p), lowest degree first. Products are taken modulo a monic irreducible
polynomial of degree k, found by trial division.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
import numpy.typing as npt

Poly = tuple[int, ...]
"""Coefficients over GF(p), lowest degree first."""


@functools.cache
def prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, k) with q = p**k and p prime, or None where q is no prime power."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None


def _remainder(a: Poly, divisor: Poly, p: int) -> Poly:
    """Remainder of `a` by a monic `divisor`, as a tuple of len(divisor) - 1 coefficients."""
    rest = list(a)
    degree = len(divisor) - 1
    for top in range(len(rest) - 1, degree - 1, -1):
        factor = rest[top] % p
        for i in range(degree + 1):
            rest[top - degree + i] -= factor * divisor[i]
    return tuple(c % p for c in (rest + [0] * degree)[:degree])


def _monic(p: int, degree: int) -> itertools.chain[Poly]:
    """All monic polynomials of a degree over GF(p)."""
    lower = itertools.product(range(p), repeat=degree)
    return itertools.chain.from_iterable(((*c, 1),) for c in lower)


def _irreducible(p: int, k: int) -> Poly:
    """A monic irreducible polynomial of degree k over GF(p); one always exists."""
    for candidate in _monic(p, k):
        divisors = itertools.chain.from_iterable(_monic(p, d) for d in range(1, k // 2 + 1))
        if all(any(_remainder(candidate, d, p)) for d in divisors):
            return candidate
    raise AssertionError(f"no irreducible polynomial of degree {k} over GF({p})")


def jacobsthal(q: int) -> npt.NDArray[np.int8]:
    """Jacobsthal matrix Q[a, b] = chi(a - b) over GF(q), q an odd prime power; int8 [q, q].

    chi is the quadratic character: 0 at 0, +1 at squares, -1 elsewhere. Q is symmetric for
    q = 1 mod 4 and skew for q = 3 mod 4, Q Q^T = q I - J and Q J = 0 (R. Paley, 1933).
    """
    factors = prime_power(q)
    if factors is None or q % 2 == 0:
        raise ValueError(f"q = {q} is not an odd prime power")
    p, k = factors
    elements = np.arange(q)
    digits = np.stack([elements // p**i % p for i in range(k)], axis=1)
    chi = np.full(q, -1, dtype=np.int8)
    chi[0] = 0
    modulus = _irreducible(p, k)
    for element in digits[1:]:
        square = _remainder(tuple(int(c) for c in np.convolve(element, element)), modulus, p)
        chi[sum(c * p**i for i, c in enumerate(square))] = 1
    difference = np.zeros((q, q), dtype=np.int32)
    for i in range(k):
        column = digits[:, i].astype(np.int32)
        difference += (column[:, None] - column[None, :]) % p * p**i
    return chi[difference]
