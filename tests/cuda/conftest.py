"""Fixture of the emulated kernel library."""

from __future__ import annotations

import pytest
from cuda_emulator import Emulated, compile_emulated


@pytest.fixture(scope="session")
def emulated() -> Emulated:
    """The C ABI over emulated kernels; pointers are host pointers."""
    return Emulated(compile_emulated())
