import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mqc.calib.observers import ZERO_SCALE, make_observer
from mqc.errors import CalibrationError, UsageError

KINDS = ["minmax", "percentile", "mse"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), cut=st.integers(1, 99), swap=st.booleans())
def test_batching_does_not_matter(kind: str, seed: int, cut: int, swap: bool) -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(seed)) ** 3
    x[::7] = 0.0
    whole, parts = make_observer(kind), make_observer(kind)
    whole.update(x.reshape(4, 25))
    pieces = [x[:cut], x[cut:]]
    for piece in reversed(pieces) if swap else pieces:
        parts.update(piece)
    assert whole.scale() == parts.scale()
    assert 0 < whole.scale() <= float(x.abs().max()) / 127


def test_minmax_is_exact() -> None:
    observer = make_observer("minmax")
    observer.update(torch.tensor([1.0, -254.0]))
    observer.update(torch.tensor([3.0]))
    assert observer.scale() == 2.0
    four = make_observer("minmax", bits=4)
    four.update(torch.tensor([-7.0]))
    assert four.scale() == 1.0


def test_percentile_ignores_a_rare_outlier() -> None:
    observer = make_observer("percentile", percentile=99.0)
    observer.update(torch.linspace(-1, 1, 10001))
    observer.update(torch.tensor([8.0]))
    assert observer.scale() * 127 == pytest.approx(0.99, abs=0.01)
    full = make_observer("percentile", percentile=100.0)
    full.update(torch.tensor([8.0, 1.0]))
    assert full.scale() == 8.0 / 127


def test_mse_is_close_to_brute_force() -> None:
    x = torch.randn(200000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0] = 30.0
    observer = make_observer("mse")
    observer.update(x)

    def error(scale: float) -> float:
        return float((x - torch.round(x / scale).clamp(-127, 127) * scale).square().sum())

    best = min(error(30.0 * i / 100 / 127) for i in range(1, 101))
    assert error(observer.scale()) <= 1.02 * best
    assert error(observer.scale()) < 0.7 * error(30.0 / 127)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_data(kind: str) -> None:
    observer = make_observer(kind)
    observer.update(torch.zeros(5))
    observer.update(torch.zeros(0))
    assert observer.scale() == ZERO_SCALE
    observer.update(torch.tensor([127.0]))
    assert observer.scale() > ZERO_SCALE


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_and_huge_values(kind: str) -> None:
    for value in (1e-300, 5e-324, 1e-30, 1e30, 1e300):
        observer = make_observer(kind)
        observer.update(torch.tensor([value], dtype=torch.float64))
        assert math.isfinite(observer.scale()) and observer.scale() >= ZERO_SCALE


@pytest.mark.parametrize("kind", KINDS)
def test_errors(kind: str) -> None:
    observer = make_observer(kind)
    with pytest.raises(CalibrationError, match="no calibration value"):
        observer.scale()
    for bad in (math.nan, math.inf):
        with pytest.raises(CalibrationError, match="NaN or infinite"):
            observer.update(torch.tensor([1.0, bad]))
    with pytest.raises(CalibrationError):
        observer.scale()


def test_usage_errors() -> None:
    with pytest.raises(UsageError, match="unknown observer 'best'"):
        make_observer("best")
    with pytest.raises(UsageError, match="no option percentile"):
        make_observer("mse", percentile=1.0)
    with pytest.raises(UsageError, match="percentile 0"):
        make_observer("percentile", percentile=0)
    with pytest.raises(UsageError, match="1 bits"):
        make_observer("minmax", bits=1)
    assert make_observer("mse", candidates=10) is not None
