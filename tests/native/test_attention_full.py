"""Attention without a cache, by its C interface, on every instruction set."""

from __future__ import annotations

import ctypes

import native_library as native
import numpy as np
import pytest
import torch

from mqc.ops import attention_full

pytestmark = native.needs_library


CASES = {
    # batch, queries, keys, query heads, key heads, dim, value dim, rotary, R, batch of the mask
    "tower": (1, 200, 200, 3, 3, 80, 80, "half", 80, 0),
    "tower-72": (2, 131, 131, 2, 2, 72, 72, "none", 0, 0),
    "tower-88": (1, 97, 97, 2, 2, 88, 88, "interleaved", 40, 0),
    "windows": (1, 320, 320, 2, 2, 64, 64, "half", 64, 1),
    "masks": (3, 70, 70, 4, 2, 20, 20, "half", 12, 3),
    "shared-mask": (2, 70, 70, 4, 4, 20, 20, "none", 0, 1),
    "resampler": (2, 64, 577, 4, 4, 128, 128, "none", 0, 0),
    "one-query": (1, 1, 70, 6, 2, 16, 24, "none", 0, 1),
    "odd": (2, 5, 3, 7, 1, 5, 7, "none", 0, 2),
}


PACKED = ("tower", "tower-72", "tower-88", "windows", "masks", "shared-mask")
"""Cases with one number of rows and one width."""


@pytest.mark.parametrize(
    ("case", "packed"), [(case, False) for case in CASES] + [(case, True) for case in PACKED]
)
def test_attention_full(lib: ctypes.CDLL, case: str, packed: bool) -> None:
    b, s, keys, heads, groups, d, dv, rotary, r, masks = CASES[case]
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    q, k, v = random(b, s, heads, d), random(b, keys, groups, d), random(b, keys, groups, dv)
    cos, sin = random(1, s, r), random(1, s, r)
    mask = None
    if case == "windows":
        segment = np.arange(s) // 80
        mask = np.ascontiguousarray((segment[:, None] == segment)[None, None])
    elif masks:
        mask = rng.integers(0, 2, (masks, 1, s, keys)).astype(bool)
        mask[..., 0] |= ~mask.any(-1)
    t = torch.from_numpy
    wanted = attention_full.reference(
        *(t(x).double() for x in (q, k, v)),
        None if mask is None else t(mask),
        *((t(cos).double(), t(sin).double()) if r else (None, None)),
        groups,
        d**-0.5,
        rotary,
    )
    starts, strides = [x.ctypes.data for x in (q, k, v)], (heads * d, groups * d, groups * dv)
    if packed:
        whole = np.concatenate([q, k, v], axis=2)
        first = whole.ctypes.data
        starts = [first, first + 4 * heads * d, first + 4 * (heads + groups) * d]
        strides = ((heads + 2 * groups) * d,) * 3
    out = np.zeros((b, s, heads * dv), np.float32)
    form = ("none", "half", "interleaved").index(rotary)
    call = native.Attention(
        *(b, s, heads, groups, d, dv, 0, 0, keys, form, r, 1, masks, keys, d**-0.5),
        *starts,
        *strides,
        *(cos.ctypes.data, sin.ctypes.data, native.pointer(mask), None, None, out.ctypes.data),
    )
    plan = native.attend(lib, call)
    assert plan.appends == masks * s and plan.combines == 0
    assert native.relative(out, wanted.numpy()) <= 2e-6
