"""What tests of both linears by their C interface share: outputs that are watched, and terms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mqc.backends.onnx.kernels import Call, FloatCall, Kernels, aligned

Array = npt.NDArray[Any]
GUARD = 256
"""Bytes before and behind what a kernel may write."""


def guarded(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """A float32 array of NaN with guard bytes on both sides, and the raw bytes."""
    size = int(np.prod(shape)) * 4
    raw = aligned((size + 2 * GUARD,), np.uint8)
    raw[:] = 0xA5
    y = raw[GUARD : GUARD + size].view(np.float32).reshape(shape)
    y[:] = np.nan
    return y, raw


def intact(raw: Array) -> bool:
    """The guard bytes are as they were."""
    return bool((raw[:GUARD] == 0xA5).all() and (raw[-GUARD:] == 0xA5).all())


def random_weights(rng: np.random.Generator, n: int, k: int, bits: int) -> Array:
    """int8 [n, k], of every value that so many bits have."""
    return rng.integers(*((-8, 8) if bits == 4 else (-128, 128)), (n, k)).astype(np.int8)


@dataclass
class Output:
    """y [m, n] of a call, watched, and the terms beside the product."""

    y: Array
    raw: Array
    terms: dict[str, Array]
    """As a reference reads them."""
    passed: dict[str, Array | None]
    """As the kernels read them."""


def random_output(
    kernels: Kernels, rng: np.random.Generator, shape: tuple[int, int], rank: int, wanted: set[str]
) -> Output:
    """Terms of ``wanted``: bias, split (of ``rank``), residual; "in place": the residual is y."""
    m, n = shape
    terms: dict[str, Array] = {}
    if "bias" in wanted:
        terms["bias"] = rng.standard_normal(n).astype(np.float32)
    if "split" in wanted:
        terms["x_split"] = rng.standard_normal((m, rank)).astype(np.float32)
        terms["w_split"] = rng.standard_normal((n, rank)).astype(np.float32)
    y, raw = guarded(shape)
    if "residual" in wanted:
        terms["residual"] = rng.standard_normal(shape).astype(np.float32)
    passed: dict[str, Array | None] = dict(terms)
    if "split" in wanted:
        passed["w_split"] = kernels.columns(terms["w_split"])
    if "residual" in wanted and "in place" in wanted:
        y[:] = terms["residual"]
        passed["residual"] = y
    return Output(y, raw, terms, passed)


def run_watched(
    kernels: Kernels, call: Call | FloatCall, raw: Array, threads: int, workspace: bool
) -> None:
    """Run a call; with ``workspace`` in memory at an odd address, of the size that it asks for."""
    if workspace:
        need = kernels.workspace_bytes(call, threads)
        memory = aligned((need + GUARD + 1,), np.uint8)[1:]
        memory[:] = 0x5A
        call.workspace = memory.ctypes.data
    kernels.run(call, kernels.threads(threads))
    assert intact(raw)
    if workspace:
        assert (memory[need:] == 0x5A).all()
