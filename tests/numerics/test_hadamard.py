import numpy as np
import pytest
import torch

from mqc.errors import UsageError
from mqc.numerics.galois import jacobsthal, prime_power
from mqc.numerics.hadamard import (
    apply_hadamard,
    hadamard_factors,
    hadamard_matrix,
    hadamard_plan,
    has_hadamard,
)
from mqc.numerics.rotation import random_hadamard, rotation

# Orders up to 300 that only Williamson-type constructions reach.
MISSING = {92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292}
LARGE = [592, 560, 344, 924, 1152, 1280, 1176, 3584]


def is_hadamard(h: torch.Tensor) -> bool:
    h = h.to(torch.float32)  # products are integers below 2^24: exact
    return torch.equal(h @ h.T, len(h) * torch.eye(len(h)))


def test_claimed_orders_up_to_300() -> None:
    claimed = [n for n in range(1, 301) if has_hadamard(n)]
    assert all(n in (1, 2) or n % 4 == 0 for n in claimed)
    assert set(range(4, 301, 4)) - set(claimed) <= MISSING
    for n in claimed:
        h = hadamard_matrix(n)
        assert h.dtype == torch.int8 and h.shape == (n, n)
        assert is_hadamard(h), n
        assert bool((h[0] == 1).all()) and bool((h[:, 0] == 1).all()), n


@pytest.mark.parametrize("n", LARGE)
def test_large_orders(n: int) -> None:
    assert hadamard_plan(n).is_full
    h = hadamard_matrix(n)
    assert is_hadamard(h)
    assert bool((h[0] == 1).all()) and bool((h[:, 0] == 1).all())


@pytest.mark.parametrize(
    ("n", "block", "base", "log2"),
    [
        (18944, 18944, 148, 7),
        (8960, 8960, 140, 6),
        (3584, 3584, 28, 7),
        (14336, 14336, 28, 9),
        (11008, 11008, 344, 5),
        (29568, 29568, 924, 5),
        (25600, 25600, 100, 8),
        (592, 592, 148, 2),
        (560, 560, 140, 2),
        (13696, 128, 1, 7),
        (4304, 16, 1, 4),
        (536, 8, 1, 3),
        (1536, 1536, 12, 7),
        (4096, 4096, 1, 12),
        (269, 1, 1, 0),
        (2, 2, 1, 1),
        (1, 1, 1, 0),
    ],
)
def test_plans(n: int, block: int, base: int, log2: int) -> None:
    plan = hadamard_plan(n)
    assert (plan.block, plan.base, plan.log2) == (block, base, log2)
    assert plan.block == plan.base << plan.log2
    assert plan.blocks * plan.block == n
    # What has no odd part left is Sylvester's; the base carries the rest.
    assert is_hadamard(hadamard_matrix(plan.base))


def test_min_block_gives_identity() -> None:
    plan = hadamard_plan(536, min_block=16)
    assert plan.is_identity and not plan.is_full


@pytest.mark.parametrize("block", [1, 2, 12, 28, 128, 148, 256, 592, 144, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_apply_equals_matrix(block: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 2 * block, dtype=dtype, generator=torch.Generator().manual_seed(block))
    h = hadamard_matrix(block).to(torch.float64) / block**0.5
    want = (x.to(torch.float64).reshape(3, 2, block) @ h.T).reshape(3, -1)
    got = apply_hadamard(x, block)
    assert got.dtype == dtype and got.shape == x.shape
    tolerance = 1e-13 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(got.to(torch.float64), want, rtol=0, atol=tolerance)


@pytest.mark.parametrize("n", [18944, 8960, 29568])
def test_apply_is_orthogonal_on_big_axes(n: int) -> None:
    x = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = apply_hadamard(x, n)
    torch.testing.assert_close(y @ y.T, x @ x.T, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(y[:, 0], x.sum(1) / n**0.5, rtol=0, atol=1e-10)


def test_factors_multiply_to_the_matrix() -> None:
    product = torch.ones(1, 1, dtype=torch.int8)
    for factor in hadamard_factors(12 << 8):
        assert max(factor.shape) <= 128
        product = torch.kron(product, factor)
    assert torch.equal(product, hadamard_matrix(12 << 8))


def test_apply_copies_and_keeps_half_types() -> None:
    x = torch.ones(2, 4)
    assert apply_hadamard(x, 1).data_ptr() != x.data_ptr()
    assert apply_hadamard(x.to(torch.bfloat16), 4).dtype == torch.bfloat16


def test_errors_name_the_order() -> None:
    with pytest.raises(UsageError, match="order 92"):
        hadamard_matrix(92)
    with pytest.raises(UsageError, match="does not divide"):
        apply_hadamard(torch.ones(2, 6), 4)


@pytest.mark.parametrize(("q", "want"), [(49, (7, 2)), (343, (7, 3)), (73, (73, 1)), (45, None)])
def test_prime_power(q: int, want: tuple[int, int] | None) -> None:
    assert prime_power(q) == want


@pytest.mark.parametrize("q", [3, 5, 9, 25, 27, 49, 81, 125])
def test_jacobsthal(q: int) -> None:
    matrix = jacobsthal(q).astype(np.int64)
    assert np.array_equal(matrix @ matrix.T, q * np.eye(q, dtype=int) - 1)
    assert np.array_equal(matrix.T, matrix if q % 4 == 1 else -matrix)


@pytest.mark.parametrize("n", [1, 7, 64, 92, 96, 148, 172, 268, 269])
@pytest.mark.parametrize("keep_mean_row", [False, True])
def test_rotation(n: int, keep_mean_row: bool) -> None:
    r = rotation(n, torch.Generator().manual_seed(1), keep_mean_row=keep_mean_row)
    again = rotation(n, torch.Generator().manual_seed(1), keep_mean_row=keep_mean_row)
    other = rotation(n, torch.Generator().manual_seed(2), keep_mean_row=keep_mean_row)
    assert r.dtype == torch.float64
    assert torch.equal(r, again)
    assert n == 1 or not torch.equal(r, other)
    eye = torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(r @ r.T, eye, rtol=0, atol=1e-13)
    if keep_mean_row:
        assert bool((r[0] == 1.0 / n**0.5).all())
    # every output mixes every input
    assert n == 1 or int((r.abs() < 1e-12).sum()) == 0


def test_random_hadamard_spreads_an_outlier() -> None:
    r = random_hadamard(96, seed=3)
    torch.testing.assert_close(r.abs(), torch.full_like(r, 96**-0.5), rtol=0, atol=1e-15)
