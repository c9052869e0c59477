"""mqc_linear on the emulator, bit for bit against NumPy int64 and float32 in the stated order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from guarded_memory import guarded

from mqc.cuda.library import DType, KernelError, LinearArgs, LinearKernel, Modality
from mqc.cuda.pack import layout_for, pack_weight

TORCH = {DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32}
MMA = [
    LinearKernel.MMA_8,
    LinearKernel.MMA_16,
    LinearKernel.MMA_32,
    LinearKernel.MMA_64,
    LinearKernel.MMA_128,
]


class Case:
    """Random operands of one linear, its expected result, and its call."""

    def __init__(
        self,
        rows: int,
        n: int,
        k: int,
        *,
        bits: int = 4,
        group: int = 0,
        dtype: DType = DType.BF16,
        modality: str | None = None,
        bias: bool = False,
        split: int = 0,
        residual: bool = False,
        extreme: bool = False,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.shape, self.dtype, self.slack = (rows, n, k), dtype, 0.0
        torch_dtype = TORCH[dtype]
        low, high = (-8, 7) if bits == 4 else (-127, 127)
        q = rng.integers(low, high + 1, (n, k), dtype=np.int8)
        self.x_stride = -(-k // 16) * 16 + 16
        x = rng.integers(-127, 128, (rows, self.x_stride), dtype=np.int8)
        if extreme:
            q[:], x[:] = low, -127
        self.layout = layout_for(bits, group)
        groups = rng.uniform(0.5, 2, (n, k // group)).astype(np.float32) if group else None
        factors = None if groups is None else torch.from_numpy(groups)
        self.w = pack_weight(torch.from_numpy(q), self.layout, factors)
        self.x = torch.from_numpy(x)
        self.w_scale = torch.from_numpy(rng.uniform(1e-3, 1e-2, n).astype(np.float32))
        self.x_scale = torch.from_numpy(rng.uniform(1e-2, 1e-1, 2).astype(np.float32))
        self.kind, self.modality, self.per_sequence = Modality.NONE, None, 0
        visual = np.zeros(rows, dtype=np.int64)
        if modality == "mask":
            visual = rng.integers(0, 2, rows)
            self.kind, self.modality = Modality.MASK, torch.from_numpy(visual.astype(np.uint8))
        elif modality == "count":
            self.per_sequence = rows // 2
            count = rng.integers(0, self.per_sequence + 1, 2)
            visual = (np.arange(rows) % self.per_sequence < np.repeat(count, self.per_sequence)) * 1
            self.kind, self.modality = Modality.COUNT, torch.from_numpy(count)

        def real(*size: int) -> torch.Tensor:
            return torch.from_numpy(rng.standard_normal(size).astype(np.float32))

        self.bias = real(n) if bias else None
        self.x_split = real(rows, split + 1).to(torch_dtype) if split else None
        self.w_split = real(n, split) if split else None
        self.columns = split
        self.residual = real(rows, n + 8).to(torch_dtype) if residual else None

        if groups is None:
            product = x[:, :k].astype(np.int64) @ q.astype(np.int64).T
            assert np.abs(product).max(initial=0) * (16 if bits == 4 else 1) < 2**31
        else:
            product = self._group_sums(x[:, :k], q, groups)
        y = product.astype(np.float32) * self.w_scale.numpy()
        y = torch.from_numpy(y * self.x_scale.numpy()[visual][:, None])
        if self.bias is not None:
            y = y + self.bias
        if self.x_split is not None and self.w_split is not None:
            y = y + self.x_split[:, :split].float() @ self.w_split.T
        self.want = y.to(torch_dtype)
        if self.residual is not None:
            self.want = self.want + self.residual[:, :n]
        # Reads past the end of an operand fault.
        for name in "x w w_scale x_scale modality bias x_split w_split residual".split():
            setattr(self, name, guarded(getattr(self, name)))

    def _group_sums(self, x: np.ndarray, q: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Sums over groups as one chain of float32 multiply-adds, and how far another order of the
        same terms may be from it. An 80-bit sum rounded once is what a fused operation gives."""
        size = x.shape[1] // scales.shape[1]
        total = np.zeros((x.shape[0], q.shape[0]), dtype=np.float32)
        magnitude = np.zeros(total.shape)
        for index, scale in enumerate(scales.T):
            part = slice(index * size, (index + 1) * size)
            exact = x[:, part].astype(np.int64) @ q[:, part].astype(np.int64).T
            term = exact.astype(np.longdouble) * scale
            total = (total + term).astype(np.float32)
            magnitude += np.abs(term).astype(np.float64)
        unit = float(self.w_scale.max() * self.x_scale.max())
        self.slack = float(magnitude.max(initial=0)) * unit * scales.shape[1] * 2.0**-23
        return total

    def arguments(self, y: torch.Tensor, **fields: Any) -> LinearArgs:
        rows, n, k = self.shape
        given = {
            "x": self.x,
            "w": self.w,
            "w_scale": self.w_scale,
            "x_scale": self.x_scale,
            "modality": self.modality,
            "bias": self.bias,
            "x_split": self.x_split,
            "w_split": self.w_split,
            "residual": self.residual,
            "y": y,
        }
        pointers = {name: t.data_ptr() for name, t in given.items() if t is not None}
        return LinearArgs(
            layout=self.layout,
            dtype=self.dtype,
            modality_kind=self.kind,
            rows_per_sequence=self.per_sequence,
            rows=rows,
            n=n,
            k=k,
            x_stride=self.x_stride,
            y_stride=y.stride(0),
            residual_stride=0 if self.residual is None else self.residual.stride(0),
            x_split_stride=0 if self.x_split is None else self.x_split.stride(0),
            split_columns=self.columns,
            **pointers,
            **fields,
        )

    def run(self, library: Any, kernel: LinearKernel, split_k: int = 0, pad: int = 8) -> None:
        """Run and compare; what lies outside y's rows must stay as it was.

        Groups are bit-exact where the kernel adds them one after another.
        """
        chain = kernel in (LinearKernel.MMA_128, LinearKernel.WGMMA) and split_k <= 1
        first: torch.Tensor | None = None
        rows, n, _ = self.shape
        poison = torch.full((rows + 1, n + pad), 77.0, dtype=TORCH[self.dtype])
        arguments = self.arguments(poison, kernel=kernel, split_k=split_k)
        size = library.workspace("linear", arguments)
        workspace = torch.randint(0, 255, (size + 16,), dtype=torch.uint8)
        workspace[: 4096 * 4] = 0
        arguments.workspace = workspace.data_ptr() if size else None
        arguments.workspace_bytes = size
        for _ in range(2):  # counters must be ready for the next call
            poison[:rows, :n] = 77.0
            library.launch("linear", arguments)
            got = poison[:rows, :n].clone()
            if self.columns > 1:
                torch.testing.assert_close(got, self.want, rtol=2e-2, atol=1e-4)
            elif self.slack and not chain:
                rounding = torch.finfo(got.dtype).eps if self.dtype != DType.F32 else 0.0
                torch.testing.assert_close(got, self.want, rtol=2 * rounding, atol=self.slack)
                first = got if first is None else first
                assert torch.equal(got, first)  # whichever block came last
            else:
                assert torch.equal(got, self.want)
        assert bool((poison[rows:] == 77).all()) and bool((poison[:, n:] == 77).all())
        assert not workspace[: 4096 * 4].any()


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


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("asynchrony", [0, 1, 2])
def test_wgmma_groups(emulated: Any, group: int, asynchrony: int) -> None:
    emulated.configure(seed=group + asynchrony, asynchrony=asynchrony, sms=2)
    case = Case(140, 328, 512 + group, group=group, bias=True, residual=True, modality="count")
    case.run(emulated, LinearKernel.WGMMA)


def test_groups_of_extremes(emulated: Any) -> None:
    emulated.configure(seed=3)
    for kernel in (LinearKernel.MMA_128, LinearKernel.WGMMA):
        case = Case(2, 64, 2048, group=128, extreme=True, dtype=DType.F32)
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
    refused("layout 9", layout=9)
    refused("dtype 4", dtype=4)
    refused("y is NULL", y=None)
    refused("y_stride", y_stride=63)
    refused("needs a modality", modality_kind=2)
    refused("come together", split_columns=1)
    refused("wgmma needs", kernel=LinearKernel.WGMMA)
    refused("workspace of", split_k=1000, k=256, x_stride=256)
