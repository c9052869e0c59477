"""The kernels between the linears, by their C interface, on every instruction set."""

from __future__ import annotations

import ctypes

import native_library as native
import numpy as np
import pytest
import torch

from mqc.numerics.hadamard import apply_hadamard, hadamard_matrix, hadamard_plan
from mqc.ops import activation_quantize, attention, quantize_static

pytestmark = native.needs_library


def quantized(
    lib: ctypes.CDLL, x: np.ndarray, scales: native.RowScales, unsigned: bool
) -> np.ndarray:
    out = np.zeros(x.shape, np.uint8 if unsigned else np.int8)
    rows = x.size // x.shape[-1]
    lib.mqc_quantize(x.ctypes.data, 0, rows, x.shape[-1], scales, unsigned, out.ctypes.data)
    return out


@pytest.mark.parametrize("n", [1, 3, 16, 100, 256, 1000])
@pytest.mark.parametrize("scale", [0.013, 2.0**-7, 3e-39, 1e31])
def test_quantize_equals_the_division(
    lib: ctypes.CDLL, rng: np.random.Generator, n: int, scale: float
) -> None:
    steps = rng.uniform(-140, 140, (7, n))
    steps[1] = np.round(steps[1] * 2) / 2  # ties, as near as float32 comes
    steps[2] = np.nextafter(steps[1].astype(np.float32), np.float32(0))
    steps[3] = [1e30, -1e30, np.inf, -np.inf][n % 4]
    with np.errstate(over="ignore"):
        x = (steps * scale).astype(np.float32)
    s = np.array([scale], np.float32)
    for unsigned in (False, True):
        wanted = quantize_static.reference(
            torch.from_numpy(x), torch.from_numpy(s), None, unsigned
        ).numpy()
        assert np.array_equal(quantized(lib, x, native.scale_struct(s), unsigned), wanted)


def test_quantize_takes_the_scale_of_the_row(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 5, 33)).astype(np.float32)
    scale = np.array([0.01, 0.03], np.float32)
    mask = rng.integers(0, 2, (3, 5)).astype(bool)
    count = np.array([0, 2, 5])
    t = torch.from_numpy
    given = native.scale_struct(scale, mask=mask)
    wanted = quantize_static.reference(t(x), t(scale), t(mask)).numpy()
    assert np.array_equal(quantized(lib, x, given, False), wanted)
    given = native.scale_struct(scale, count=count, tokens=5)
    wanted = quantize_static.reference(t(x), t(scale), t(count)).numpy()
    assert np.array_equal(quantized(lib, x, given, False), wanted)


@pytest.mark.parametrize("n", [1, 7, 64, 300, 1536])
def test_rms_norm(lib: ctypes.CDLL, rng: np.random.Generator, n: int) -> None:
    x = (rng.standard_normal((9, n)) * 3).astype(np.float32)
    x[3] = 0
    split = np.array([n - 1, 0])
    scale = np.array([0.02], np.float32)
    out, kept = np.zeros((9, n), np.int8), np.zeros((9, 2), np.float32)
    given = native.scale_struct(scale)
    head = (x.ctypes.data, 0, 9, n, 1e-6, given, 0, out.ctypes.data)
    lib.mqc_rms_norm_quantize(*head, split.ctypes.data, 2, kept.ctypes.data)
    y = torch.nn.functional.rms_norm(torch.from_numpy(x).double(), [n], eps=1e-6)
    assert native.relative(kept, y[:, split].float().numpy()) <= 1e-6
    wanted = quantize_static.reference(y, torch.from_numpy(scale), None).numpy()
    assert native.steps_apart(out, wanted) <= 1
    assert (out != wanted).mean() <= 1e-3  # only ties


ORDERS = [12, 20, 28, 36, 40, 48, 76 * 4, 140 * 2, 148, 344 * 32, 1, 2, 4, 64, 256, 2048, 12 * 128]
ORDERS += [140 * 64, 20 * 256, 28 * 512]


@pytest.mark.parametrize("order", ORDERS)
def test_hadamard(lib: ctypes.CDLL, rng: np.random.Generator, order: int) -> None:
    plan = hadamard_plan(order)
    assert plan.block == order
    base = hadamard_matrix(plan.base).numpy() if plan.base > 1 else None
    made = lib.mqc_hadamard_create(plan.base, plan.log2, native.pointer(base))
    x = rng.standard_normal((3, order)).astype(np.float32)
    memory = np.full(lib.mqc_hadamard_scratch(made) + 16, np.nan, np.float32)
    y = np.zeros_like(x)
    lib.mqc_hadamard(made, x.ctypes.data, 3, y.ctypes.data, memory.ctypes.data)
    wanted = apply_hadamard(torch.from_numpy(x).double(), order).numpy()
    assert native.relative(y, wanted) <= 1e-6
    lib.mqc_hadamard(made, x.ctypes.data, 3, x.ctypes.data, memory.ctypes.data)
    assert np.array_equal(x, y)
    assert np.isnan(memory[-16:]).all()
    lib.mqc_hadamard_free(made)


def test_hadamard_refuses_what_it_cannot_hold(lib: ctypes.CDLL) -> None:
    assert lib.mqc_hadamard_create(12, 0, None) is None
    assert lib.mqc_hadamard_create(0, 3, None) is None
    assert lib.mqc_hadamard_create(1, 99, None) is None


ACTIVATIONS = ("identity", "silu", "gelu", "gelu_tanh", "quick_gelu", "relu")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n", "block"), [(1, 1), (24, 12), (100, 4), (512, 512), (280, 140)])
@pytest.mark.parametrize("index", range(len(ACTIVATIONS)), ids=ACTIVATIONS)
def test_activation(
    lib: ctypes.CDLL, rng: np.random.Generator, index: int, n: int, block: int, gated: bool
) -> None:
    plan, made = hadamard_plan(block), None
    if block > 1:
        base = hadamard_matrix(plan.base).numpy() if plan.base > 1 else None
        made = lib.mqc_hadamard_create(plan.base, plan.log2, native.pointer(base))
    x = (rng.standard_normal((11, 2 * n if gated else n)) * 4).astype(np.float32)
    x.reshape(-1)[:4] = [-200, 200, 0, -88]
    split, scale = np.array([0, n - 1]), np.array([0.05, 0.1], np.float32)
    mask = rng.integers(0, 2, 11).astype(bool)
    given = native.Activation(index, gated, made, split.ctypes.data, 2, 1)
    memory = np.zeros(lib.mqc_activation_scratch(given, n), np.float32)
    out, kept = np.zeros((11, n), np.uint8), np.zeros((11, 2), np.float32)
    scales = native.scale_struct(scale, mask=mask)
    for begin, end in ((0, 4), (4, 11)):
        head = (given, x.ctypes.data, begin, end, n, scales)
        lib.mqc_activation_quantize(*head, out.ctypes.data, kept.ctypes.data, memory.ctypes.data)
    t = torch.from_numpy
    wanted, columns = activation_quantize.reference(
        t(x).double(), ACTIVATIONS[index], gated, block, t(scale).double(), t(mask), t(split), True
    )
    assert native.relative(kept, columns.numpy()) <= 1e-6
    assert native.steps_apart(out, wanted.numpy()) <= 1
    assert (out != wanted.numpy()).mean() <= 2e-3
    if made:
        lib.mqc_hadamard_free(made)


CASES = {
    # batch, tokens, past, spare rows, query heads, key heads, dim, value dim, rotary, R
    "decode": (1, 1, 9, 3, 4, 2, 16, 16, "half", 16),
    "decode-long": (2, 1, 1300, 0, 6, 2, 32, 32, "half", 32),
    "two-tokens-long": (1, 2, 700, 70, 3, 1, 20, 12, "interleaved", 8),
    "prefill": (1, 77, 0, 0, 6, 2, 64, 64, "half", 64),
    "prefill-batch": (3, 19, 0, 5, 4, 4, 18, 18, "none", 0),
    "chunk": (2, 70, 131, 8, 12, 2, 128, 128, "half", 128),
    "odd": (1, 5, 3, 0, 7, 1, 5, 7, "half", 4),
    "first": (1, 1, 0, 1, 2, 2, 8, 8, "none", 0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("order", ["causal", "shuffled"])
def test_attention(lib: ctypes.CDLL, rng: np.random.Generator, case: str, order: str) -> None:
    b, s, past, spare, heads, groups, d, dv, rotary, r = CASES[case]
    rows = past + s + spare

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    q, k, v = random(b, s, heads, d), random(b, s, groups, d), random(b, s, groups, dv)
    keys, values = random(b, groups, rows, d), random(b, groups, rows, dv)
    cos, sin = random(1, s, r), random(1, s, r)
    place = np.arange(s) if order == "causal" else rng.permutation(s)
    mask = np.ones((b, 1, s, past + s), bool)
    mask[..., past:] = place[:, None] >= place
    mask[:, :, :, : past // 2] &= rng.integers(0, 2, (b, 1, 1, past // 2)).astype(bool)  # padding
    t = torch.from_numpy
    angles = (t(cos).double(), t(sin).double()) if r else (None, None)
    wanted = attention.reference(
        *(t(x).double() for x in (q, k, v, keys, values)),
        torch.tensor([past]),
        t(mask),
        *angles,
        d**-0.5,
        rotary,
    )
    out = np.zeros((b, s, heads * dv), np.float32)
    form = ("none", "half", "interleaved").index(rotary)
    call = native.Attention(
        *(b, s, heads, groups, d, dv, past, rows, 0, form, r, 1, b, past + s, d**-0.5),
        *(x.ctypes.data for x in (q, k, v)),
        *(heads * d, groups * d, groups * dv),
        *(x.ctypes.data for x in (cos, sin, mask, keys, values, out)),
    )
    plan = native.attend(lib, call)
    assert (plan.combines > 0) == (s < 4 and past + s > 512)
    for found, expected in zip((out, keys, values), wanted, strict=True):
        assert native.relative(found, expected.numpy()) <= 2e-6


def test_a_row_that_sees_nothing_is_zero(lib: ctypes.CDLL, rng: np.random.Generator) -> None:
    """And does not disturb the others; the rows of the cache after the last are never read."""
    for s in (2, 8):
        q = rng.standard_normal((1, s, 1, 16)).astype(np.float32)
        cache = np.full((1, 1, s + 70, 16), np.nan, np.float32)
        other, out = cache.copy(), np.full((1, s, 16), 7, np.float32)
        mask = np.tril(np.ones((s, s), bool))
        mask[1] = False
        call = native.Attention(
            *(1, s, 1, 1, 16, 16, 0, s + 70, 0, 0, 0, 1, 1, s, 0.25),
            *(q.ctypes.data,) * 3,
            *(16, 16, 16, None, None, mask.ctypes.data),
            *(cache.ctypes.data, other.ctypes.data, out.ctypes.data),
        )
        native.attend(lib, call)
        assert not out[0, 1].any()
        assert np.allclose(out[0, 0], q[0, 0, 0], rtol=1e-6)
        assert np.isfinite(out).all()
