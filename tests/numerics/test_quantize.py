import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mqc.errors import CalibrationError, MqcError, UsageError
from mqc.numerics.gptq import HessianAccumulator, gptq_quantize
from mqc.numerics.quantize import ClipSearch, quantize_rtn, weight_range, weight_scale

SEEDS = st.integers(0, 2**31)
BITS = st.sampled_from([2, 3, 4, 8])


def problem(seed: int, n: int, k: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs with channels of very different size."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g, dtype=torch.float64)
    mix = torch.randn(k, k, generator=g, dtype=torch.float64)
    size = torch.rand(k, generator=g, dtype=torch.float64) * 5
    x = torch.randn(rows, k, generator=g, dtype=torch.float64) @ (mix * 0.3 + torch.diag(size))
    return weight, x


def h_error(error: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ error.T).square().sum())


@settings(max_examples=25, deadline=None)
@given(SEEDS, BITS, st.integers(1, 6), st.integers(1, 5), st.booleans())
def test_integers_stay_in_range(seed: int, bits: int, n: int, groups: int, clip: bool) -> None:
    weight, _ = problem(seed, n, groups * 4, 1)
    for group_size in (None, 4):
        out = quantize_rtn(
            weight, bits, group_size=group_size, clip=ClipSearch(steps=10) if clip else None
        )
        low, high = weight_range(bits)
        assert out.q.dtype == torch.int8 and out.scale.dtype == torch.float32
        assert int(out.q.min()) >= low and int(out.q.max()) <= high
        assert bool((out.scale > 0).all())
        assert out.scale.shape == ((n,) if group_size is None else (n, groups))
        assert out.dequantize().shape == weight.shape
        if not clip:
            # 16-bit steps apart from the clamped level, an error is at most half a step
            step = out.scale.reshape(n, -1).repeat_interleave(group_size or groups * 4, 1)
            error = (out.dequantize(torch.float64) - weight).abs()
            assert bool((error <= step.to(torch.float64) * 0.5001).all())


@settings(max_examples=20, deadline=None)
@given(SEEDS, BITS, st.booleans(), st.sampled_from([None, 4, 8]), st.sampled_from([1, 5, 128]))
def test_gptq_is_never_worse_than_rtn(
    seed: int, bits: int, act_order: bool, group_size: int | None, block_size: int
) -> None:
    weight, x = problem(seed, 5, 24, 60)
    hessian = HessianAccumulator(24, torch.float64)
    hessian.add(x[:20])
    hessian.add(x[20:].reshape(4, 10, 24))
    torch.testing.assert_close(hessian.hessian(), 2 * x.T @ x)
    out = gptq_quantize(
        weight,
        hessian.hessian(),
        bits=bits,
        group_size=group_size,
        act_order=act_order,
        block_size=block_size,
        dtype=torch.float64,
    )
    rtn = quantize_rtn(weight, bits, group_size=group_size)
    assert torch.equal(out.scale, rtn.scale)
    low, high = weight_range(bits)
    assert int(out.q.min()) >= low and int(out.q.max()) <= high
    gptq_error = h_error(out.dequantize(torch.float64) - weight, x)
    assert gptq_error <= h_error(rtn.dequantize(torch.float64) - weight, x) * (1 + 1e-9)


def test_gptq_clearly_beats_rtn_on_correlated_inputs() -> None:
    weight, x = problem(0, 16, 64, 200)
    x = x[:, :8] @ torch.randn(8, 64, dtype=torch.float64, generator=torch.Generator()) + 0.1 * x
    h = 2 * x.T @ x
    rtn = h_error(quantize_rtn(weight, 4).dequantize(torch.float64) - weight, x)
    for act_order in (False, True):
        out = gptq_quantize(weight, h, bits=4, act_order=act_order)
        assert h_error(out.dequantize(torch.float64) - weight, x) < 0.5 * rtn


def test_gptq_matches_a_plain_column_loop() -> None:
    """The blocked solver equals the textbook recursion on H^-1 (optimal brain surgeon)."""
    weight, x = problem(3, 4, 12, 50)
    h = 2 * x.T @ x
    h_damped = h + 0.01 * h.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    scale = weight_scale(weight, 4).to(torch.float64)
    w, want = weight.clone(), torch.zeros_like(weight)
    for j in range(12):
        inverse = torch.linalg.inv(h_damped[j:, j:])
        want[:, j] = torch.round(w[:, j] / scale).clamp(-8, 7)
        error = (w[:, j] - want[:, j] * scale) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
    out = gptq_quantize(weight, h, act_order=False, block_size=5, dtype=torch.float64)
    rtn = quantize_rtn(weight, 4).q
    for row in range(4):
        assert torch.equal(out.q[row], want[row].to(torch.int8)) or torch.equal(
            out.q[row], rtn[row]
        )
    assert not torch.equal(out.q, rtn)


def test_frozen_and_dead_columns() -> None:
    weight, x = problem(1, 6, 32, 100)
    frozen = torch.zeros(32, dtype=torch.bool)
    frozen[[0, 9]] = True
    weight[:, frozen] = 0
    x[:, 5] = 0.0  # never active
    h = 2 * x.T @ x
    for act_order in (False, True):
        out = gptq_quantize(weight, h, act_order=act_order, frozen=frozen)
        assert not bool(out.q[:, frozen].any())
        assert torch.equal(out.q[:, 5], quantize_rtn(weight, 4).q[:, 5])
        # frozen columns do not leak into the others through H
        zeroed = h.clone()
        zeroed[frozen, :] = 0
        zeroed[:, frozen] = 0
        assert torch.equal(out.q, gptq_quantize(weight, zeroed, act_order=act_order).q)
    weight[0, 9] = 0.1
    with pytest.raises(UsageError, match="frozen"):
        gptq_quantize(weight, h, frozen=frozen)


def test_degenerate_hessians() -> None:
    weight, x = problem(2, 4, 16, 3)  # rank 3 of 16
    gptq_quantize(weight, 2 * x.T @ x)
    all_dead = gptq_quantize(weight, torch.zeros(16, 16))
    assert torch.equal(all_dead.q, quantize_rtn(weight, 4).q)
    indefinite = -torch.ones(16, 16) + 2 * torch.eye(16)
    before = weight.clone()
    out = gptq_quantize(weight, indefinite)  # needs more damping than asked for
    assert torch.equal(weight, before) and int(out.q.max()) <= 7
    with pytest.raises(CalibrationError, match="not positive definite"):
        gptq_quantize(weight, -1e6 * torch.ones(16, 16) + (1e6 + 1.0) * torch.eye(16))


def test_zero_rows_and_zero_groups() -> None:
    weight = torch.zeros(2, 8)
    weight[1, :4] = 1.0
    out = quantize_rtn(weight, 4, group_size=4, clip=ClipSearch())
    assert out.scale[0].tolist() == [1.0, 1.0] and out.scale[1, 1] == 1.0
    assert not bool(out.q[0].any())
    assert torch.equal(quantize_rtn(torch.zeros(2, 8), 8).dequantize(), torch.zeros(2, 8))


def test_clip_search_lowers_its_norm() -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 12.0

    def norm(clip: ClipSearch | None) -> float:
        error = quantize_rtn(weight, 4, clip=clip).dequantize() - weight
        return float(error.abs().pow(2.4).sum())

    assert norm(ClipSearch()) < 0.9 * norm(None)
    full = weight_scale(weight, 4)
    clipped = weight_scale(weight, 4, clip=ClipSearch())
    assert bool((clipped <= full).all()) and bool((clipped >= 0.2 * full).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_are_named(bad: float) -> None:
    weight, x = problem(0, 3, 8, 20)
    h = 2 * x.T @ x
    broken = weight.clone()
    broken[1, 2] = bad
    with pytest.raises(MqcError, match="weight holds 1 NaN"):
        quantize_rtn(broken, 4)
    with pytest.raises(MqcError, match="weight holds 1 NaN"):
        gptq_quantize(broken, h)
    h[0, 0] = bad
    with pytest.raises(MqcError, match="Hessian holds"):
        gptq_quantize(weight, h)
    accumulator = HessianAccumulator(8)
    with pytest.raises(CalibrationError, match="no calibration input"):
        accumulator.hessian()
    with pytest.raises(CalibrationError, match="batch"):
        accumulator.add(torch.full((1, 8), bad))
    assert accumulator.rows == 0


def test_usage_errors() -> None:
    weight = torch.ones(2, 6)
    with pytest.raises(UsageError, match="5 bits"):
        quantize_rtn(weight, 5)
    with pytest.raises(UsageError, match="group size 4"):
        quantize_rtn(weight, 4, group_size=4)
    with pytest.raises(UsageError, match=r"\[6, 6\] Hessian"):
        gptq_quantize(weight, torch.eye(5))
    with pytest.raises(UsageError, match="8-bit"):
        quantize_rtn(weight, 8).packed()
    with pytest.raises(UsageError, match="the batch has 5"):
        HessianAccumulator(6).add(torch.ones(2, 5))
    assert quantize_rtn(weight, 4).packed().shape == (2, 3)
