"""mqc::attention_int8: what it stores, how near it stays to floats, and its body."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import ATTENTION_CASES, attention_values, call, run_body

from mqc.ops.attention_int8 import quantize_rows


def narrow(values: dict[str, Any]) -> dict[str, Any]:
    """The same call over int8 caches."""
    made = {name: quantize_rows(values[f"{name}_cache"]) for name in ("key", "value")}
    caches = {f"{name}_cache": rows for name, (rows, _) in made.items()}
    scales = {f"{name}_scale": scale for name, (_, scale) in made.items()}
    return {**values, **caches, **scales}


def test_rows_have_a_scale_of_their_own() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, -127.0, 2.5], [0.5, 1.0, -2.0]])
    rows, scale = quantize_rows(x)
    assert torch.equal(scale, torch.tensor([1.0, 1.0, 2 / 127]))
    assert rows[:2].tolist() == [[0, 0, 0], [1, -127, 2]]  # half to even
    assert rows.dtype == torch.int8 and rows[2].tolist() == [32, 64, -127]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rotary", ["none", "half", "interleaved"])
def test_attention(rotary: str, packed: bool) -> None:
    """Stored rows are those of float attention, rounded; outputs stay within the rounding."""
    for case in ATTENTION_CASES:
        values = attention_values(rotary, packed, **case)
        plain, given = call("attention", values), narrow(values)
        got, body = call("attention_int8", given), run_body("attention_int8", given)
        past, end = int(values["past"]), values["mask"].shape[3]
        for index, name in enumerate(("key", "value")):
            rows, scale = quantize_rows(plain[1 + index])
            assert torch.equal(got[1 + index][:, :, past:end], rows[:, :, past:end])
            assert torch.equal(got[3 + index][:, :, past:end], scale[:, :, past:end])
            assert torch.equal(got[1 + index][:, :, :past], given[f"{name}_cache"][:, :, :past])
        for left, right in zip(body[1:], got[1:], strict=True):
            assert left.dtype == right.dtype and torch.equal(left, right)
        torch.testing.assert_close(body[0], got[0], rtol=1e-5, atol=1e-6)
        # 127 steps a side; a row's largest value is a few times its others'.
        assert 0 < (got[0] - plain[0]).abs().max() <= 0.05
