"""Fragments, descriptors, swizzles and tensor maps by NVIDIA's CuTe: the kernels' and the
emulator's are the same. Every case of the C++ files here is one test."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CASES = re.findall(
    r"^CASE\((\w+)\)", "".join(p.read_text() for p in sorted(HERE.glob("*.cpp"))), re.MULTILINE
)


@pytest.mark.parametrize("case", CASES)
def test_same_as_cute(witness: Path, case: str) -> None:
    result = subprocess.run([witness, case], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
