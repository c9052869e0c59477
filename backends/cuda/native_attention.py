"""Attention on a GPU: the library turns and writes the cache; it or torch reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mqc.backends.cuda.kernels import Attention, FullAttention
from mqc.backends.cuda.launch import DTYPES, Launcher, pointer
from mqc.cuda.library import AttentionArgs, Rotary, RotaryArgs, RotateArgs

MAX_HEAD = 256
DECODE_TOKENS = 16
"""Up to this many new tokens the library's attention reads the cache; above, torch's."""


class NativeAttention(Launcher):
    """``attention`` and ``attention_full`` of :class:`mqc.backends.cuda.kernels.Kernels`."""

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

    def attention_full(self, call: FullAttention) -> Tensor:
        """See :class:`~mqc.backends.cuda.kernels.Kernels`.

        The library turns queries and keys, both at once where they are packed; torch's fused
        kernels attend the heads where they lie.
        """
        q, k, v = self._turned(call)
        options: dict[str, Any] = {"attn_mask": call.mask, "scale": call.scale}
        repeats = q.shape[2] // call.kv_heads
        if repeats > 1 and call.mask is None:
            options["enable_gqa"] = True
        elif repeats > 1:  # with a mask, only torch's slow path takes fewer key than query heads
            k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return scaled_dot_product_attention(q, k, v, **options).transpose(1, 2).flatten(2)

    def _turned(self, call: FullAttention) -> tuple[Tensor, Tensor, Tensor]:
        """q, k (turned) and v, [B, rows, heads, D]."""
        q, k, v = call.apart()
        if call.cos is None or call.sin is None:
            return q, k, v
        if q.shape[3] > MAX_HEAD or k.shape[1] == 0:
            return call.turned()
        if call.k is not None:
            return self._rotate(call, q), self._rotate(call, k), v
        both = self._rotate(call, call.q[:, :, : -call.kv_heads])
        q, k = both.split([q.shape[2], call.kv_heads], dim=2)
        return q, k, v

    def _rotate(self, call: FullAttention, x: Tensor) -> Tensor:
        """x [B, S, heads, D] turned, in memory of its own."""
        x = _side_by_side(x)
        assert call.cos is not None and call.sin is not None
        cos, sin = call.cos.contiguous(), call.sin.contiguous()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        arguments = RotateArgs(
            dtype=DTYPES[x.dtype],
            rotary=Rotary[call.rotary.upper()],
            heads=x.shape[2],
            head_dim=x.shape[3],
            rotary_dim=cos.shape[-1],
            table_dtype=DTYPES[cos.dtype],
            rows=x.shape[0] * x.shape[1],
            angle_rows=cos.shape[0] * cos.shape[1],
            x_stride=x.stride(1),
            y_stride=y.stride(1),
            x=x.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            y=y.data_ptr(),
        )
        self.launch("rotate", arguments)
        return y

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
        self.launch(
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
                cos=pointer(cos),
                sin=pointer(sin),
                past=call.past.data_ptr(),
                key_cache=data.data_ptr(),
                value_cache=call.values.data.data_ptr(),
                key_scale=pointer(call.keys.scale),
                value_scale=pointer(call.values.scale),
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
            key_scale=pointer(call.keys.scale),
            value_scale=pointer(call.values.scale),
            mask=pointer(mask),
            past=call.past.data_ptr(),
            out=out.data_ptr(),
        )
        key = (batch, tokens, q.shape[2], heads, width, data.shape[2], q.dtype, data.dtype)
        self.workspace("attention", key, arguments)
        self.launch("attention", arguments)

    def _torch_attention(self, call: Attention, q: Tensor) -> Tensor:
        """softmax(q K^T) V over the cache by torch; q [B, S, Hq, D] turned, the cache written."""
        tokens, capacity = q.shape[1], call.keys.data.shape[2]
        keys, values = call.keys.read(call.end, q.dtype), call.values.read(call.end, q.dtype)
        options: dict[str, Any] = {"scale": call.scale}
        repeats = q.shape[2] // keys.shape[1]
        if call.causal and call.end == tokens:
            options.update(is_causal=True, enable_gqa=repeats > 1)
            repeats = 1
        elif call.causal and call.end is not None:
            from torch.nn.attention.bias import causal_lower_right

            options["attn_mask"] = causal_lower_right(tokens, call.end)
        else:
            options["attn_mask"] = self._known(call, tokens, capacity)
        if repeats > 1:  # with a mask, only torch's slow path takes fewer key than query heads
            keys, values = (t.repeat_interleave(repeats, dim=1) for t in (keys, values))
        rows = scaled_dot_product_attention(q.transpose(1, 2), keys, values, **options)
        return rows.transpose(1, 2).flatten(2)

    def _known(self, call: Attention, tokens: int, capacity: int) -> Tensor:
        """The mask over the rows that are read, rows after the new ones forbidden."""
        if call.end is not None:
            return call.mask[..., : call.end]
        columns = torch.arange(capacity, device=self.device)
        return call.mask[..., :capacity] & (columns < call.past + tokens)


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
