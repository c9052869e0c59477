"""The fused row kernels on the emulator: norm, activation with Hadamard, against torch.

Float results agree up to the order of sums; integers are exactly those of the float result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mqc.cuda.library import Activation, ActivationArgs, DType, KernelError, Modality, NormArgs
from mqc.cuda.pack import hadamard_table
from mqc.numerics.hadamard import apply_hadamard

TORCH = {DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32}
ACTIVATIONS = {
    Activation.IDENTITY: lambda x: x,
    Activation.SILU: torch.nn.functional.silu,
    Activation.GELU: torch.nn.functional.gelu,
    Activation.GELU_TANH: lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    Activation.RELU: torch.relu,
    Activation.QUICK_GELU: lambda x: x * torch.sigmoid(1.702 * x),
}


def ulps(dtype: torch.dtype) -> float:
    return {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-6}[dtype]


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize(("rows", "columns", "pad"), [(3, 320, 0), (2, 77, 3), (1, 3584, 16)])
@pytest.mark.parametrize("modality", [Modality.NONE, Modality.COUNT])
def test_norm(
    emulated: Any, dtype: DType, rows: int, columns: int, pad: int, modality: Modality
) -> None:
    emulated.configure(seed=rows)
    generator = torch.Generator().manual_seed(columns)
    x = (torch.randn(rows, columns + pad, generator=generator) * 3).to(TORCH[dtype])
    scale = torch.tensor([0.021, 0.034])
    count = torch.tensor([rows // 2])
    xq = torch.full((rows, columns + pad), 99, dtype=torch.int8)
    h = torch.full((rows, columns + pad), 7.0, dtype=TORCH[dtype])
    arguments = NormArgs(
        dtype=dtype,
        modality_kind=modality,
        eps=1e-6,
        rows=rows,
        columns=columns,
        rows_per_sequence=rows,
        x_stride=columns + pad,
        xq_stride=columns + pad,
        h_stride=columns + pad,
        x=x.data_ptr(),
        scale=scale.data_ptr(),
        modality=count.data_ptr() if modality else None,
        xq=xq.data_ptr(),
        h=h.data_ptr(),
    )
    emulated.launch("rms_norm_quantize", arguments)
    want = torch.rms_norm(x[:, :columns].float(), [columns], None, 1e-6).to(TORCH[dtype])
    torch.testing.assert_close(h[:, :columns], want, rtol=ulps(TORCH[dtype]), atol=1e-6)
    visual = (torch.arange(rows) < count[0]) & bool(modality)
    steps = h[:, :columns].float() / torch.where(visual, scale[1], scale[0])[:, None]
    assert torch.equal(xq[:, :columns], torch.round(steps).clamp(-127, 127).to(torch.int8))
    assert bool((xq[:, columns:] == 99).all()) and bool((h[:, columns:] == 7).all())


def run_activation(
    library: Any,
    dtype: DType,
    rows: int,
    columns: int,
    *,
    activation: Activation = Activation.IDENTITY,
    gated: bool = False,
    base: int = 1,
    log2: int = 0,
    split: tuple[int, ...] = (),
    quantized: bool = True,
    pad: int = 0,
) -> None:
    torch_dtype = TORCH[dtype]
    generator = torch.Generator().manual_seed(columns + base)
    width = columns * 2 if gated else columns
    x = (torch.randn(rows, width + pad, generator=generator) * 2).to(torch_dtype)
    scale = torch.tensor([0.043, 0.029])
    mask = torch.randint(0, 2, (rows,), generator=generator, dtype=torch.uint8)
    table = hadamard_table(base) if base > 1 else None
    indices = torch.tensor(split or [0], dtype=torch.int32)
    xq = torch.full((rows, columns + pad), 99, dtype=torch.int8)
    y = torch.full((rows, columns + pad), 7.0, dtype=torch_dtype)
    x_split = torch.full((rows, len(split) + 1), 7.0, dtype=torch_dtype)
    library.launch(
        "activation_quantize",
        ActivationArgs(
            dtype=dtype,
            modality_kind=Modality.MASK,
            activation=activation,
            gated=int(gated),
            hadamard_base=base,
            hadamard_log2=log2,
            split_columns=len(split),
            rows=rows,
            columns=columns,
            x_stride=width + pad,
            xq_stride=columns + pad,
            y_stride=columns + pad,
            x_split_stride=len(split) + 1,
            x=x.data_ptr(),
            scale=scale.data_ptr(),
            modality=mask.data_ptr(),
            hadamard=None if table is None else table.data_ptr(),
            split=indices.data_ptr(),
            xq=xq.data_ptr() if quantized else None,
            y=y.data_ptr(),
            x_split=x_split.data_ptr(),
        ),
    )
    act = ACTIVATIONS[activation]
    want = act(x[:, :columns].float()).to(torch_dtype)
    if gated:
        want = want * x[:, columns : 2 * columns]
    block = base << log2
    if block > 1:
        want = apply_hadamard(want, block)
    got = y[:, :columns]
    # A transform adds `block` terms: errors scale with the row's size, not the value's.
    size = float(want.float().abs().max())
    torch.testing.assert_close(
        got, want, rtol=2 * ulps(torch_dtype), atol=size * ulps(torch_dtype) / 2
    )
    if quantized:
        steps = got.float() / scale[mask.long()][:, None]
        assert torch.equal(xq[:, :columns], torch.round(steps).clamp(-127, 127).to(torch.int8))
    assert torch.equal(x_split[:, : len(split)], got[:, list(split)])
    assert bool((x_split[:, len(split) :] == 7).all())
    assert bool((xq[:, columns:] == 99).all()) and bool((y[:, columns:] == 7).all())


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("dtype", list(TORCH))
def test_activations(emulated: Any, activation: Activation, dtype: DType) -> None:
    emulated.configure(seed=activation)
    run_activation(emulated, dtype, 3, 264, activation=activation, gated=True, split=(5,))
    run_activation(emulated, dtype, 2, 75, activation=activation, pad=1)


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize(
    ("columns", "base", "log2"),
    [
        (66, 1, 1),
        (64, 1, 6),
        (384, 1, 7),
        (1024, 1, 8),
        (8192, 1, 13),
        (24, 12, 1),
        (240, 12, 2),
        (640, 20, 5),
        (896, 28, 5),
        (7168, 28, 8),
        (1216, 76, 4),
        (8960, 140, 6),
        (2368, 148, 4),
        (296, 148, 0),
    ],
)
def test_hadamard(emulated: Any, dtype: DType, columns: int, base: int, log2: int) -> None:
    emulated.configure(seed=columns)
    run_activation(emulated, dtype, 2, columns, base=base, log2=log2, split=(0, columns - 1))


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
@pytest.mark.parametrize(("columns", "log2"), [(11008, 5), (344, 0)])
def test_hadamard_of_a_large_factor(emulated: Any, dtype: DType, columns: int, log2: int) -> None:
    """Half types keep factors up to order 352 in registers: 11008 inputs of 7B language models."""
    emulated.configure(seed=columns)
    run_activation(emulated, dtype, 1, columns, base=344, log2=log2, split=(0, columns - 1))


def test_down_projection_of_qwen2_vl_7b(emulated: Any) -> None:
    emulated.configure(seed=7)
    run_activation(
        emulated, DType.BF16, 1, 18944, activation=Activation.SILU, gated=True, base=148, log2=7
    )


def test_transform_without_quantization(emulated: Any) -> None:
    emulated.configure(seed=2)
    run_activation(emulated, DType.F16, 2, 640, base=20, log2=5, quantized=False)


def test_a_single_input_spreads_exactly(emulated: Any) -> None:
    """One non-zero input: the output is a column of the matrix, bit for bit."""
    emulated.configure(seed=3)
    block = 148 * 16
    for index in (0, 1, 17, block - 1):
        x = torch.zeros(1, block, dtype=torch.float32)
        x[0, index] = 1.0
        y = torch.empty_like(x)
        table = hadamard_table(148)
        emulated.launch(
            "activation_quantize",
            ActivationArgs(
                dtype=DType.F32,
                hadamard_base=148,
                hadamard_log2=4,
                rows=1,
                columns=block,
                x_stride=block,
                y_stride=block,
                x=x.data_ptr(),
                y=y.data_ptr(),
                hadamard=table.data_ptr(),
            ),
        )
        want = apply_hadamard(x, block)
        assert np.array_equal(y.numpy(), want.numpy())


def test_bad_arguments_are_refused(emulated: Any) -> None:
    x = torch.zeros(1, 64)
    given = {"dtype": DType.F32, "rows": 1, "columns": 64, "x_stride": 64, "y_stride": 64}
    given |= {"x": x.data_ptr(), "y": x.data_ptr(), "hadamard_base": 1}

    def refused(match: str, **fields: Any) -> None:
        with pytest.raises(KernelError, match=match):
            emulated.launch("activation_quantize", ActivationArgs(**(given | fields)))

    refused("do not divide", hadamard_log2=7)
    refused("sign table", hadamard_base=4)
    refused("unknown", activation=9)
    refused("both xq and y", y=None)
    refused("split columns need", split_columns=1)
    refused("order 924", hadamard_base=924, columns=924, x_stride=924, y_stride=924, hadamard=1)
    with pytest.raises(KernelError, match="at most 16384"):
        emulated.launch("rms_norm_quantize", NormArgs(rows=1, columns=20000))
