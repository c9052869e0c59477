"""The reference linears against NumPy int64, bit for bit in the integer part."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mqc.ops  # noqa: F401
from mqc.errors import UsageError
from mqc.numerics.packing import pack_int4
from mqc.ops.linear_a8 import integer_matmul

OPS = torch.ops.mqc


def rng_tensors(seed: int, batch: int, s: int, k: int, n: int, bits: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    return {
        "xq": rng.integers(-127, 128, (batch, s, k), dtype=np.int8),
        "q": rng.integers(low, high, (n, k), dtype=np.int8),
        "bias": rng.standard_normal(n).astype(np.float32),
        "x_split": rng.standard_normal((batch, s, 2)).astype(np.float32),
        "w_split": rng.standard_normal((n, 2)).astype(np.float32),
    }


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 2),
    s=st.integers(0, 5),
    half_k=st.integers(1, 20),
    odd=st.booleans(),
    n=st.integers(1, 9),
    bits=st.sampled_from([4, 8]),
    modality=st.sampled_from([None, "mask", "count"]),
    unsigned=st.booleans(),
    groups=st.sampled_from([None, 1, 2]),
    bias=st.booleans(),
    split=st.booleans(),
)
def test_against_numpy(
    seed: int,
    batch: int,
    s: int,
    half_k: int,
    odd: bool,
    n: int,
    bits: int,
    modality: str | None,
    unsigned: bool,
    groups: int | None,
    bias: bool,
    split: bool,
) -> None:
    k = 2 * half_k + (odd and groups != 2)
    data = rng_tensors(seed, batch, s, k, n, bits)
    rng = np.random.default_rng(seed + 1)
    # Powers of two as scales: every product is exact, so the comparison can be bitwise.
    g = groups or 1
    w_scale = np.exp2(rng.integers(-3, 3, (n, g))).astype(np.float32)
    x_scale = np.exp2(rng.integers(-3, 3, 1 if modality is None else 2)).astype(np.float32)
    visual = np.zeros((batch, s), dtype=bool)
    modal = None
    if modality == "mask":
        visual = rng.integers(0, 2, (batch, s)).astype(bool)
        modal = torch.from_numpy(visual)
    elif modality == "count":
        count = rng.integers(0, s + 1, batch)
        visual = np.arange(s)[None] < count[:, None]
        modal = torch.from_numpy(count)

    want = np.zeros((batch, s, n))
    for i in range(g):
        span = slice(i * k // g, (i + 1) * k // g)
        product = data["xq"][..., span].astype(np.int64) @ data["q"][:, span].astype(np.int64).T
        want += product * w_scale[:, i].astype(np.float64)
    want *= x_scale[visual.astype(int)][..., None]

    q = torch.from_numpy(data["q"])
    xq = torch.from_numpy(data["xq"])
    if unsigned:
        xq = (xq.to(torch.int16) + 128).to(torch.uint8)
    op = OPS.linear_w4a8 if bits == 4 else OPS.linear_w8a8
    scale = torch.from_numpy(w_scale if groups else w_scale[:, 0])
    arguments = [xq, pack_int4(q) if bits == 4 else q, scale, torch.from_numpy(x_scale), modal]
    got = op(*arguments, None, None, None)
    assert got.dtype == torch.float32
    assert np.array_equal(got.numpy(), want.astype(np.float32))
    # float64 scales: the same in float64
    wide = op(*arguments[:2], scale.double(), arguments[3].double(), modal, None, None, None)
    assert wide.dtype == torch.float64 and np.array_equal(wide.numpy(), want)

    extra = [torch.from_numpy(data[name]) for name in ("bias", "x_split", "w_split")]
    full = op(*arguments, extra[0] if bias else None, *(extra[1:] if split else (None, None)))
    if bias:
        want = want + data["bias"]
    if split:
        want = want + data["x_split"].astype(np.float64) @ data["w_split"].T
    np.testing.assert_allclose(full.numpy(), want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("k", "bits"), [(29568, 4), (29568, 8), (18944, 8), (1025, 8), (16385, 4)])
@pytest.mark.parametrize("unsigned", [False, True])
def test_extremes_accumulate_exactly(k: int, bits: int, unsigned: bool) -> None:
    weight = torch.full((3, k), -8 if bits == 4 else 127, dtype=torch.int8)
    weight[1] = 7 if bits == 4 else -127
    weight[2, ::2] = 1
    x = torch.full((2, k), 127, dtype=torch.int8)
    x[1, : k // 2] = -127
    want = x.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T
    xq = (x.to(torch.int16) + 128).to(torch.uint8) if unsigned else x
    got = integer_matmul(xq, weight, 8 if bits == 4 else 128)
    assert got.dtype == torch.int32 and np.array_equal(got.numpy(), want)


def test_threads_do_not_matter() -> None:
    data = rng_tensors(0, 1, 33, 3000, 17, 8)
    xq, q = torch.from_numpy(data["xq"]), torch.from_numpy(data["q"])
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(integer_matmul(xq, q, 128))
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weight_only(bits: int, groups: int | None, dtype: torch.dtype) -> None:
    k = 9 if groups is None else 12
    data = rng_tensors(5, 2, 3, k, 7, bits)
    q = torch.from_numpy(data["q"])
    scale = torch.rand(7, groups or 1) + 0.1
    x = torch.randn(2, 3, k).to(dtype)
    dense = q.double() * scale.double().repeat_interleave(k // (groups or 1), 1)
    split = [torch.from_numpy(data[name]) for name in ("x_split", "w_split")]
    want = x.double() @ dense.T + torch.from_numpy(data["bias"]).double()
    want = want + split[0].double() @ split[1].double().T
    op = OPS.linear_w4a16 if bits == 4 else OPS.linear_w8a16
    stored = pack_int4(q) if bits == 4 else q
    bias = torch.from_numpy(data["bias"])
    got = op(x, stored, scale if groups else scale[:, 0], bias, *split)
    assert got.dtype == dtype
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance * 50)


def test_errors_name_what_does_not_fit() -> None:
    x = torch.zeros(1, 2, 6, dtype=torch.int8)
    w = torch.zeros(4, 6, dtype=torch.int8)
    one, two = torch.ones(1), torch.ones(2)
    cases = [
        (x.float(), w, torch.ones(4), one, None, None, None, "int8 or uint8"),
        (x, w[:, :5], torch.ones(4), one, None, None, None, "for 6 input channels"),
        (x, w, torch.ones(3), one, None, None, None, "weight scales"),
        (x, w, torch.ones(4, 4), one, None, None, None, "weight scales"),
        (x, w, torch.ones(4), two, None, None, None, "need a modality"),
        (x, w, torch.ones(4), torch.ones(3), None, None, None, r"\[1\] or \[2\]"),
        (x, w, torch.ones(4), two, torch.zeros(1, 3).bool(), None, None, "does not fit rows"),
        (x, w, torch.ones(4), two, torch.zeros(1), None, None, "does not fit rows"),
        (x, w, torch.ones(4), one, None, torch.ones(1, 2, 1), None, "come together"),
    ]
    for xq, qweight, w_scale, x_scale, modality, x_split, w_split, text in cases:
        with pytest.raises(UsageError, match=text):
            OPS.linear_w8a8(xq, qweight, w_scale, x_scale, modality, None, x_split, w_split)
    with pytest.raises(UsageError, match="does not hold 6"):
        OPS.linear_w4a8(
            x, torch.zeros(4, 4, dtype=torch.uint8), torch.ones(4), one, None, None, None, None
        )


def test_one_scale_serves_all_modalities() -> None:
    data = rng_tensors(1, 1, 4, 6, 3, 8)
    xq, q = torch.from_numpy(data["xq"]), torch.from_numpy(data["q"])
    mask = torch.tensor([[True, False, True, False]])
    with_mask = OPS.linear_w8a8(xq, q, torch.ones(3), torch.ones(1), mask, None, None, None)
    without = OPS.linear_w8a8(xq, q, torch.ones(3), torch.ones(1), None, None, None, None)
    assert torch.equal(with_mask, without)
