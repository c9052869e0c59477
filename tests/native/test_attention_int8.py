"""Attention over int8 caches, by its C interface, on every instruction set."""

from __future__ import annotations

import ctypes

import native_library as native
import numpy as np
import pytest
import torch

from mqc.ops import attention_int8

pytestmark = native.needs_library


CASES = {
    # batch, tokens, past, spare rows, query heads, key heads, dim, value dim, rotary, R
    "decode": (1, 1, 9, 3, 4, 2, 16, 16, "half", 16),
    "decode-long": (2, 1, 1300, 0, 12, 2, 32, 32, "half", 32),
    "two-tokens-long": (1, 2, 700, 70, 3, 1, 20, 12, "interleaved", 8),
    "prefill": (1, 77, 0, 0, 6, 2, 64, 64, "half", 64),
    "prefill-batch": (3, 19, 0, 5, 4, 4, 18, 18, "none", 0),
    "chunk": (2, 70, 131, 8, 12, 2, 128, 128, "half", 128),
    "odd": (1, 5, 3, 0, 7, 1, 5, 7, "half", 4),
    "wide": (1, 9, 70, 2, 2, 1, 40, 72, "interleaved", 36),
}


@pytest.mark.parametrize("case", CASES)
def test_attention(lib: ctypes.CDLL, case: str) -> None:
    """Stored rows equal the definition's in every bit; outputs are those of float arithmetic."""
    b, s, past, spare, heads, groups, d, dv, rotary, r = CASES[case]
    rows, rng, t = past + s + spare, np.random.default_rng(0), torch.from_numpy

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    q, k, v = random(b, s, heads, d), random(b, s, groups, d), random(b, s, groups, dv)
    v[0, 0, 0] = 0  # a row without a largest value
    cos, sin = random(1, s, r), random(1, s, r)
    made = [attention_int8.quantize_rows(t(random(b, groups, rows, n))) for n in (d, dv)]
    (keys, key_scale), (values, value_scale) = [(x.numpy(), y.numpy()) for x, y in made]
    mask = np.tril(np.ones((b, 1, s, past + s), bool), past)
    mask[..., : past // 2] &= rng.integers(0, 2, (b, 1, 1, past // 2)).astype(bool)
    wanted = attention_int8.reference(
        *(t(x).clone() for x in (q, k, v, keys, values, key_scale, value_scale)),
        *(torch.tensor([past]), t(mask)),
        *((t(cos), t(sin)) if r else (None, None)),
        *(d**-0.5, rotary),
    )
    out = np.zeros((b, s, heads * dv), np.float32)
    form = ("none", "half", "interleaved").index(rotary)
    call = native.Attention(
        *(b, s, heads, groups, d, dv, past, rows, 0, form, r, 1, b, past + s, d**-0.5),
        *(x.ctypes.data for x in (q, k, v)),
        *(heads * d, groups * d, groups * dv),
        *(x.ctypes.data for x in (cos, sin, mask)),
        *(None, None, out.ctypes.data),
        *(x.ctypes.data for x in (keys, values, key_scale, value_scale)),
    )
    assert native.attend(lib, call).packs == 0
    stored = (keys, values, key_scale, value_scale)
    for found, expected in zip(stored, wanted[1:], strict=True):
        assert np.array_equal(found, expected.numpy())
    assert native.relative(out, wanted[0].numpy()) <= 3e-6
