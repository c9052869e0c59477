"""The kernels of libmqc_cuda.so, called through ctypes on torch's current stream.

What the library refuses as unsupported (an odd Hadamard order, a head of another size) is computed
by torch operators on the same device: slower, and the same to the rounding.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mqc.backends.cuda import recurrence
from mqc.backends.cuda.definitions import Definitions
from mqc.backends.cuda.launch import DTYPES, as_rows, pointer
from mqc.backends.cuda.native_attention import NativeAttention
from mqc.backends.cuda.plan import ROW_ALIGNMENT
from mqc.cuda.library import (
    Activation,
    ActivationArgs,
    EmbeddingArgs,
    LinearArgs,
    Modality,
    NormArgs,
    TopKArgs,
)
from mqc.cuda.pack import hadamard_table
from mqc.numerics.hadamard import hadamard_factors

MAX_BASE = {torch.float32: 160, torch.bfloat16: 352, torch.float16: 352}
"""Largest dense Hadamard factor by the rows' type."""
LARGEST_HALF = torch.finfo(torch.float16).max
MAX_NORM = 16384
MAX_ROW = 32768


def aligned_rows(x: Tensor) -> Tensor:
    """Rows as the linear reads them: 16-byte aligned, strides of a multiple of 16 bytes."""
    flat = as_rows(x)
    values = ROW_ALIGNMENT // x.element_size()
    if flat.stride(0) % values == 0 and flat.data_ptr() % ROW_ALIGNMENT == 0:
        return flat
    return pad(flat, (0, -flat.shape[1] % values))[:, : x.shape[-1]]


def half_rows(x: Tensor) -> Tensor:
    """Float rows as the linear reads them: float32 as float16, at most its largest value."""
    if x.dtype == torch.float32:
        x = x.clamp(-LARGEST_HALF, LARGEST_HALF).to(torch.float16)
    return aligned_rows(x)


@functools.cache
def hadamard_form(block: int) -> tuple[int, int]:
    """(base, log2) with block = base << log2; base 1 for powers of two."""
    factors = hadamard_factors(block)
    order = factors[0].shape[0] if factors else 1
    base = 1 if order & (order - 1) == 0 else order
    return base, (block // base).bit_length() - 1


class NativeKernels(NativeAttention):
    """See :class:`mqc.backends.cuda.kernels.Kernels` and, for the arguments,
    :class:`~mqc.backends.cuda.launch.Launcher`."""

    knows_causal = True
    """A causal mask is not read."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._tables: dict[int, Tensor] = {}
        self._defined = Definitions(self.device)

    def _rows_scale(self, x: Tensor, scale: Tensor, modality: Tensor | None) -> dict[str, Any]:
        """Fields that say how the rows of x [B, S, K] find their scale."""
        if modality is None or scale.numel() == 1:
            return {"modality_kind": Modality.NONE}
        if modality.dtype == torch.bool:
            kept = modality if modality.is_contiguous() else modality.contiguous()
            return {"modality_kind": Modality.MASK, "modality": kept.data_ptr(), "_keep": kept}
        return {
            "modality_kind": Modality.COUNT,
            "modality": modality.data_ptr(),
            "rows_per_sequence": x.shape[1],
        }

    def linear(
        self,
        out: Tensor,
        xq: Tensor,
        weight: Tensor,
        w_scale: Tensor,
        x_scale: Tensor,
        modality: Tensor | None,
        bias: Tensor | None,
        x_split: Tensor | None,
        w_split: Tensor | None,
        residual: Tensor | None,
        layout: int,
    ) -> None:
        """See :class:`~mqc.backends.cuda.kernels.Kernels`."""
        scale = self._rows_scale(xq, x_scale, modality)
        kept = scale.pop("_keep", None)
        terms = (bias, x_split, w_split, residual)
        scale["x_scale"] = x_scale.data_ptr()
        self._linear(out, aligned_rows(xq), weight, w_scale, terms, layout, scale)
        del kept

    def linear_a16(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        x_split: Tensor | None,
        w_split: Tensor | None,
        residual: Tensor | None,
        layout: int,
    ) -> None:
        """See :class:`~mqc.backends.cuda.kernels.Kernels`; float32 rows become float16."""
        terms = (bias, x_split, w_split, residual)
        rows = half_rows(x)
        kind = {"x_dtype": DTYPES[rows.dtype]}
        self._linear(out, rows, weight, w_scale, terms, layout, kind)

    def _linear(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        w_scale: Tensor,
        terms: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
        layout: int,
        more: dict[str, Any],
    ) -> None:
        """Launch the linear of rows x [M, K]; terms: bias, x_split, w_split, residual."""
        bias, x_split, w_split, residual = terms
        y = as_rows(out)
        split = None if x_split is None else as_rows(x_split)
        added = None if residual is None else as_rows(residual)
        arguments = LinearArgs(
            layout=layout,
            dtype=DTYPES[out.dtype],
            split_columns=0 if split is None else split.shape[1],
            rows=x.shape[0],
            n=w_scale.shape[0],
            k=x.shape[1],
            x_stride=x.stride(0),
            y_stride=y.stride(0),
            residual_stride=0 if added is None else added.stride(0),
            x_split_stride=0 if split is None else split.stride(0),
            x=x.data_ptr(),
            w=weight.data_ptr(),
            w_scale=w_scale.data_ptr(),
            bias=pointer(bias),
            x_split=pointer(split),
            w_split=pointer(w_split),
            residual=pointer(added),
            y=y.data_ptr(),
            **more,
        )
        sizes = (layout, x.dtype, x.shape[0], w_scale.shape[0], x.shape[1])
        self.workspace("linear", sizes, arguments)
        self.launch("linear", arguments)

    def rms_norm_quantize(
        self,
        xq: Tensor,
        x_split: Tensor | None,
        x: Tensor,
        eps: float,
        scale: Tensor,
        modality: Tensor | None,
        split: Tensor | None,
    ) -> None:
        """See :class:`~mqc.backends.cuda.kernels.Kernels`; float columns cost a second launch."""
        h = None if split is None else torch.empty_like(as_rows(x))
        if not self._norm(x, eps, xq, scale, modality, h):
            xq.copy_(self._defined.rms_norm_quantize(x, eps, scale, modality))
            h = None if split is None else as_rows(_float_norm(x, eps))
        if x_split is not None and h is not None and split is not None:
            torch.index_select(h, 1, split, out=as_rows(x_split))

    def rms_norm(self, x: Tensor, eps: float) -> Tensor:
        """See :class:`~mqc.backends.cuda.kernels.Kernels`."""
        h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return h if self._norm(x, eps, None, None, None, as_rows(h)) else _float_norm(x, eps)

    def _norm(
        self,
        x: Tensor,
        eps: float,
        xq: Tensor | None,
        scale: Tensor | None,
        modality: Tensor | None,
        h: Tensor | None,
    ) -> bool:
        if x.shape[-1] > MAX_NORM:
            return False
        flat, q = as_rows(x), None if xq is None else as_rows(xq)
        rows = {} if scale is None else self._rows_scale(x, scale, modality)
        kept = rows.pop("_keep", None)
        arguments = NormArgs(
            dtype=DTYPES[x.dtype],
            eps=eps,
            rows=flat.shape[0],
            columns=flat.shape[1],
            x_stride=flat.stride(0),
            xq_stride=0 if q is None else q.stride(0),
            h_stride=0 if h is None else h.stride(0),
            x=flat.data_ptr(),
            scale=pointer(scale),
            xq=pointer(q),
            h=pointer(h),
            **rows,
        )
        self.launch("rms_norm_quantize", arguments)
        del kept
        return True

    def activation_quantize(
        self,
        xq: Tensor,
        x_split: Tensor | None,
        x: Tensor,
        activation: str,
        gated: bool,
        block: int,
        scale: Tensor,
        modality: Tensor | None,
        split: Tensor | None,
    ) -> None:
        """See :class:`~mqc.backends.cuda.kernels.Kernels`."""
        columns = None if x_split is None else as_rows(x_split)
        modal = self._rows_scale(x, scale, modality)
        kept = modal.pop("_keep", None)
        q = as_rows(xq)
        fields = {
            "activation": Activation[activation.upper()],
            "gated": int(gated),
            "split_columns": 0 if columns is None else columns.shape[1],
            "xq_stride": q.stride(0),
            "x_split_stride": 0 if columns is None else columns.stride(0),
            "scale": scale.data_ptr(),
            "split": pointer(split),
            "xq": q.data_ptr(),
            "x_split": pointer(columns),
            **modal,
        }
        if not self._transform(as_rows(x), xq.shape[-1], block, fields):
            how = (activation, gated, block, scale, modality, split)
            integers, floats = self._defined.activation_quantize(x, *how)
            xq.copy_(integers)
            if x_split is not None:
                x_split.copy_(floats)
        del kept

    def hadamard(self, out: Tensor, x: Tensor, block: int) -> None:
        """See :class:`~mqc.backends.cuda.kernels.Kernels`."""
        y = as_rows(out)
        fields = {"y_stride": y.stride(0), "y": y.data_ptr()}
        if not self._transform(as_rows(x), x.shape[-1], block, fields):
            out.copy_(self._defined.hadamard(x, block))

    def _transform(self, x: Tensor, columns: int, block: int, fields: dict[str, Any]) -> bool:
        """Launch activation_quantize on rows; False where the library has no kernel for them."""
        base, log2 = hadamard_form(block)
        if base > MAX_BASE[x.dtype] or columns > MAX_ROW:
            return False
        arguments = ActivationArgs(
            dtype=DTYPES[x.dtype],
            hadamard_base=base,
            hadamard_log2=log2,
            rows=x.shape[0],
            columns=columns,
            x_stride=x.stride(0),
            x=x.data_ptr(),
            hadamard=pointer(self._table(base)),
            **fields,
        )
        return self.try_launch("activation_quantize", arguments)

    def _table(self, base: int) -> Tensor | None:
        if base == 1:
            return None
        if base not in self._tables:
            self._tables[base] = hadamard_table(base).to(self.device)
        return self._tables[base]

    def embedding(self, out: Tensor, ids: Tensor, table: Tensor, scale: Tensor) -> None:
        """See :class:`~mqc.backends.cuda.kernels.Kernels`."""
        ids = ids.contiguous()
        self.launch(
            "embedding",
            EmbeddingArgs(
                dtype=DTYPES[out.dtype],
                table_dtype=DTYPES[table.dtype],
                rows=ids.numel(),
                columns=table.shape[1],
                vocabulary=table.shape[0],
                ids=ids.data_ptr(),
                table=table.data_ptr(),
                scale=scale.data_ptr(),
                y=out.data_ptr(),
            ),
        )

    def gated_delta(self, *args: Tensor) -> Tensor:
        """See :class:`~mqc.backends.cuda.kernels.Kernels`; the library has no kernel for it."""
        return recurrence.by_length(*args)

    def argmax(self, logits: Tensor) -> Tensor:
        """See :class:`~mqc.backends.cuda.kernels.Kernels`; NaN counts as the largest."""
        flat = as_rows(logits)
        found = torch.empty(flat.shape[0], 1, dtype=torch.int64, device=logits.device)
        arguments = TopKArgs(
            dtype=DTYPES[logits.dtype],
            k=1,
            rows=flat.shape[0],
            columns=flat.shape[1],
            x_stride=flat.stride(0),
            x=flat.data_ptr(),
            indices=found.data_ptr(),
        )
        self.workspace("top_k", (flat.shape[0], flat.shape[1]), arguments)
        self.launch("top_k", arguments)
        return found.reshape(logits.shape[:-1])


def _float_norm(x: Tensor, eps: float) -> Tensor:
    y: Tensor = torch.ops.aten.rms_norm.default(x, [x.shape[-1]], None, eps)
    return y
