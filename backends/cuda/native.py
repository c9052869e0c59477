"""The kernels of libmqc_cuda.so, called through ctypes on torch's current stream.

What the library refuses as unsupported (an odd Hadamard order, a head of another size) is computed
by torch operators on the same device: slower, and the same to the rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from mqc.backends.cuda.kernels import Attention
from mqc.backends.cuda.plan import ROW_ALIGNMENT
from mqc.cuda.library import (
    Activation,
    ActivationArgs,
    Arguments,
    AttentionArgs,
    DType,
    EmbeddingArgs,
    Library,
    LinearArgs,
    Modality,
    NormArgs,
    Rotary,
    RotaryArgs,
    TopKArgs,
)
from mqc.cuda.pack import hadamard_table
from mqc.numerics.hadamard import hadamard_factors

_mqc = torch.ops.mqc
DTYPES = {
    torch.bfloat16: DType.BF16,
    torch.float16: DType.F16,
    torch.float32: DType.F32,
    torch.int8: DType.I8,
}
MAX_BASE = 160
MAX_NORM = 16384
MAX_ROW = 32768
MAX_HEAD = 256
DECODE_TOKENS = 16
"""Up to this many new tokens the library's attention reads the cache; above, torch's."""


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def as_rows(x: Tensor) -> Tensor:
    """x [..., K] as [rows, K] with one stride between rows; a copy only where there is none."""
    flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def aligned_rows(x: Tensor) -> Tensor:
    """int8 rows as the linear reads them: 16-byte aligned, strides of a multiple of 16 bytes."""
    flat = as_rows(x)
    if flat.stride(0) % ROW_ALIGNMENT == 0 and flat.data_ptr() % ROW_ALIGNMENT == 0:
        return flat
    return pad(flat, (0, -flat.shape[1] % ROW_ALIGNMENT))[:, : x.shape[-1]]


def hadamard_form(block: int) -> tuple[int, int]:
    """(base, log2) with block = base << log2; base 1 for powers of two."""
    factors = hadamard_factors(block)
    order = factors[0].shape[0] if factors else 1
    base = 1 if order & (order - 1) == 0 else order
    return base, (block // base).bit_length() - 1


class NativeKernels:
    """See :class:`mqc.backends.cuda.kernels.Kernels`.

    Args:
        library: the loaded kernel library.
        device: where tensors live.
        stream: gives the stream (an integer) that work is enqueued on.
    """

    knows_causal = True
    """A causal mask is not read."""

    def __init__(
        self,
        library: Library,
        device: torch.device,
        stream: Callable[[], int] = lambda: torch.cuda.current_stream().cuda_stream,
    ) -> None:
        self.library = library
        self.device = device
        self._stream = stream
        self._workspaces: list[Tensor] = []
        self._sizes: dict[Any, int] = {}
        self._tables: dict[int, Tensor] = {}

    def _launch(self, name: str, arguments: Arguments) -> None:
        self.library.launch(name, arguments, self._stream())

    def _workspace(self, name: str, key: tuple[Any, ...], arguments: Any) -> None:
        """Give a call its workspace: one for all, zeroed once. Older ones stay alive, for captured
        graphs hold their addresses."""
        size = self._sizes.get((name, key))
        if size is None:
            size = self._sizes[name, key] = self.library.workspace(name, arguments)
        if size == 0:
            return
        if not self._workspaces or self._workspaces[-1].numel() < size:
            count = max(size, 1 << 20)
            self._workspaces.append(torch.zeros(count, dtype=torch.uint8, device=self.device))
        arguments.workspace = self._workspaces[-1].data_ptr()
        arguments.workspace_bytes = self._workspaces[-1].numel()

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
        x, y = aligned_rows(xq), as_rows(out)
        split = None if x_split is None else as_rows(x_split)
        added = None if residual is None else as_rows(residual)
        rows = self._rows_scale(xq, x_scale, modality)
        kept = rows.pop("_keep", None)
        arguments = LinearArgs(
            layout=layout,
            dtype=DTYPES[out.dtype],
            split_columns=0 if split is None else split.shape[1],
            rows=x.shape[0],
            n=w_scale.shape[0],
            k=xq.shape[-1],
            x_stride=x.stride(0),
            y_stride=y.stride(0),
            residual_stride=0 if added is None else added.stride(0),
            x_split_stride=0 if split is None else split.stride(0),
            x=x.data_ptr(),
            w=weight.data_ptr(),
            w_scale=w_scale.data_ptr(),
            x_scale=x_scale.data_ptr(),
            bias=_pointer(bias),
            x_split=_pointer(split),
            w_split=_pointer(w_split),
            residual=_pointer(added),
            y=y.data_ptr(),
            **rows,
        )
        self._workspace("linear", (layout, x.shape[0], w_scale.shape[0], xq.shape[-1]), arguments)
        self._launch("linear", arguments)
        del kept

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
            integers, _ = _mqc.rms_norm_quantize(x, eps, scale, modality, None)
            xq.copy_(integers)
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
            scale=_pointer(scale),
            xq=_pointer(q),
            h=_pointer(h),
            **rows,
        )
        self._launch("rms_norm_quantize", arguments)
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
        base, log2 = hadamard_form(block)
        if base > MAX_BASE or xq.shape[-1] > MAX_ROW:
            integers, columns = _mqc.activation_quantize(
                x, activation, gated, block, scale, modality, split
            )
            xq.copy_(integers)
            if x_split is not None:
                x_split.copy_(columns)
            return
        flat, q = as_rows(x), as_rows(xq)
        columns = None if x_split is None else as_rows(x_split)
        rows = self._rows_scale(x, scale, modality)
        kept = rows.pop("_keep", None)
        arguments = ActivationArgs(
            dtype=DTYPES[x.dtype],
            activation=Activation[activation.upper()],
            gated=int(gated),
            hadamard_base=base,
            hadamard_log2=log2,
            split_columns=0 if columns is None else columns.shape[1],
            rows=flat.shape[0],
            columns=xq.shape[-1],
            x_stride=flat.stride(0),
            xq_stride=q.stride(0),
            x_split_stride=0 if columns is None else columns.stride(0),
            x=flat.data_ptr(),
            scale=scale.data_ptr(),
            hadamard=_pointer(self._table(base)),
            split=_pointer(split),
            xq=q.data_ptr(),
            x_split=_pointer(columns),
            **rows,
        )
        self._launch("activation_quantize", arguments)
        del kept

    def hadamard(self, out: Tensor, x: Tensor, block: int) -> None:
        """See :class:`~mqc.backends.cuda.kernels.Kernels`."""
        base, log2 = hadamard_form(block)
        if base > MAX_BASE or x.shape[-1] > MAX_ROW:
            out.copy_(_mqc.hadamard(x, block))
            return
        flat, y = as_rows(x), as_rows(out)
        arguments = ActivationArgs(
            dtype=DTYPES[x.dtype],
            hadamard_base=base,
            hadamard_log2=log2,
            rows=flat.shape[0],
            columns=flat.shape[1],
            x_stride=flat.stride(0),
            y_stride=y.stride(0),
            x=flat.data_ptr(),
            hadamard=_pointer(self._table(base)),
            y=y.data_ptr(),
        )
        self._launch("activation_quantize", arguments)

    def _table(self, base: int) -> Tensor | None:
        if base == 1:
            return None
        if base not in self._tables:
            self._tables[base] = hadamard_table(base).to(self.device)
        return self._tables[base]

    def embedding(self, out: Tensor, ids: Tensor, table: Tensor, scale: Tensor) -> None:
        """See :class:`~mqc.backends.cuda.kernels.Kernels`."""
        ids = ids.contiguous()
        self._launch(
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
        self._workspace("top_k", (flat.shape[0], flat.shape[1]), arguments)
        self._launch("top_k", arguments)
        return found.reshape(logits.shape[:-1])

    def attention(self, call: Attention, out: Tensor) -> Tensor:
        """See :class:`~mqc.backends.cuda.kernels.Kernels`.

        The library turns queries where they are and writes the cache. Few new tokens then read it
        by the library's kernel, which follows ``past`` on the device; more by torch's.
        """
        heads, width = call.keys.data.shape[1], call.keys.data.shape[3]
        tokens = call.q.shape[1]
        native = width == call.values.data.shape[3] and width <= MAX_HEAD
        if not native:
            q, k, v = call.turned()
            call.append(k, v)
            return self._torch_attention(call, q.transpose(1, 2))
        q = self._rotary_cache(call, heads, width)
        if call.end is None or tokens <= DECODE_TOKENS:
            self._cache_attention(call, q, heads, width, out)
            return out
        return self._torch_attention(call, q)

    def _rotary_cache(self, call: Attention, heads: int, width: int) -> Tensor:
        """Turn q, append k and v; q [B, S, Hq, D]."""
        q, k, v = _token_major(call, heads)
        batch, tokens = q.shape[:2]
        cos, sin = call.cos, call.sin
        if cos is not None and sin is not None:
            cos, sin = (
                t.expand(batch, -1, -1).contiguous() if t.dim() == 3 else t for t in (cos, sin)
            )
        data = call.keys.data
        self._launch(
            "rotary_cache",
            RotaryArgs(
                dtype=DTYPES[q.dtype],
                cache_dtype=DTYPES[data.dtype],
                rotary=Rotary[call.rotary.upper()],
                batch=batch,
                tokens=tokens,
                q_heads=q.shape[2],
                kv_heads=heads,
                head_dim=width,
                rotary_dim=0 if cos is None else cos.shape[-1],
                table_dtype=0 if cos is None else DTYPES[cos.dtype],
                capacity=data.shape[2],
                q_stride=q.stride(1),
                k_stride=k.stride(1),
                v_stride=v.stride(1),
                q=q.data_ptr(),
                k=k.data_ptr(),
                v=v.data_ptr(),
                cos=_pointer(cos),
                sin=_pointer(sin),
                past=call.past.data_ptr(),
                key_cache=data.data_ptr(),
                value_cache=call.values.data.data_ptr(),
                key_scale=_pointer(call.keys.scale),
                value_scale=_pointer(call.values.scale),
            ),
        )
        return q

    def _cache_attention(
        self, call: Attention, q: Tensor, heads: int, width: int, out: Tensor
    ) -> None:
        batch, tokens = q.shape[:2]
        mask = None if call.causal else call.mask
        if mask is not None and (mask.stride(3) != 1 or mask.stride(0) != tokens * mask.stride(2)):
            mask = mask.contiguous()
        data = call.keys.data
        arguments = AttentionArgs(
            dtype=DTYPES[q.dtype],
            cache_dtype=DTYPES[data.dtype],
            batch=batch,
            tokens=tokens,
            q_heads=q.shape[2],
            kv_heads=heads,
            head_dim=width,
            scale=call.scale,
            capacity=data.shape[2],
            q_stride=q.stride(1),
            out_stride=out.stride(1),
            mask_stride=0 if mask is None else mask.stride(2),
            q=q.data_ptr(),
            key_cache=data.data_ptr(),
            value_cache=call.values.data.data_ptr(),
            key_scale=_pointer(call.keys.scale),
            value_scale=_pointer(call.values.scale),
            mask=_pointer(mask),
            past=call.past.data_ptr(),
            out=out.data_ptr(),
        )
        key = (batch, tokens, q.shape[2], heads, width, data.shape[2], q.dtype, data.dtype)
        self._workspace("attention", key, arguments)
        self._launch("attention", arguments)

    def _torch_attention(self, call: Attention, q: Tensor) -> Tensor:
        """softmax(q K^T) V over the cache by torch; q [B, S, Hq, D] turned, the cache written."""
        tokens, capacity = q.shape[1], call.keys.data.shape[2]
        keys, values = call.keys.read(call.end, q.dtype), call.values.read(call.end, q.dtype)
        options: dict[str, Any] = {"scale": call.scale, "enable_gqa": q.shape[2] != keys.shape[1]}
        if call.causal and call.end == tokens:
            options["is_causal"] = True
        elif call.causal and call.end is not None:
            from torch.nn.attention.bias import causal_lower_right

            options["attn_mask"] = causal_lower_right(tokens, call.end)
        else:
            options["attn_mask"] = self._known(call, tokens, capacity)
        rows = scaled_dot_product_attention(q.transpose(1, 2), keys, values, **options)
        return rows.transpose(1, 2).flatten(2)

    def _known(self, call: Attention, tokens: int, capacity: int) -> Tensor:
        """The mask over the rows that are read, rows after the new ones forbidden."""
        if call.end is not None:
            return call.mask[..., : call.end]
        columns = torch.arange(capacity, device=self.device)
        return call.mask[..., :capacity] & (columns < call.past + tokens)


def _float_norm(x: Tensor, eps: float) -> Tensor:
    y: Tensor = torch.ops.aten.rms_norm.default(x, [x.shape[-1]], None, eps)
    return y


def _token_major(call: Attention, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, S, heads, D] with heads side by side; rows may be apart."""
    q, k, v = call.q, call.k, call.v
    if k is None or v is None:
        q, k, v = q.split([q.shape[2] - 2 * groups, groups, groups], dim=2)
    return _side_by_side(q), _side_by_side(k), _side_by_side(v)


def _side_by_side(x: Tensor) -> Tensor:
    """x with heads after each other, and batches after each other by the tokens' stride."""
    batch, tokens, _, width = x.shape
    heads = x.stride(3) == 1 and (x.stride(2) == width or x.shape[2] == 1)
    rows = batch == 1 or x.stride(0) == tokens * x.stride(1)
    return x if heads and rows else x.contiguous()
