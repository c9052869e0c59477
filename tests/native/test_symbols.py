"""What the operator library shows to programs that load it."""

from __future__ import annotations

import shutil
import subprocess

import pytest
from native_library import LIBRARY, needs_library


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="no binutils")
def test_only_the_c_interface_is_exported() -> None:
    """The C++ runtime is linked in: seen from outside, it would take the place of the program's."""
    command = ["nm", "-D", "--defined-only", str(LIBRARY)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1] for line in text.splitlines()}
    assert {"RegisterCustomOps", "mqc_linear", "mqc_attention_in_place"} <= names
    assert not {name for name in names if not name.startswith("mqc_")} - {"RegisterCustomOps"}
