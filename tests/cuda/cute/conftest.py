"""Fixtures of the comparison with NVIDIA's headers."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_vendor import Vendor, compile_witness, find_vendor


@pytest.fixture(scope="session")
def vendor() -> Vendor:
    """The headers; skips where one of them is missing."""
    return find_vendor()


@pytest.fixture(scope="session")
def witness(vendor: Vendor) -> Path:
    """The program whose cases are in this folder."""
    return compile_witness(vendor)
