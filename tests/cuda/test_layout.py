"""Packing in Python and the index maps of the kernels (C++) are inverse to each other."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mqc.cuda.pack import (
    Layout,
    hadamard_table,
    layout_for,
    pack_linear,
    pack_weight,
    unpack_scales,
    unpack_weight,
)
from mqc.errors import UsageError
from mqc.numerics.hadamard import hadamard_matrix
from mqc.numerics.packing import pack_int4


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def random_weight(seed: int, n: int, k: int, bits: int) -> torch.Tensor:
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(low, high, (n, k), dtype=np.int8))


def random_scales(seed: int, n: int, k: int, layout: Layout) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, k // layout.group, generator=generator) if layout.group else None


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize(("n", "k"), [(64, 128), (1, 1), (65, 130), (200, 384), (128, 33)])
def test_kernels_read_what_was_packed(emulated: Any, layout: Layout, n: int, k: int) -> None:
    k = -(-k // layout.group) * layout.group if layout.group else k
    q, scales = random_weight(n + k, n, k, layout.bits), random_scales(n, n, k, layout)
    packed = pack_weight(q, layout, scales)
    assert packed.dtype == torch.uint8 and packed.numel() == layout.nbytes(n, k)
    rows, columns = -(-n // 64) * 64, -(-k // 128) * 128
    out = np.full((rows, columns), 99, dtype=np.int8)
    read = np.zeros((rows, columns), dtype=np.float32)
    source = pointer(packed.numpy())
    emulated.native.test_unpack(int(layout), source, n, k, pointer(out), pointer(read))
    want = np.zeros((rows, columns), dtype=np.int64)
    want[:n, :k] = q.numpy().astype(np.int64) * (16 if layout.bits == 4 else 1)
    assert np.array_equal(out, want)
    if scales is not None:
        spread = scales.repeat_interleave(layout.group, dim=1).numpy()
        assert np.array_equal(read[:n, :k], spread)
        assert not read[n:].any() and not read[:, k:].any()


@pytest.mark.parametrize("half", ["bf16", "f16"])
@pytest.mark.parametrize("layout", [Layout.W4_64X128, Layout.W4_64X128_G32, Layout.W8_64X128])
def test_half_values_are_the_integers(emulated: Any, layout: Layout, half: str) -> None:
    """Every value in every place of a tile, as the product of 16 inputs gets it."""
    n, k, (low, high) = 130, 320, (-8, 7) if layout.bits == 4 else (-127, 127)
    out = np.full((192, 384), np.nan, dtype=np.float32)
    for shift in range(0, high - low + 1, 1 if layout.bits == 4 else 37):
        q = torch.arange(n * k).add(shift).remainder(high - low + 1).add(low).reshape(n, k)
        packed = pack_weight(q.to(torch.int8), layout, random_scales(n, n, k, layout))
        source = pointer(packed.numpy())
        emulated.native.test_unpack_pairs(int(layout), half == "bf16", source, n, k, pointer(out))
        want = np.zeros_like(out)
        want[:n, :k] = q.numpy()
        assert np.array_equal(out.view(np.int32), want.view(np.int32))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    layout=st.sampled_from(list(Layout)),
)
def test_round_trip(seed: int, n: int, k: int, layout: Layout) -> None:
    k = -(-k // layout.group) * layout.group if layout.group else k
    q, scales = random_weight(seed, n, k, layout.bits), random_scales(seed, n, k, layout)
    packed = pack_weight(q, layout, scales)
    assert torch.equal(unpack_weight(packed, layout, n, k), q)
    if scales is not None:
        assert torch.equal(unpack_scales(packed, layout, n, k), scales)


def test_groups_are_stored_in_parts_that_a_layout_has() -> None:
    wanted = {32: 32, 64: 64, 128: 128, 256: 128, 192: 64, 96: 32}
    assert {group: layout_for(4, group).group for group in wanted} == wanted
    assert {group: layout_for(8, group).group for group in wanted} == {
        group: 128 if part == 128 else 32 for group, part in wanted.items()
    }
    assert layout_for(4, 16) is layout_for(4, 48) is layout_for(8, 16) is None
    q, scales = random_weight(1, 70, 384, 4), torch.rand(70, 2)
    packed, layout = pack_linear(pack_int4(q), 384, scales)
    assert layout is Layout.W4_64X128_G64 and torch.equal(unpack_weight(packed, layout, 70, 384), q)
    assert torch.equal(unpack_scales(packed, layout, 70, 384), scales.repeat_interleave(3, dim=1))


def test_stored_weights_are_packed_by_their_dtype() -> None:
    q = random_weight(1, 70, 33, 4)
    packed, layout = pack_linear(pack_int4(q), 33)
    assert layout is Layout.W4_64X128 and torch.equal(unpack_weight(packed, layout, 70, 33), q)
    packed, layout = pack_linear(q, 33)
    assert layout is Layout.W8_64X128 and torch.equal(unpack_weight(packed, layout, 70, 33), q)


def test_what_does_not_fit_is_refused() -> None:
    q = torch.full((64, 128), 8, dtype=torch.int8)
    with pytest.raises(UsageError, match=r"\[-8, 7\]"):
        pack_weight(q, Layout.W4_64X128)
    with pytest.raises(UsageError, match="int8"):
        pack_weight(q.float(), Layout.W8_64X128)
    four = torch.zeros(64, 128, dtype=torch.int8)
    with pytest.raises(UsageError, match="do not go together"):
        pack_weight(four, Layout.W4_64X128_G64)
    with pytest.raises(UsageError, match="do not fit"):
        pack_weight(four, Layout.W4_64X128_G64, torch.ones(64, 3))
    with pytest.raises(UsageError, match="scales of 16 inputs"):
        pack_linear(pack_int4(four), 128, torch.ones(64, 8))
    with pytest.raises(UsageError, match="8192 bytes"):
        unpack_weight(torch.zeros(1, dtype=torch.uint8), Layout.W8_64X128, 64, 128)


@pytest.mark.parametrize("base", [12, 20, 28, 140, 148, 924])
def test_hadamard_signs(emulated: Any, base: int) -> None:
    table = hadamard_table(base)
    signs = np.zeros((base, base), dtype=np.int8)
    emulated.native.test_hadamard_signs(pointer(table.numpy()), base, pointer(signs))
    assert np.array_equal(signs, hadamard_matrix(base).numpy())


@pytest.mark.parametrize(
    ("channels", "tokens", "band"), [(14, 8, 8), (3, 21, 8), (1, 1, 8), (5, 9, 4)]
)
def test_tile_order_visits_each_tile_once(
    emulated: Any, channels: int, tokens: int, band: int
) -> None:
    seen = set()
    out = (ctypes.c_int * 2)()
    for index in range(channels * tokens):
        emulated.native.test_tile_order(index, channels, tokens, band, out)
        assert 0 <= out[0] < channels and 0 <= out[1] < tokens
        seen.add((out[0], out[1]))
    assert len(seen) == channels * tokens


def test_swizzle_is_tma_s_and_free_of_bank_conflicts(emulated: Any) -> None:
    for row in range(16):
        for chunk in range(8):
            linear = row * 128 + chunk * 16
            # TMA's 128-byte swizzle exchanges address bits 4..6 by bits 7..9.
            assert emulated.native.test_swizzled_chunk(row, chunk) == linear ^ (
                (linear >> 3) & 0x70
            )
    for chunk in range(8):
        banks = {emulated.native.test_swizzled_chunk(row, chunk) // 16 % 8 for row in range(8)}
        assert len(banks) == 8


def test_swizzle_of_half_rows_is_free_of_bank_conflicts(emulated: Any) -> None:
    """Half a warp reads 8 bytes a lane at once: of four rows, 32 bytes each."""
    place = emulated.native.test_swizzled_half_chunk
    assert len({place(row, chunk) for row in range(8) for chunk in range(16)}) == 128
    for step in range(8):
        for rows in (range(4), range(4, 8)):
            lanes = [(row, lane) for row in rows for lane in range(4)]
            words = [place(row, 2 * step + lane // 2) // 8 + lane % 2 for row, lane in lanes]
            assert len({word % 16 for word in words}) == 16


def test_quantization_is_the_reference_s(emulated: Any) -> None:
    import mqc.ops  # noqa: F401

    rng = np.random.default_rng(3)
    x = np.concatenate(
        [
            rng.standard_normal(4000).astype(np.float32) * 3,
            np.arange(-140, 141, dtype=np.float32) * np.float32(0.25),  # ties
            np.array([np.inf, -np.inf, 3e38, -3e38, 0.0, -0.0], dtype=np.float32),
        ]
    )
    for scale in (0.25, 0.0173, 1.0):
        q = np.zeros(x.size, dtype=np.int8)
        emulated.native.test_quantize(pointer(x), x.size, ctypes.c_float(scale), pointer(q))
        want = torch.ops.mqc.quantize_static(
            torch.from_numpy(x), torch.tensor([scale], dtype=torch.float32), None
        )
        assert np.array_equal(q, want.numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_round_as_torch(emulated: Any, dtype: torch.dtype) -> None:
    bits = np.random.default_rng(5).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    edges = np.array(
        [65504, 65519.99, 65520, 6.1e-5, 5.96e-8, 2.98e-8, 0, -0.0, np.inf], np.float32
    )
    x = np.concatenate([bits.view(np.float32), edges, -edges])
    x = x[~np.isnan(x)]
    out, back = np.zeros(x.size, dtype=np.uint16), np.zeros(x.size, dtype=np.float32)
    emulated.native.test_round(
        pointer(x), x.size, dtype == torch.bfloat16, pointer(out), pointer(back)
    )
    want = torch.from_numpy(x).to(dtype)
    assert np.array_equal(out.view(np.int16), want.view(torch.int16).numpy())
    assert np.array_equal(back, want.float().numpy())
