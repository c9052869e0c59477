"""mqc_linear on rows of half types, on the emulator: integers as floats bit for bit, real values
against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cuda_linear import TORCH, Case
from guarded_memory import guarded

from mqc.cuda.library import DType, KernelError, LinearArgs, LinearKernel, UnsupportedError
from mqc.cuda.pack import Layout, layout_for, unpack_scales, unpack_weight

HALF = (DType.BF16, DType.F16)
MMA = [LinearKernel.MMA_8, LinearKernel.MMA_16, LinearKernel.MMA_64, LinearKernel.MMA_128]


@pytest.mark.parametrize("floats", HALF)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kernel", MMA)
def test_shapes(emulated: Any, kernel: LinearKernel, bits: int, floats: DType) -> None:
    """Odd sizes with every operand but the float columns; all channels and inputs, in float32."""
    tokens = 8 << (kernel - 1)
    emulated.configure(seed=kernel * 10 + bits, arch=80)
    rows = {8: 3, 16: 16, 64: 67, 128: 130}[tokens]
    given = {"bits": bits, "floats": floats}
    case = Case(rows, 72, 300, **given, dtype=floats, bias=True, residual=True)
    case.run(emulated, kernel, split_k=2)
    Case(min(tokens, 20), 64, 520, **given, dtype=DType.F32).run(emulated, kernel, split_k=1)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kernel", MMA)
def test_groups(emulated: Any, kernel: LinearKernel, group: int) -> None:
    emulated.configure(seed=kernel * 10 + group)
    rows, floats = min(8 << (kernel - 1), 40) - 3, HALF[kernel % 2]
    given = {"group": group, "floats": floats, "bias": True}
    Case(rows, 136, 384 + group, **given, dtype=floats).run(emulated, kernel, split_k=2)
    eight = Case(5, 72, 256 + group, **given, bits=8, dtype=DType.F32, residual=True)
    eight.run(emulated, kernel, split_k=1)


@pytest.mark.parametrize("floats", HALF)
def test_extremes(emulated: Any, floats: DType) -> None:
    emulated.configure(seed=floats, arch=80)
    for bits, k in ((4, 9000), (8, 1000)):
        case = Case(1, 64, k, bits=bits, extreme=True, floats=floats, dtype=DType.F32)
        case.run(emulated, LinearKernel.MMA_8, split_k=3)


@pytest.mark.parametrize("asynchrony", [0, 1, 2])
def test_schedules(emulated: Any, asynchrony: int) -> None:
    for seed, kernel in enumerate((LinearKernel.MMA_8, LinearKernel.MMA_64, LinearKernel.MMA_128)):
        emulated.configure(seed, asynchrony, arch=80)
        case = Case(9, 64, 1408, group=32 * (seed % 2), floats=DType.F16, dtype=DType.F16)
        case.run(emulated, kernel, split_k=seed + 1)


@pytest.mark.parametrize("floats", HALF)
@pytest.mark.parametrize("dtype", ["same", "f32"])
@pytest.mark.parametrize("split", [1, 3])
def test_epilogue(emulated: Any, floats: DType, dtype: str, split: int) -> None:
    emulated.configure(seed=split, arch=80)
    kind = floats if dtype == "same" else DType.F32
    case = Case(6, 37, 90, floats=floats, dtype=kind, bias=True, split=split, residual=True)
    case.run(emulated, LinearKernel.MMA_8, split_k=1, pad=3)


@pytest.mark.parametrize("floats", HALF)
@pytest.mark.parametrize(("bits", "group"), [(4, 0), (4, 128), (8, 0), (8, 32)])
def test_real_values(emulated: Any, bits: int, group: int, floats: DType) -> None:
    """Near the float64 product of the same rows and dequantized weights: weights and products are
    exact, and only sums are rounded, in float32."""
    rng = np.random.default_rng(bits + group)
    emulated.configure(seed=bits + group)
    case = Case(7, 70, 1152, bits=bits, group=group, floats=floats, dtype=DType.F32)
    x = torch.from_numpy(rng.standard_normal((7, 1152)) * np.exp(rng.standard_normal((7, 1152))))
    x = x.to(TORCH[floats])
    case.x[:, :1152] = x
    case.x = guarded(case.x)
    wide = dequantized(case, 1152)
    want, magnitude = x.double() @ wide.T, x.double().abs() @ wide.abs().T
    for kernel in (LinearKernel.MMA_8, LinearKernel.MMA_128):
        y = torch.full((7, 70), torch.nan)
        arguments = case.arguments(y, kernel=kernel, split_k=1)
        emulated.launch("linear", arguments)
        assert bool(((y - want).abs() <= 2.0**-20 * magnitude).all())


def dequantized(case: Case, k: int) -> torch.Tensor:
    """A case's weight with its scales, in float64."""
    n = case.shape[1]
    q = unpack_weight(case.w, case.layout, n, k).double() * case.w_scale.double()[:, None]
    if case.layout.group == 0:
        return q
    scales = unpack_scales(case.w, case.layout, n, k).double()
    return q * scales.repeat_interleave(case.layout.group, dim=1)


def test_choice(emulated: Any) -> None:
    """The smallest shape that holds the rows; where its scales find no room, the next smaller."""
    for rows, arch, layout, wanted in (
        (1, 90, Layout.W4_64X128, LinearKernel.MMA_8),
        (16, 80, Layout.W8_64X128, LinearKernel.MMA_16),
        (17, 90, Layout.W8_64X128_G128, LinearKernel.MMA_64),
        (64, 90, Layout.W4_64X128_G32, LinearKernel.MMA_64),
        (4096, 90, Layout.W4_64X128, LinearKernel.MMA_128),
        (4096, 80, Layout.W8_64X128_G32, LinearKernel.MMA_128),
        (4096, 89, Layout.W8_64X128_G32, LinearKernel.MMA_64),
    ):
        emulated.configure(seed=1, arch=arch, sms=108)
        sizes = {"rows": rows, "n": 3584, "k": 3584, "layout": layout, "x_dtype": DType.BF16}
        chosen, split = emulated.linear_choice(LinearArgs(**sizes))
        assert chosen == wanted
        exact = LinearArgs(**sizes, kernel=chosen, split_k=split)
        whole = emulated.workspace("linear", LinearArgs(**sizes))
        assert whole >= emulated.workspace("linear", exact)
        assert split > 1 or rows > 64


def test_what_is_refused(emulated: Any) -> None:
    emulated.configure(seed=1)
    case = Case(4, 64, 128, floats=DType.BF16)
    y = torch.zeros(4, 64, dtype=torch.bfloat16)

    def refused(match: str, kind: type[KernelError] = KernelError, **fields: Any) -> None:
        arguments = case.arguments(y, kernel=LinearKernel.MMA_8)
        for name, value in fields.items():
            setattr(arguments, name, value)
        with pytest.raises(kind, match=match):
            emulated.launch("linear", arguments)

    refused("x_stride 132 is not a multiple of 8", x_stride=132)
    refused("dtype 2 for rows of dtype 1", dtype=DType.F16)
    refused("no activation scale", x_scale=case.x_scale.data_ptr())
    refused("no activation scale", modality_kind=1)
    for kernel in (LinearKernel.MMA_32, LinearKernel.WGMMA):
        refused(f"kernel {kernel:d} takes rows of int8", UnsupportedError, kernel=kernel)
    emulated.configure(seed=1, arch=89)
    layout = layout_for(8, 32)
    refused("shared memory", UnsupportedError, kernel=LinearKernel.MMA_128, layout=layout)
