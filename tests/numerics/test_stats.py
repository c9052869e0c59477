import math

import pytest
import torch

from mqc.numerics.stats import cosine, kl_divergence, max_abs, relative_error, sqnr_db


def test_equal_tensors() -> None:
    x = torch.tensor([1.0, -2.0])
    assert sqnr_db(x, x) == math.inf
    assert cosine(x, x) == pytest.approx(1.0)
    assert max_abs(x, x) == relative_error(x, x) == 0.0
    assert kl_divergence(x, x) == 0.0


def test_known_values() -> None:
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert sqnr_db(a, b) == pytest.approx(20.0)
    assert max_abs(a, b) == 0.5
    assert relative_error(a, b) == pytest.approx(0.1)
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 0.0


def test_zero_reference() -> None:
    zero, one = torch.zeros(2), torch.ones(2)
    assert sqnr_db(zero, one) == -math.inf
    assert relative_error(zero, one) == math.inf
    assert relative_error(zero, zero) == 0.0
    assert cosine(zero, one) == 0.0 and cosine(zero, zero) == 1.0
    assert max_abs(torch.zeros(0), torch.zeros(0)) == 0.0


def test_kl_known_value_and_masked_logits() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    want = 0.5 * math.log(2.0) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence(p.log(), q.log()) == pytest.approx(want, abs=1e-7)
    masked = torch.tensor([[0.0, 0.0, -math.inf]])
    assert kl_divergence(masked, masked) == 0.0


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        max_abs(torch.zeros(2), torch.zeros(3))
