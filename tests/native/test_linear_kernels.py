"""The linear kernels by their C interface, bit for bit, on every instruction set."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from typing import Any

import guarded_memory
import native_library as native
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linear_cases import Array, guarded, intact, random_output, random_weights, run_watched

from mqc.backends.onnx.kernels import ISAS, Kernels, PackedLinear, Shape
from mqc.errors import UsageError
from mqc.numerics.packing import fits_c16k4, pack_c16k4, pack_int4

pytestmark = native.needs_library


@pytest.fixture(scope="module")
def library() -> Iterator[Kernels]:
    yield from native.open_kernels()


@pytest.fixture(params=ISAS, scope="module")
def kernels(request: pytest.FixtureRequest, library: Kernels) -> Kernels:
    return native.on_isa(library, request.param)


def reference(
    q: Array, x: Array, w_scale: Array, row_scale: Array, terms: dict[str, Array]
) -> Array:
    """Integer products in int64, then float32 in the order of mqc_kernels.h."""
    groups = w_scale.shape[1]
    size = q.shape[1] // groups
    y = np.zeros((len(x), len(q)), np.float32)
    for g in range(groups):
        span = slice(g * size, (g + 1) * size)
        product = x[:, span].astype(np.int64) @ q[:, span].astype(np.int64).T
        assert np.abs(product, out=product.copy()).max(initial=0) < 2**31
        y += product.astype(np.float32) * w_scale[:, g]
    y *= row_scale[:, None]
    if "bias" in terms:
        y = y + terms["bias"]
    if "x_split" in terms:
        parts = [
            terms["x_split"][:, j : j + 1] * terms["w_split"][:, j]
            for j in range(terms["w_split"].shape[1])
        ]
        y = y + list(itertools.accumulate(parts))[-1]
    if "residual" in terms:
        y = y + terms["residual"]
    return y


def pack(kernels: Kernels, q: Array, w_scale: Array, bits: int) -> PackedLinear:
    """Weights int8 [n, k] to the kernels' layout, by C and by Python; the way back is tried too."""
    stored = pack_int4(torch.from_numpy(q)).numpy() if bits == 4 else q
    linear = kernels.pack(stored, w_scale, q.shape[1])
    groups = w_scale.shape[1]
    if fits_c16k4(q.shape[1], groups):
        tiles = pack_c16k4(torch.from_numpy(q), groups, bits)
        assert np.array_equal(tiles.numpy().reshape(-1), linear.weight)
    assert np.array_equal(kernels.unpack(linear), stored)
    return linear


def shifted(x: Array, unsigned: bool) -> Array:
    """Activations as int8, or as uint8 + 128."""
    return (x.astype(np.int16) + 128).astype(np.uint8) if unsigned else x


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("m", [1, 2, 3, 16, 17, 128, 1000])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows(kernels: Kernels, bits: int, m: int, threads: int) -> None:
    rng = np.random.default_rng(m)
    n, k, groups = 83, 416, [1, 13][m % 2]
    q = random_weights(rng, n, k, bits)
    x = rng.integers(-128, 128, (m, k)).astype(np.int8)
    w_scale = (rng.random((n, groups)) + 0.01).astype(np.float32)
    y, raw = guarded((m, n))
    linear = pack(kernels, q, w_scale, bits)
    scale = np.array([0.37], np.float32)
    call = kernels.call(linear, shifted(x, m % 2 == 0), y, x_scale=scale)
    kernels.run(call, kernels.threads(threads))
    assert intact(raw)
    assert np.array_equal(y, reference(q, x, w_scale, np.repeat(scale, m), {}))


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([4, 8]),
    m=st.integers(1, 70),
    n=st.integers(1, 100),
    size=st.one_of(st.integers(1, 40), st.sampled_from([32, 64, 128, 200])),
    groups=st.integers(1, 5),
    unsigned=st.booleans(),
    modality=st.sampled_from(["none", "mask", "count"]),
    terms=st.sets(st.sampled_from(["bias", "split", "residual", "in place"])),
    rank=st.integers(1, 4),
    threads=st.integers(1, 3),
    workspace=st.booleans(),
)
def test_shapes(
    kernels: Kernels,
    seed: int,
    bits: int,
    m: int,
    n: int,
    size: int,
    groups: int,
    unsigned: bool,
    modality: str,
    terms: set[str],
    rank: int,
    threads: int,
    workspace: bool,
) -> None:
    rng = np.random.default_rng(seed)
    k = size * groups
    q = random_weights(rng, n, k, bits)
    x = rng.integers(-128, 128, (m, k)).astype(np.int8)
    w_scale = (rng.random((n, groups)) + 0.01).astype(np.float32)
    x_scale = rng.random(2).astype(np.float32)
    visual, modal = np.zeros(m, bool), None
    if modality == "mask":
        modal = visual = rng.integers(0, 2, m).astype(bool)
    elif modality == "count":
        batch = next(b for b in (3, 2, 1) if m % b == 0)
        modal = rng.integers(-1, m // batch + 2, batch)  # out of range on both sides too
        visual = (np.arange(m // batch) < modal[:, None]).reshape(-1)
    out = random_output(kernels, rng, (m, n), rank, terms)
    want = reference(q, x, w_scale, x_scale[visual.astype(int)], out.terms)
    linear, xq = pack(kernels, q, w_scale, bits), shifted(x, unsigned)
    call = kernels.call(linear, xq, out.y, x_scale=x_scale, modality=modal, **out.passed)
    run_watched(kernels, call, out.raw, threads, workspace)
    assert np.array_equal(out.y, want)


@pytest.mark.parametrize("m", [1, 2, 5, 40])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_end_with_their_memory(kernels: Kernels, bits: int, m: int) -> None:
    """Weights of a mapped file have no room behind them: a read past the last block faults."""
    rng = np.random.default_rng(m)
    for n, k, groups in [(1, 8, 1), (17, 24, 3), (83, 416, 13), (96, 1176, 1), (144, 64, 1)]:
        q = rng.integers(-8, 8, (n, k)).astype(np.int8)
        x = rng.integers(-128, 128, (m, k)).astype(np.int8)
        w_scale = np.ones((n, groups), np.float32)
        linear = pack(kernels, q, w_scale, bits)
        end = guarded_memory.guarded(torch.from_numpy(linear.weight))
        assert end is not None
        at_end = PackedLinear(linear.shape, end.numpy(), linear.w_scale)
        y, scale = np.empty((m, n), np.float32), np.ones(1, np.float32)
        kernels.run(kernels.call(at_end, x, y, x_scale=scale), kernels.threads(1))
        assert np.array_equal(y, reference(q, x, w_scale, np.ones(m, np.float32), {}))


@pytest.mark.parametrize("k", [8960, 29568, 131071])
@pytest.mark.parametrize("m", [1, 3, 33])
@pytest.mark.parametrize("bits", [4, 8])
def test_extremes(kernels: Kernels, bits: int, m: int, k: int) -> None:
    """The largest sums of either sign, also on the way: all intermediate values wrap or fit."""
    low, high = (-8, 7) if bits == 4 else (-128, 127)
    q = np.full((5, k), low, np.int8)
    q[1] = high
    q[2, ::2] = high
    q[3, : k // 2] = high
    x = np.full((m, k), 127, np.int8)
    x[0] = -128
    x[m // 2, k // 2 :] = -128
    ones = np.ones((5, 1), np.float32)
    for unsigned in (False, True):
        y, raw = guarded((m, 5))
        scale = np.ones(1, np.float32)
        linear, xq = pack(kernels, q, ones, bits), shifted(x, unsigned)
        kernels.run(kernels.call(linear, xq, y, x_scale=scale), kernels.threads(1))
        assert intact(raw)
        assert np.array_equal(y, reference(q, x, ones, np.ones(m, np.float32), {}))


def test_refusals(library: Kernels) -> None:
    """Arguments that do not fit each other give a status, and the output is left alone."""
    q = np.ones((16, 64), np.int8)
    linear = library.pack(q, np.ones((16, 1), np.float32), 64)
    x, scale = np.zeros((4, 64), np.int8), np.ones(2, np.float32)
    y, _ = guarded((4, 16))

    def refused(text: str, **changes: Any) -> None:
        call = library.call(linear, x, y, x_scale=scale)
        for name, value in changes.items():
            target = call.shape if hasattr(call.shape, name) else call
            setattr(target, name, value)
        with pytest.raises(UsageError, match=text):
            library.run(call, library.threads(1))
        assert np.isnan(y).all()

    for name in ("packed", "w_scale", "xq", "x_scale", "y"):
        refused("pointer", **{name: None})
    for name, value in [("n", 0), ("n", -5), ("k", 0), ("k", 131072), ("groups", 0), ("groups", 3)]:
        refused("sizes", **{name: value})
    refused("sizes", m=-1)
    refused("sizes", split=-1)
    refused("sizes", modality_form=3)
    refused("sizes", modality_form=2, modality=x.ctypes.data, sequence=0)
    refused("sizes", modality_form=2, modality=x.ctypes.data, sequence=3)
    refused("pointer", modality_form=1)
    refused("pointer", split=1)
    refused("layout", bits=3)
    refused("layout", layout=9)
    empty = library.call(linear, x[:0], y, x_scale=scale)
    library.run(empty, library.threads(2))
    assert np.isnan(y).all()
    assert library.library.mqc_linear(None, None) < 0
    assert library.library.mqc_linear_packed_bytes(ctypes.byref(Shape(0, 1, 1, 4, 1))) < 0
    with pytest.raises(UsageError, match="instruction set"):
        library.isa = "abacus"
