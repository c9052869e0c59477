"""The weight-only linear kernels by their C interface, on every instruction set."""

from __future__ import annotations

import ctypes
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

from mqc.backends.onnx.kernels import Kernels, PackedLinear, Shape
from mqc.errors import UsageError
from mqc.numerics.packing import pack_int4

pytestmark = native.needs_library

ISAS = ("portable", "avx2", "avx512vnni")
"""One for each copy of the kernels."""


@pytest.fixture(scope="module")
def library() -> Iterator[Kernels]:
    yield from native.open_kernels()


@pytest.fixture(params=ISAS, scope="module")
def kernels(request: pytest.FixtureRequest, library: Kernels) -> Kernels:
    return native.on_isa(library, request.param)


def pack(kernels: Kernels, q: Array, w_scale: Array, bits: int) -> PackedLinear:
    stored = pack_int4(torch.from_numpy(q)).numpy() if bits == 4 else q
    return kernels.pack(stored, w_scale, q.shape[1])


def reference(q: Array, x: Array, w_scale: Array, terms: dict[str, Array]) -> tuple[Array, Array]:
    """The result in float64, and for each value the sum of its terms' magnitudes."""
    n, k = q.shape
    w = (q.reshape(n, w_scale.shape[1], -1) * w_scale.astype(np.float64)[:, :, None]).reshape(n, k)
    pairs = [(x, w)]
    if "x_split" in terms:
        pairs.append((terms["x_split"], terms["w_split"]))
    added = [terms[name].astype(np.float64) for name in ("bias", "residual") if name in terms]
    y = sum(a.astype(np.float64) @ b.astype(np.float64).T for a, b in pairs) + sum(added)
    size = sum(np.abs(a).astype(np.float64) @ np.abs(b).T for a, b in pairs)
    return y, size + sum(map(np.abs, added))


def close(y: Array, want: tuple[Array, Array]) -> bool:
    """Each value within 2e-6 of its terms, and all within 1e-5 of the largest."""
    exact, size = want
    error = np.abs(y - exact)
    whole = error.max(initial=0) <= 1e-5 * max(np.abs(exact).max(initial=0), 1e-30)
    return bool((error <= 2e-6 * size).all() and (whole or y.size < 8))


@pytest.mark.parametrize("m", [1, 2, 3, 8, 9, 16, 17, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows(kernels: Kernels, bits: int, m: int) -> None:
    """As exact as float32 sums are, and the same on one thread and on two."""
    rng = np.random.default_rng(m)
    for n, k, groups in [(83, 416, [1, 13][m % 2]), (40, 1176, 1)]:
        q = random_weights(rng, n, k, bits)
        w_scale = (rng.random((n, groups)) + 0.01).astype(np.float32)
        linear = pack(kernels, q, w_scale, bits)
        # a large mean: what cancels must not cost digits
        x = (rng.standard_normal((m, k)) + (m % 3)).astype(np.float32)
        results = []
        for threads in (1, 2):
            y, raw = guarded((m, n))
            kernels.run(kernels.float_call(linear, x, y), kernels.threads(threads))
            assert intact(raw)
            assert close(y, reference(q, x, w_scale, {}))
            results.append(y)
        assert np.array_equal(*results)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([4, 8]),
    m=st.integers(1, 40),
    n=st.integers(1, 100),
    size=st.one_of(st.integers(1, 40), st.sampled_from([32, 64, 128, 200])),
    groups=st.integers(1, 5),
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
    terms: set[str],
    rank: int,
    threads: int,
    workspace: bool,
) -> None:
    rng = np.random.default_rng(seed)
    q = random_weights(rng, n, size * groups, bits)
    x = rng.standard_normal((m, size * groups)).astype(np.float32)
    w_scale = (rng.random((n, groups)) + 0.01).astype(np.float32)
    out = random_output(kernels, rng, (m, n), rank, terms)
    want = reference(q, x, w_scale, out.terms)
    call = kernels.float_call(pack(kernels, q, w_scale, bits), x, out.y, **out.passed)
    run_watched(kernels, call, out.raw, threads, workspace)
    assert close(out.y, want)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_weight(kernels: Kernels, bits: int) -> None:
    """All values of a weight at every place of a step come out exactly."""
    low, count = (-8, 16) if bits == 4 else (-128, 256)
    q = ((5 * np.arange(count)[:, None] + 3 * np.arange(8)) % count + low).astype(np.int8)
    assert all(len(set(q[:, i])) == count for i in range(8))
    linear = pack(kernels, q, np.ones((count, 1), np.float32), bits)
    for repeats in (1, 2):  # in registers, and by way of a panel
        x = np.tile(np.eye(8, dtype=np.float32), (repeats, 1))
        y = np.empty((len(x), count), np.float32)
        kernels.run(kernels.float_call(linear, x, y), kernels.threads(1))
        assert np.array_equal(y, np.tile(q.T.astype(np.float32), (repeats, 1)))


@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_end_with_their_memory(kernels: Kernels, bits: int, m: int) -> None:
    """Weights of a mapped file have no room behind them: a read past the last block faults."""
    rng = np.random.default_rng(m)
    for n, k, groups in [(1, 8, 1), (17, 24, 3), (83, 416, 13), (96, 1176, 1)]:
        q, w_scale = random_weights(rng, n, k, bits), np.ones((n, groups), np.float32)
        linear = pack(kernels, q, w_scale, bits)
        end = guarded_memory.guarded(torch.from_numpy(linear.weight))
        assert end is not None
        at_end = PackedLinear(linear.shape, end.numpy(), linear.w_scale)
        x, y = rng.standard_normal((m, k)).astype(np.float32), np.empty((m, n), np.float32)
        kernels.run(kernels.float_call(at_end, x, y), kernels.threads(1))
        assert close(y, reference(q, x, w_scale, {}))


def test_refusals(library: Kernels) -> None:
    """Arguments that do not fit each other give a status, and the output is left alone."""
    linear = library.pack(np.ones((16, 64), np.int8), np.ones((16, 1), np.float32), 64)
    x = np.zeros((4, 64), np.float32)
    y, _ = guarded((4, 16))

    def refused(text: str, **changes: Any) -> None:
        call = library.float_call(linear, x, y)
        for name, value in changes.items():
            setattr(call.shape if hasattr(call.shape, name) else call, name, value)
        with pytest.raises(UsageError, match=text):
            library.run(call, library.threads(1))
        assert np.isnan(y).all()

    for name in ("packed", "w_scale", "x", "y"):
        refused("pointer", **{name: None})
    for name, value in [("n", 0), ("k", 0), ("k", 131072), ("groups", 0), ("groups", 3)]:
        refused("sizes", **{name: value})
    refused("sizes", m=-1)
    refused("sizes", split=-1)
    refused("pointer", split=1)
    refused("layout", bits=3)
    library.run(library.float_call(linear, x[:0], y), library.threads(2))
    assert np.isnan(y).all()
    assert library.library.mqc_float_linear(None, None) < 0
    bad = Shape(0, 1, 1, 4, 1)
    assert library.library.mqc_linear_packed_bytes(ctypes.byref(bad)) < 0
