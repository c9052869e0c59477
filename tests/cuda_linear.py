"""A linear for the kernels: random operands, the result in NumPy, and its call."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from guarded_memory import guarded

from mqc.cuda.library import DType, LinearArgs, LinearKernel, Modality
from mqc.cuda.pack import layout_for, pack_weight

TORCH = {DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32}


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
        floats: DType | None = None,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.shape, self.dtype, self.slack = (rows, n, k), dtype, 0.0
        self.floats = floats
        torch_dtype = TORCH[dtype]
        low, high = (-8, 7) if bits == 4 else (-127, 127)
        q = rng.integers(low, high + 1, (n, k), dtype=np.int8)
        self.x_stride = -(-k // 16) * 16 + 16
        x = rng.integers(-127, 128, (rows, self.x_stride), dtype=np.int8)
        if extreme:
            q[:], x[:] = low, -127
        self.layout = layout_for(bits, group)
        groups = rng.uniform(0.5, 2, (n, k // group)).astype(np.float32) if group else None
        if groups is not None:  # in parts that the layout has
            groups = groups.repeat(group // self.layout.group, axis=1)
        factors = None if groups is None else torch.from_numpy(groups)
        self.w = pack_weight(torch.from_numpy(q), self.layout, factors)
        self.x = torch.from_numpy(x)
        if floats is not None:  # the same integers; what lies behind a row is no number
            self.x = self.x.to(TORCH[floats])
            self.x[:, k:] = np.nan
        self.w_scale = torch.from_numpy(rng.uniform(1e-3, 1e-2, n).astype(np.float32))
        self.x_scale = torch.from_numpy(rng.uniform(1e-2, 1e-1, 2).astype(np.float32))
        if floats is not None:
            self.x_scale = torch.ones(2)
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
            limit = 2**31 // (16 if bits == 4 else 1) if floats is None else 2**24
            assert np.abs(product).max(initial=0) < limit
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
            "x_scale": self.x_scale if self.floats is None else None,
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
            x_dtype=self.floats or 0,
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
        whole = LinearKernel.MMA_128 if self.floats is None else LinearKernel.MMA_64
        chain = kernel >= whole and split_k <= 1
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
