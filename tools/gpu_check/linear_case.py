"""Operands of one linear with its expected result, computed with float64 products (exact)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mqc.cuda.library import Library, LinearArgs, LinearKernel, Modality
from mqc.cuda.pack import layout_for, pack_weight
from tools.gpu_check.common import DTYPES, stream_of, workspace

POISON = 0x7F7F  # bf16 3.4e38, f16 NaN: no result looks like it


@dataclass(frozen=True)
class Options:
    """Which optional operands a case has."""

    bits: int = 4
    group: int = 0
    dtype: torch.dtype = torch.bfloat16
    modality: Modality = Modality.NONE
    bias: bool = False
    split: bool = False
    residual: bool = False
    extreme: bool = False
    floats: bool = False
    """Rows of floats in ``dtype`` (float16 where that is float32): weight-only quantization."""

    @property
    def weights(self) -> str:
        """Short name of the weights, e.g. w4g128, or w4g128a16 where rows are floats."""
        group = f"g{self.group}" if self.group else ""
        return f"w{self.bits}{group}" + ("a16" if self.floats else "")

    @property
    def rows(self) -> torch.dtype:
        """Type of the rows that are multiplied."""
        if not self.floats:
            return torch.int8
        return torch.float16 if self.dtype == torch.float32 else self.dtype


class LinearCase:
    """Random operands of y = linear(x), on a device.

    Args:
        rows, n, k: sizes; rows is even for the count form of the modality.
        options: optional operands; `extreme` makes every product -8 (or -127) times -127.
        generator: of the device.
    """

    def __init__(
        self, rows: int, n: int, k: int, options: Options, generator: torch.Generator
    ) -> None:
        device = generator.device
        self.shape, self.options, self.device = (rows, n, k), options, device
        self.first = ""
        low, high = (-8, 8) if options.bits == 4 else (-127, 128)

        def integers(low: int, high: int, *size: int) -> Tensor:
            kind = {"dtype": torch.int8, "device": device, "generator": generator}
            return torch.randint(low, high, size, **kind)

        def real(*size: int) -> Tensor:
            return torch.randn(size, device=device, generator=generator)

        self.q = integers(low, high, n, k)
        self.x = integers(-127, 128, rows, -(-k // 16) * 16).to(options.rows)
        if options.floats:
            self.x = real(rows, self.x.shape[1]).to(options.rows)
        if options.extreme:
            self.q.fill_(low)
            self.x.fill_(-127)
        layout = layout_for(options.bits, options.group)
        assert layout is not None
        self.layout = layout
        groups = k // options.group if options.group else 0
        self.factors = real(n, groups).abs() + 0.5 if groups else None
        parts = self.factors
        if parts is not None:
            parts = parts.repeat_interleave(options.group // layout.group, dim=1)
        self.w = pack_weight(self.q, self.layout, parts)
        self.w_scale = real(n).abs() * 1e-3 + 1e-4
        self.x_scale = real(2).abs() * 1e-2 + 1e-3
        if options.floats:
            self.x_scale = torch.ones(2, device=device)
        visual = torch.zeros(rows, dtype=torch.long, device=device)
        self.modality: Tensor | None = None
        self.per_sequence = rows
        self.kind = Modality.NONE if options.floats else options.modality
        if self.kind == Modality.MASK:
            visual = torch.randint(0, 2, (rows,), device=device, generator=generator)
            self.modality = visual.to(torch.uint8)
        elif self.kind == Modality.COUNT:
            self.modality = torch.tensor([rows * 2 // 3], device=device)
            visual = (torch.arange(rows, device=device) < self.modality).long()
        self.visual = visual
        self.bias = real(n) if options.bias else None
        self.x_split = real(rows, 1).to(options.dtype) if options.split else None
        self.w_split = real(n, 1) if options.split else None
        self.residual = real(rows, n).to(options.dtype) if options.residual else None

    def expected(self) -> Tensor:
        """y [rows, n], rounded where the kernels round."""
        rows, _, k = self.shape
        y = torch.empty(rows, self.q.shape[0], dtype=torch.float32, device=self.device)
        wide = self.q.double().T
        if self.factors is not None:
            wide *= self.factors.double().repeat_interleave(self.options.group, dim=1).T
        if self.options.floats:
            self.magnitude = torch.empty_like(y)
        for start in range(0, rows, 1024):
            part = slice(start, start + 1024)
            x = self.x[part, :k].double()
            y[part] = (x @ wide).float()
            if self.options.floats:
                self.magnitude[part] = (x.abs() @ wide.abs()).float() * self.w_scale
        y = y * self.w_scale
        y = y * self.x_scale[self.visual][:, None]
        if self.bias is not None:
            y = y + self.bias
        if self.x_split is not None and self.w_split is not None:
            y = y + self.x_split.float() * self.w_split.T
        out = y.to(self.options.dtype)
        return out if self.residual is None else out + self.residual

    def differing(self, got: Tensor, want: Tensor) -> Tensor:
        """Where `got` is not `want`, bool [rows, n]. Sums over groups are rounded once a group,
        in an order of the kernel's, and those of floats at every step: they may differ by what that
        can make. `want` is of the last call of :meth:`expected`."""
        if self.options.floats:
            slack = 2.0**-18 * self.magnitude
            slack = slack + 2 * torch.finfo(want.dtype).eps * want.float().abs()
            return ~((got.float() - want.float()).abs() <= slack)
        if self.factors is None:
            return got != want
        largest = self.factors.sum(dim=1) * self.options.group * 127 * 8
        slack = largest * self.w_scale * self.x_scale.max() * self.factors.shape[1] * 2.0**-23
        slack = slack + 2 * torch.finfo(want.dtype).eps * want.float().abs()
        return ~((got.float() - want.float()).abs() <= slack)  # NaN is not near

    def arguments(self, y: Tensor, w: Tensor | None = None) -> LinearArgs:
        """The call's struct, without kernel, split and workspace; `w`: another packed copy."""
        rows, n, k = self.shape

        def address(tensor: Tensor | None) -> int | None:
            return None if tensor is None else tensor.data_ptr()

        return LinearArgs(
            layout=self.layout,
            dtype=DTYPES[self.options.dtype],
            x_dtype=DTYPES[self.options.rows],
            modality_kind=self.kind,
            split_columns=0 if self.x_split is None else 1,
            rows=rows,
            n=n,
            k=k,
            rows_per_sequence=self.per_sequence,
            x_stride=self.x.stride(0),
            y_stride=y.stride(0),
            residual_stride=n,
            x_split_stride=1,
            x=address(self.x),
            w=address(self.w if w is None else w),
            w_scale=address(self.w_scale),
            x_scale=None if self.options.floats else address(self.x_scale),
            modality=address(self.modality),
            bias=address(self.bias),
            x_split=address(self.x_split),
            w_split=address(self.w_split),
            residual=address(self.residual),
            y=address(y),
        )

    def mismatches(
        self, library: Library, kernel: LinearKernel, split_k: int, want: Tensor, repeats: int = 2
    ) -> int:
        """Values that differ from `want`, or were touched outside of y, over some runs."""
        rows, n, _ = self.shape
        pad = 8
        buffer = torch.empty(rows + 1, n + pad, dtype=self.options.dtype, device=self.device)
        bits = buffer.view(torch.int32 if buffer.element_size() == 4 else torch.int16)
        arguments = self.arguments(buffer)
        arguments.kernel, arguments.split_k = kernel, split_k
        area = workspace(library.workspace("linear", arguments), self.device)
        arguments.workspace, arguments.workspace_bytes = area.data_ptr(), area.numel()
        wrong = 0
        for _ in range(repeats):
            bits.fill_(POISON)
            library.launch("linear", arguments, stream_of(self.device))
            wrong += self._count("y", buffer[:rows, :n], want)
            wrong += int((bits[rows:] != POISON).sum() + (bits[:rows, n:] != POISON).sum())
        return wrong

    def _count(self, what: str, got: Tensor, want: Tensor) -> int:
        """Wrong values; `first` gets the place of the first ones, the rows and channels touched."""
        different = self.differing(got, want)
        count = int(different.sum())
        if count and not self.first:
            rows, channels = torch.nonzero(different)[:4096].T
            row, channel = int(rows[0]), int(channels[0])
            self.first = (
                f"{what}[{row}, {channel}] is {float(got[row, channel])}, not "
                f"{float(want[row, channel])}; rows {int(rows.min())}..{int(rows.max())}, channels "
                f"{int(channels.min())}..{int(channels.max())} of {tuple(got.shape)}"
            )
        return count
