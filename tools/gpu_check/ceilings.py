"""What the device reaches with library code: copy, bf16 and int8 products of 8192 cubed."""

from __future__ import annotations

import torch

from tools.gpu_check.common import Recorder, median_seconds


def run(recorder: Recorder) -> None:
    """Measure the three ceilings."""
    if recorder.start("copy"):
        source = torch.randn(2**30, device="cuda")
        target = torch.empty_like(source)
        seconds = median_seconds(lambda: target.copy_(source))
        recorder.add(name="copy", value=2 * source.nbytes / seconds / 1e12, unit="TB/s")
        del source, target
    size = 8192
    if recorder.start("bf16"):
        a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        seconds = median_seconds(lambda: a @ b)
        recorder.add(name="bf16 8192^3", value=2 * size**3 / seconds / 1e12, unit="TFLOP/s")
    if recorder.start("int8"):
        kind = {"device": "cuda", "dtype": torch.int8}
        x = torch.randint(-127, 128, (size, size), **kind)
        w = torch.randint(-127, 128, (size, size), **kind).t()  # column-major, as cuBLAS wants it
        seconds = median_seconds(lambda: torch._int_mm(x, w))
        recorder.add(name="_int_mm 8192^3", value=2 * size**3 / seconds / 1e12, unit="TOPS")
