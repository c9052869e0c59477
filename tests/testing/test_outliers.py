"""Outliers are real, and change nothing that a model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mqc.testing.families import BASIC, build_family
from mqc.testing.outliers import inject_outliers


@torch.no_grad()
def logits(model: Any, sample: dict[str, torch.Tensor]) -> torch.Tensor:
    result: torch.Tensor = model(**sample).logits
    return result


@pytest.mark.parametrize("name", BASIC)
def test_float_logits_do_not_change(name: str) -> None:
    """Factors are powers of two: only sums of differently rounded terms could differ, by ulps."""
    model, sample = build_family(name, torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    exact = logits(model, sample)
    report = inject_outliers(model, factor=64, channels=3, seed=1)
    after = logits(model, sample)
    assert float((after - exact).abs().max()) <= 1e-12 * float(exact.abs().max())
    assert report.counts["feed_forward"] == 2, "one per decoder layer; GELU towers have no factor"
    assert report.counts["attention"] >= 4
    assert report.counts["norms"] >= 8
    changed = [key for key, value in model.state_dict().items() if not value.equal(before[key])]
    grown = [
        key for key in changed if model.state_dict()[key].abs().max() > 8 * before[key].abs().max()
    ]
    assert any("up_proj" in key for key in grown)
    assert any("v_proj" in key or "qkv" in key for key in grown)
    assert any("norm" in key for key in grown)


def test_the_choice_follows_the_seed() -> None:
    states = []
    for seed in (0, 0, 1):
        model, _ = build_family("llava")
        inject_outliers(model, seed=seed)
        states.append(model.state_dict())
    key = next(key for key in states[0] if "up_proj" in key)
    assert states[0][key].equal(states[1][key]) and not states[0][key].equal(states[2][key])


def test_factors_that_would_round_are_refused() -> None:
    model, _ = build_family("llava")
    with pytest.raises(ValueError, match="not a power of two"):
        inject_outliers(model, factor=30)
