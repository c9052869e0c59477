"""Fixtures of the kernel library over the interpreter of PTX."""

from __future__ import annotations

from pathlib import Path

import pytest
from ptx_interpreter import Interpreted, make_library, make_ptx


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Interpreted:
    """The library with the PTX of all kernels; the name is that of the cases which are borrowed."""
    library = Interpreted(make_library(tmp_path_factory.mktemp("ptx") / "all.so"))
    for file in sorted(make_ptx().glob("*.ptx")):
        library.load(file)
    return library


@pytest.fixture(scope="session")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Interpreted:
    """Another copy of the library, without PTX: for kernels that a test changes."""
    return Interpreted(make_library(tmp_path_factory.mktemp("ptx") / "changed.so"))


@pytest.fixture(scope="session")
def ptx() -> Path:
    """The folder of the PTX."""
    return make_ptx()
