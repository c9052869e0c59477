"""Every kernel as nvcc emits it, on the interpreter: the cases of tests/cuda and their references.

The interpreter also faults on races, values that were never written, accesses outside of the
operands, registers of a wgmma in flight and the like: a right result alone does not pass.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from ptx_interpreter import Interpreted, borrowed, emit_ptx

for _name in ("test_linear", "test_linear_half", "test_rows", "test_cache", "test_gather"):
    for _test, _function in vars(borrowed(_name)).items():
        if _test.startswith("test_") and _test != "test_bad_arguments_are_refused":
            globals()[f"{_test}_{_name.removeprefix('test_')}"] = _function


def test_convert(emulated: Interpreted) -> None:
    """Rows of float32 as float16 and back; beyond the range the largest value, NaN stays."""
    emulated.configure(seed=1)
    rows, width = 2, 4100
    wide = torch.randn(rows, width + 3) * 100
    wide[0, :6] = torch.tensor([1e6, -1e6, float("inf"), float("nan"), 1e-7, 65519.0])
    half = torch.full((rows, width + 5), 7.0, dtype=torch.float16)
    back = torch.full((rows, width + 1), 7.0)
    sizes = {
        wide: (rows - 1) * wide.stride(0) + width,
        half: (rows - 1) * half.stride(0) + width,
        back: (rows - 1) * back.stride(0) + width,
    }
    emulated.name_memory(
        [(t.data_ptr(), n * t.element_size(), t is not wide) for t, n in sizes.items()]
    )

    def convert(name: str, to: torch.Tensor, source: torch.Tensor) -> None:
        places = [ctypes.c_void_p(to.data_ptr()), ctypes.c_int64(to.stride(0))]
        places += [ctypes.c_void_p(source.data_ptr()), ctypes.c_int64(source.stride(0))]
        function = getattr(emulated.native, f"mqc_{name}")
        emulated.check(function(*places, ctypes.c_int64(width), ctypes.c_int64(rows), None))

    convert("rows_to_f16", half, wide)
    convert("rows_to_f32", back, half)
    want = wide[:, :width].clamp(-65504, 65504).half()
    assert torch.equal(half[:, :width].nan_to_num(1.5), want.nan_to_num(1.5))
    assert bool(half[0, 3].isnan()) and bool(back[0, 3].isnan())
    assert torch.equal(back[:, :width].nan_to_num(1.5), want.float().nan_to_num(1.5))
    assert bool((half[:, width:] == 7).all()) and bool((back[:, width:] == 7).all())


def test_no_rounding_is_left_to_ptxas(ptx: Path) -> None:
    """Of "add.f32" without .rn, ptxas may fuse an operand that is such a product: another result
    than the interpreter's. nvcc has fused all that can be, so that none is left."""
    sums = 0
    for file in sorted(ptx.glob("*.ptx")):
        products: set[str] = set()
        for line in map(str.strip, file.read_text().splitlines()):
            if line.startswith("$L") or re.match(r"(@\S+\s+)?bra", line):
                products.clear()
            added = re.match(r"(?:add|sub)\.f32\s+(%f\d+), (\S+), (\S+);", line)
            if added is not None:
                sums += 1
                assert products.isdisjoint(added.groups()[1:]), f"{file.name}: {line}"
            written = re.match(r"\S+\s+(%f\d+),", line)
            if written is not None:
                products.discard(written[1])
            if written is not None and line.startswith("mul.f32"):
                products.add(written[1])
    assert sums > 100


@pytest.mark.slow
@pytest.mark.parametrize("source", ["linear_mma_w4g32", "norm"])
def test_ptx_is_the_same_for_older_devices(ptx: Path, tmp_path: Path, source: str) -> None:
    """What ran here is what sm_80 and sm_89 run, but for wgmma, which they do not have."""
    for architecture in ("80", "89"):
        older = emit_ptx(source, architecture, tmp_path / f"{source}.{architecture}.ptx")
        texts = [
            [line for line in path.read_text().splitlines() if not line.startswith(".target")]
            for path in (ptx / f"{source}.ptx", older)
        ]
        assert texts[0] == texts[1]
