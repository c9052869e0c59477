"""How many bytes of memory each pointer of a kernel's arguments must lead to."""

from __future__ import annotations

from typing import Any

from mqc.cuda.library import DType, Modality
from mqc.cuda.pack import Layout

_BYTES = {0: 0, DType.BF16: 2, DType.F16: 2, DType.F32: 4, DType.I8: 1}


def _rows(count: int, stride: int, width: int, item: int) -> int:
    """Bytes of rows that are `stride` values apart."""
    return ((count - 1) * stride + width) * item


def _modality(a: Any) -> dict[str, int]:
    kind = a.modality_kind
    sequences = a.rows // max(a.rows_per_sequence, 1) * 8
    sizes = {Modality.NONE: 0, Modality.MASK: a.rows, Modality.COUNT: sequences}
    return {"modality": sizes[kind]}


def _linear(a: Any) -> dict[str, int]:
    item = _BYTES[a.dtype]
    if a.x_dtype in (DType.BF16, DType.F16):
        x = _rows(a.rows, a.x_stride, a.k, 2)
    else:
        x = _rows(a.rows, a.x_stride, -(-a.k // 16) * 16, 1)  # 16 bytes at a time
    return {
        "x": x,
        "w": Layout(a.layout).nbytes(a.n, a.k),
        "w_scale": 4 * a.n,
        "x_scale": 8 if a.modality_kind else 4,
        "bias": 4 * a.n,
        "x_split": _rows(a.rows, a.x_split_stride, a.split_columns, item),
        "w_split": 4 * a.n * a.split_columns,
        "residual": _rows(a.rows, a.residual_stride, a.n, item),
        "y": _rows(a.rows, a.y_stride, a.n, item),
        "workspace": a.workspace_bytes,
        **_modality(a),
    }


def _norm(a: Any) -> dict[str, int]:
    item = _BYTES[a.dtype]
    return {
        "x": _rows(a.rows, a.x_stride, a.columns, item),
        "scale": 8 if a.modality_kind else 4,
        "xq": _rows(a.rows, a.xq_stride, a.columns, 1),
        "h": _rows(a.rows, a.h_stride, a.columns, item),
        **_modality(a),
    }


def _activation(a: Any) -> dict[str, int]:
    item = _BYTES[a.dtype]
    base = a.hadamard_base
    words = 32 * -(-base // 8) * -(-2 * -(-base // 16) // 16)
    return {
        "x": _rows(a.rows, a.x_stride, a.columns * (2 if a.gated else 1), item),
        "scale": 8 if a.modality_kind else 4,
        "hadamard": 4 * words,
        "split": 4 * a.split_columns,
        "xq": _rows(a.rows, a.xq_stride, a.columns, 1),
        "y": _rows(a.rows, a.y_stride, a.columns, item),
        "x_split": _rows(a.rows, a.x_split_stride, a.split_columns, item),
        **_modality(a),
    }


def _cache(a: Any) -> dict[str, int]:
    rows = a.batch * a.kv_heads * a.capacity
    data = rows * a.head_dim * _BYTES[a.cache_dtype]
    return {
        "key_cache": data,
        "value_cache": data,
        "key_scale": 4 * rows,
        "value_scale": 4 * rows,
        "past": 8,
    }


def _rotary(a: Any) -> dict[str, int]:
    item, tokens = _BYTES[a.dtype], a.batch * a.tokens
    table = tokens * a.rotary_dim * _BYTES[a.table_dtype]
    return {
        "q": _rows(tokens, a.q_stride, a.q_heads * a.head_dim, item),
        "k": _rows(tokens, a.k_stride, a.kv_heads * a.head_dim, item),
        "v": _rows(tokens, a.v_stride, a.kv_heads * a.head_dim, item),
        "cos": table,
        "sin": table,
        **_cache(a),
    }


def _rotate(a: Any) -> dict[str, int]:
    item, width = _BYTES[a.dtype], a.heads * a.head_dim
    table = a.angle_rows * a.rotary_dim * _BYTES[a.table_dtype]
    return {
        "x": _rows(a.rows, a.x_stride, width, item),
        "y": _rows(a.rows, a.y_stride, width, item),
        "cos": table,
        "sin": table,
    }


def _attention(a: Any) -> dict[str, int]:
    item, tokens = _BYTES[a.dtype], a.batch * a.tokens
    width = a.q_heads * a.head_dim
    return {
        "q": _rows(tokens, a.q_stride, width, item),
        "out": _rows(tokens, a.out_stride, width, item),
        "mask": _rows(tokens, a.mask_stride, a.tokens, 1),  # and `past` columns before these
        "workspace": a.workspace_bytes,
        **_cache(a),
    }


def _embedding(a: Any) -> dict[str, int]:
    return {
        "ids": 8 * a.rows,
        "table": a.vocabulary * a.columns * _BYTES[a.table_dtype],
        "scale": 4 * a.vocabulary,
        "y": a.rows * a.columns * _BYTES[a.dtype],
    }


def _top_k(a: Any) -> dict[str, int]:
    return {
        "x": _rows(a.rows, a.x_stride, a.columns, _BYTES[a.dtype]),
        "values": 4 * a.rows * a.k,
        "indices": 8 * a.rows * a.k,
        "workspace": a.workspace_bytes,
    }


_EXTENTS = {
    "linear": _linear,
    "rms_norm_quantize": _norm,
    "activation_quantize": _activation,
    "rotary_cache": _rotary,
    "rotate": _rotate,
    "attention": _attention,
    "embedding": _embedding,
    "top_k": _top_k,
}


def extents(name: str, arguments: Any) -> dict[str, int]:
    """Pointer -> bytes that ``mqc_<name>`` may read or write behind it, where it is given."""
    return _EXTENTS[name](arguments)
