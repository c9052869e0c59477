"""Fixtures of the kernels' tests."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import native_library as native
import numpy as np
import pytest


@pytest.fixture(params=native.ISAS, ids=[copy.decode() for _, copy in native.ISAS])
def lib(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """The library's C functions, on one instruction set after the other."""
    library = native.functions()
    isa, copy = request.param
    before = library.mqc_isa()
    if not library.mqc_isa_supported(isa):
        pytest.skip(f"this processor has no {isa.decode()}")
    assert library.mqc_set_isa(isa) == 0
    assert library.mqc_layers_isa() == copy
    yield library
    assert library.mqc_set_isa(before) == 0


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
