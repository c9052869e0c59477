"""mqc_linear on the emulator, bit for bit against NumPy int64 and float32 in the stated order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cuda_linear import TORCH, Case

from mqc.cuda.library import DType, KernelError, LinearArgs, LinearKernel
from mqc.cuda.pack import layout_for

MMA = [
    LinearKernel.MMA_8,
    LinearKernel.MMA_16,
    LinearKernel.MMA_32,
    LinearKernel.MMA_64,
    LinearKernel.MMA_128,
]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kernel", MMA)
def test_mma_shapes(emulated: Any, kernel: LinearKernel, bits: int) -> None:
    tokens = 8 << (kernel - 1)
    emulated.configure(seed=kernel * 10 + bits, arch=80)
    rows = {8: 3, 16: 16, 32: 27}.get(tokens, tokens + 3 if tokens < 128 else 130)
    Case(rows, 72, 300, bits=bits, bias=True, residual=True).run(emulated, kernel, split_k=2)
    Case(tokens, 64, 640, bits=bits, dtype=DType.F32).run(emulated, kernel, split_k=1)


@pytest.mark.parametrize("asynchrony", [0, 1, 2])
def test_schedules(emulated: Any, asynchrony: int) -> None:
    for seed in range(4):
        emulated.configure(seed, asynchrony, arch=80)
        Case(9, 64, 1500, seed=seed).run(emulated, LinearKernel.MMA_16, split_k=seed + 1)


@pytest.mark.parametrize("modality", ["mask", "count"])
@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("split", [1, 3])
def test_epilogue(emulated: Any, modality: str, dtype: DType, split: int) -> None:
    emulated.configure(seed=split, arch=80)
    case = Case(6, 37, 90, dtype=dtype, modality=modality, bias=True, split=split, residual=True)
    case.run(emulated, LinearKernel.MMA_8, split_k=1, pad=3)


@pytest.mark.parametrize("bits", [4, 8])
def test_extremes(emulated: Any, bits: int) -> None:
    emulated.configure(seed=bits, arch=80)
    Case(1, 64, 18944, bits=bits, extreme=True, dtype=DType.F32).run(
        emulated, LinearKernel.MMA_8, split_k=5
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asynchrony", [0, 1, 2])
def test_wgmma(emulated: Any, bits: int, asynchrony: int) -> None:
    emulated.configure(seed=bits + asynchrony, asynchrony=asynchrony, sms=2)
    Case(140, 328, 1000, bits=bits, bias=True, residual=True, seed=asynchrony).run(
        emulated, LinearKernel.WGMMA
    )


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kernel", MMA)
def test_mma_groups(emulated: Any, kernel: LinearKernel, group: int) -> None:
    """A scale for every few inputs: alone, split over blocks, over tiles that k does not fill."""
    tokens = 8 << (kernel - 1)
    emulated.configure(seed=kernel * 10 + group, arch=80)
    rows = min(tokens, 40) - 3
    case = Case(rows, 72, 512 + group, group=group, bias=True, residual=True, modality="mask")
    case.run(emulated, kernel, split_k=2)
    Case(5, 64, 384, group=group, dtype=DType.F32).run(emulated, kernel, split_k=1)
    eight = Case(5, 72, 256 + group, bits=8, group=group, bias=True, residual=True, modality="mask")
    eight.run(emulated, kernel, split_k=1 + kernel % 2)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("asynchrony", [0, 1, 2])
def test_wgmma_groups(emulated: Any, group: int, asynchrony: int) -> None:
    emulated.configure(seed=group + asynchrony, asynchrony=asynchrony, sms=2)
    case = Case(140, 328, 512 + group, group=group, bias=True, residual=True, modality="count")
    case.run(emulated, LinearKernel.WGMMA)
    eight = Case(70, 264, 256 + group, bits=8, group=group, residual=True, modality="mask")
    eight.run(emulated, LinearKernel.WGMMA)


def test_groups_of_extremes(emulated: Any) -> None:
    emulated.configure(seed=3)
    for kernel, bits in itertools.product((LinearKernel.MMA_128, LinearKernel.WGMMA), (4, 8)):
        case = Case(2, 64, 2048, bits=bits, group=128, extreme=True, dtype=DType.F32)
        case.run(emulated, kernel, split_k=1)


@pytest.mark.parametrize("dtype", list(TORCH))
def test_wgmma_epilogue(emulated: Any, dtype: DType) -> None:
    emulated.configure(seed=dtype, sms=3)
    Case(300, 70, 40, dtype=dtype, modality="count", bias=True, split=1, residual=True).run(
        emulated, LinearKernel.WGMMA, pad=3
    )
    Case(100, 264, 300, dtype=dtype, modality="mask", bits=8).run(emulated, LinearKernel.WGMMA)


@pytest.mark.parametrize("seed", range(3))
def test_wgmma_tiles_of_one_block(emulated: Any, seed: int) -> None:
    """A persistent block goes through many short tiles: nothing of one may leak into the next."""
    emulated.configure(seed=seed, sms=1)
    case = Case(520, 320, 130, modality="mask", bias=True, seed=seed)
    case.run(emulated, LinearKernel.WGMMA)


def test_residual_in_place(emulated: Any) -> None:
    emulated.configure(seed=1)
    case = Case(5, 64, 128, residual=True)
    y = case.residual[:, :64].clone()
    arguments = case.arguments(y, kernel=LinearKernel.MMA_8, split_k=1)
    arguments.residual, arguments.residual_stride = y.data_ptr(), y.stride(0)
    emulated.launch("linear", arguments)
    assert torch.equal(y, case.want)


@pytest.mark.parametrize(
    ("rows", "arch", "kernel"),
    [
        (1, 90, LinearKernel.MMA_8),
        (12, 80, LinearKernel.MMA_16),
        (64, 90, LinearKernel.MMA_64),
        (128, 90, LinearKernel.MMA_128),
        (4096, 90, LinearKernel.WGMMA),
        (4096, 80, LinearKernel.MMA_128),
    ],
)
def test_choice(emulated: Any, rows: int, arch: int, kernel: LinearKernel) -> None:
    emulated.configure(seed=1, arch=arch, sms=132)
    arguments = LinearArgs(layout=layout_for(4), rows=rows, n=3584, k=3584)
    chosen, split = emulated.linear_choice(arguments)
    assert chosen == kernel
    # The workspace for "up to rows" holds what this choice needs.
    exact = LinearArgs(layout=1, rows=rows, n=3584, k=3584, kernel=chosen, split_k=split)
    assert emulated.workspace("linear", arguments) >= emulated.workspace("linear", exact)
    if rows <= 64:
        assert split > 1


def test_bad_arguments_are_refused(emulated: Any) -> None:
    emulated.configure(seed=1, arch=80)
    case = Case(4, 64, 128)
    y = torch.zeros(4, 64, dtype=torch.bfloat16)

    def refused(match: str, **fields: Any) -> None:
        arguments = case.arguments(y, kernel=LinearKernel.MMA_8)
        for name, value in fields.items():
            setattr(arguments, name, value)
        with pytest.raises(KernelError, match=match):
            emulated.launch("linear", arguments)

    refused("size is 8", size=8)
    refused("x_stride", x_stride=120)
    refused("16-byte aligned", x=case.x.data_ptr() + 1)
    refused("k is 131073", k=131073)
    refused("layout 8", layout=8)
    refused("x_dtype 3", x_dtype=DType.F32)
    refused("dtype 4", dtype=4)
    refused("y is NULL", y=None)
    refused("y_stride", y_stride=63)
    refused("needs a modality", modality_kind=2)
    refused("come together", split_columns=1)
    refused("wgmma needs", kernel=LinearKernel.WGMMA)
    refused("workspace of", split_k=1000, k=256, x_stride=256)
