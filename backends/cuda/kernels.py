"""What an executor asks of a device: one method a kernel, results written where they are told.

:class:`ReferenceKernels` computes them on the CPU by the operators' definitions, so a lowered
program with its memory plan can be run and tested without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mqc.backends.cuda.ops import apply_unpacked, apply_unpacked_a16, unpack
from mqc.cuda.pack import Layout
from mqc.ops._heads import rotate
from mqc.ops.attention import heads_of

_mqc = torch.ops.mqc


@dataclass(frozen=True)
class CacheTensor:
    """Keys or values of one layer: [batch, heads, capacity, size], rows from ``past`` on unset.

    ``scale``: float32 [batch, heads, capacity] where ``data`` is int8, one scale a row.
    """

    data: Tensor
    scale: Tensor | None = None

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> CacheTensor:
        """Zeros: rows that no row may attend are multiplied by zero, and must be finite."""
        data = torch.zeros(shape, dtype=dtype, device=device)
        scale = torch.zeros(shape[:-1], device=device) if dtype == torch.int8 else None
        return cls(data, scale)

    def rows(self, batch: int) -> CacheTensor:
        """The first ``batch`` sequences."""
        scale = None if self.scale is None else self.scale[:batch]
        return replace(self, data=self.data[:batch], scale=scale)

    def copy_rows(self, source: CacheTensor, count: int) -> None:
        """Take the first ``count`` rows of every sequence of a smaller cache."""
        batch = min(self.data.shape[0], source.data.shape[0])
        self.data[:batch, :, :count] = source.data[:batch, :, :count]
        if self.scale is not None and source.scale is not None:
            self.scale[:batch, :, :count] = source.scale[:batch, :, :count]

    def write(self, new: Tensor, places: Tensor) -> None:
        """Put ``new`` [batch, heads, S, size] at rows ``places`` (int64 [S])."""
        if self.scale is None:
            self.data.index_copy_(2, places, new.to(self.data.dtype))
            return
        q, scale = quantize_rows(new)
        self.data.index_copy_(2, places, q)
        self.scale.index_copy_(2, places, scale)

    def read(self, end: int | None, dtype: torch.dtype) -> Tensor:
        """Rows before ``end`` (None: all) in ``dtype``."""
        data = self.data[:, :, :end]
        if self.scale is None:
            return data
        return (data.to(torch.float32) * self.scale[:, :, :end, None]).to(dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [..., D] and float32 scales [...]: max |x| / 127 of each row, 1 for a row of zeros."""
    x = x.to(torch.float32)
    largest = x.abs().amax(dim=-1)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    return torch.round(x / scale[..., None]).clamp_(-127, 127).to(torch.int8), scale


@dataclass(frozen=True)
class Attention:
    """One call of ``mqc::attention`` on a buffered cache.

    ``past``: int64 [1] on the device. ``end``: past + S as a number, or None inside of a captured
    graph. ``causal``: the mask is the causal one, and need not be read.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    keys: CacheTensor
    values: CacheTensor
    past: Tensor
    mask: Tensor
    cos: Tensor | None
    sin: Tensor | None
    scale: float
    rotary: str
    end: int | None = None
    causal: bool = False

    def turned(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q and k, and v: [B, heads, S, D], in q's dtype; angles are applied in float32."""
        q, k, v = heads_of(self.q, self.k, self.v, self.keys.data)
        if self.cos is None or self.sin is None:
            return q, k, v
        cos, sin = self.cos.unsqueeze(1), self.sin.unsqueeze(1)
        dtype = q.dtype
        turn = [rotate(x.to(cos.dtype), cos, sin, self.rotary).to(dtype) for x in (q, k)]
        return turn[0], turn[1], v

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write the new rows into the caches."""
        places = self.past + torch.arange(k.shape[2], device=k.device)
        self.keys.write(k, places)
        self.values.write(v, places)


@dataclass(frozen=True)
class FullAttention:
    """One call of ``mqc::attention_full``: arguments as there; angles may be wider than q."""

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    mask: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    kv_heads: int
    scale: float
    rotary: str

    def apart(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, rows, heads, D]: columns of one value where they are packed."""
        if self.k is not None and self.v is not None:
            return self.q, self.k, self.v
        heads = self.q.shape[2] - 2 * self.kv_heads
        q, k, v = self.q.split([heads, self.kv_heads, self.kv_heads], dim=2)
        return q, k, v

    def turned(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q and k, and v, token-major, in q's dtype; angles are applied in theirs."""
        q, k, v = self.apart()
        if self.cos is None or self.sin is None:
            return q, k, v
        cos, sin, dtype = self.cos.unsqueeze(2), self.sin.unsqueeze(2), q.dtype
        q, k = (rotate(x.to(cos.dtype), cos, sin, self.rotary).to(dtype) for x in (q, k))
        return q, k, v


class Kernels(Protocol):
    """A device's kernels. ``out`` arguments are memory to write; shapes as in `mqc.ops`."""

    device: torch.device

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
        """``mqc_cuda::linear`` into ``out`` [..., N]."""

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
        """``mqc_cuda::linear_a16`` into ``out`` [..., N]."""

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
        """``mqc::rms_norm_quantize`` into ``xq`` and, with ``split``, ``x_split``."""

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
        """``mqc::activation_quantize``; ``quantize_static`` is its identity without transform."""

    def hadamard(self, out: Tensor, x: Tensor, block: int) -> None:
        """``mqc::hadamard`` into ``out``."""

    def rms_norm(self, x: Tensor, eps: float) -> Tensor:
        """RMSNorm over the last axis without gain."""

    def embedding(self, out: Tensor, ids: Tensor, table: Tensor, scale: Tensor) -> None:
        """``mqc::embedding_w8`` into ``out``."""

    def attention(self, call: Attention, out: Tensor) -> Tensor:
        """Append keys and values in place; the rows [B, S, Hq * Dv], in ``out`` or elsewhere."""

    def attention_full(self, call: FullAttention) -> Tensor:
        """``mqc::attention_full``: the rows [B, S, Hq * Dv]."""

    def gated_delta(self, *args: Tensor) -> Tensor:
        """``mqc::gated_delta``."""

    def argmax(self, logits: Tensor) -> Tensor:
        """int64 [...]: the first of the largest along the last axis."""


class ReferenceKernels:
    """Every kernel by its operator's definition, on the CPU."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self._unpacked: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

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
        """See :class:`Kernels`."""
        kept = self._unpack(weight, w_scale, layout, xq.shape[-1])
        terms = (bias, x_split, w_split, residual)
        out.copy_(apply_unpacked(xq, *kept, x_scale, modality, *terms, out.dtype))

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
        """See :class:`Kernels`."""
        kept = self._unpack(weight, w_scale, layout, x.shape[-1])
        out.copy_(apply_unpacked_a16(x, *kept, bias, x_split, w_split, residual, out.dtype))

    def _unpack(
        self, weight: Tensor, w_scale: Tensor, layout: int, k: int
    ) -> tuple[Tensor, Tensor]:
        kept = self._unpacked.get(id(weight))
        if kept is None or kept[0] is not weight:
            kept = (weight, *unpack(weight, w_scale, Layout(layout), k))
            self._unpacked[id(weight)] = kept
        return kept[1:]

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
        """See :class:`Kernels`."""
        integers, columns = _mqc.rms_norm_quantize(x, eps, scale, modality, split)
        xq.copy_(integers)
        if x_split is not None:
            x_split.copy_(columns)

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
        """See :class:`Kernels`."""
        integers, columns = _mqc.activation_quantize(
            x, activation, gated, block, scale, modality, split
        )
        xq.copy_(integers)
        if x_split is not None:
            x_split.copy_(columns)

    def hadamard(self, out: Tensor, x: Tensor, block: int) -> None:
        """See :class:`Kernels`."""
        out.copy_(_mqc.hadamard(x, block))

    def rms_norm(self, x: Tensor, eps: float) -> Tensor:
        """See :class:`Kernels`."""
        y: Tensor = torch.ops.aten.rms_norm.default(x, [x.shape[-1]], None, eps)
        return y

    def embedding(self, out: Tensor, ids: Tensor, table: Tensor, scale: Tensor) -> None:
        """See :class:`Kernels`."""
        out.copy_(_mqc.embedding_w8(ids, table, scale))

    def attention(self, call: Attention, out: Tensor) -> Tensor:
        """See :class:`Kernels`. A mask is always read, causal or not."""
        q, k, v = call.turned()
        call.append(k, v)
        end = int(call.past.item()) + q.shape[2]
        repeats = q.shape[1] // k.shape[1]
        keys, values = (
            cache.read(end, q.dtype).repeat_interleave(repeats, dim=1)
            for cache in (call.keys, call.values)
        )
        rows = torch.ops.aten.scaled_dot_product_attention.default(
            q, keys, values, call.mask[..., :end], scale=call.scale
        )
        return out.copy_(rows.transpose(1, 2).flatten(2))

    def attention_full(self, call: FullAttention) -> Tensor:
        """See :class:`Kernels`."""
        rest = (None, None, call.kv_heads, call.scale, "none")
        rows: Tensor = _mqc.attention_full(*call.turned(), call.mask, *rest)
        return rows

    def gated_delta(self, *args: Tensor) -> Tensor:
        """See :class:`Kernels`."""
        rows: Tensor = _mqc.gated_delta(*args)
        return rows

    def argmax(self, logits: Tensor) -> Tensor:
        """See :class:`Kernels`."""
        return logits.argmax(dim=-1)
