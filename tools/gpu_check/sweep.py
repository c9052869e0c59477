"""Sweep of the linears over shapes, rows, kernels and optional operands: bit-exact on int8 rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from mqc.cuda.library import Library, LinearKernel, Modality
from tools.gpu_check.common import Recorder, synchronize
from tools.gpu_check.linear_case import LinearCase, Options

# Qwen2-VL-7B: qkv, o, gate and up, down; its vision tower: qkv, proj, fc1, fc2; an odd one.
SHAPES = (
    (4608, 3584),
    (3584, 3584),
    (37888, 3584),
    (3584, 18944),
    (3840, 1280),
    (1280, 1280),
    (5120, 1280),
    (1280, 5120),
    (1000, 1176),
)
ROWS = (1, 3, 16, 64, 128, 1000, 4096)
VARIANTS = (
    Options(),
    Options(bias=True, modality=Modality.MASK, dtype=torch.float16),
    Options(residual=True, split=True, modality=Modality.COUNT),
    Options(bias=True, residual=True, split=True, dtype=torch.float32),
)
GROUPS = (32, 64, 128)
"""Inputs that share a scale; they take turns, and a width that they do not divide goes without."""
INTEGERS = ((4, False, False), (8, False, False), (4, True, False), (8, True, False))
FLOATS = ((4, False, True), (8, False, True), (4, True, True), (8, True, True))
"""Weights: bits, whether in groups, and whether their rows are floats."""
TOKENS = {
    LinearKernel.MMA_8: 8,
    LinearKernel.MMA_16: 16,
    LinearKernel.MMA_32: 32,
    LinearKernel.MMA_64: 64,
    LinearKernel.MMA_128: 128,
}

OF_FLOATS = frozenset(TOKENS) - {LinearKernel.MMA_32}
"""Kernels for rows of floats."""


def kernels_for(
    rows: int, architecture: int, wgmma: bool, floats: bool = False
) -> list[LinearKernel]:
    """Kernels worth checking at a number of rows: AUTO, and those whose tiles fit it."""
    if wgmma:
        return [LinearKernel.WGMMA] if architecture == 90 else []
    found = [k for k, t in TOKENS.items() if t >= rows / 4 and t <= 16 * rows]
    if floats:
        found = [k for k in found if k in OF_FLOATS]
    return [LinearKernel.AUTO, *found]


def run(
    library: Library,
    recorder: Recorder,
    generator: torch.Generator,
    *,
    architecture: int,
    wgmma: bool,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    weights: Sequence[tuple[int, bool, bool]] = INTEGERS,
) -> None:
    """Check every shape, number of rows and kernel; the variants take turns."""
    turn: Iterator[Options] = itertools.cycle(VARIANTS)
    sizes: Iterator[int] = itertools.cycle(GROUPS)
    for (n, k), m, (bits, grouped, floats) in itertools.product(shapes, rows, weights):
        group = next(sizes) if grouped else 0
        if group and k % group:
            continue
        kernels = kernels_for(m, architecture, wgmma, floats)
        options = next(turn)
        for extreme in (False, True) if m <= 16 or wgmma else (False,):
            weight = {"bits": bits, "group": group, "extreme": extreme, "floats": floats}
            chosen = Options(**(vars(options) | weight))
            kind = "extreme" if extreme else "random"
            name = f"{m} x {n} x {k} {chosen.weights} {chosen.dtype} {kind}"
            if not recorder.start(name):
                return
            case = LinearCase(m, n, k, chosen, generator)
            want = case.expected()
            for kernel in kernels:
                splits = (0, 3) if kernel not in (LinearKernel.AUTO, LinearKernel.WGMMA) else (0,)
                for split in splits:
                    recorder.start(f"{name} {kernel.name} split {split}")
                    case.first = ""
                    wrong = case.mismatches(library, kernel, split, want)
                    synchronize(case.device)
                    where = {"first": case.first} if wrong else {}
                    recorder.add(case=name, kernel=kernel.name, split_k=split, wrong=wrong, **where)
