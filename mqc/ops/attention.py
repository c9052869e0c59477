"""mqc::attention: rotary embedding, cache update and grouped attention in one operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mqc.errors import UsageError
from mqc.ops._heads import (
    FORBIDDEN,
    check_rotary,
    end_of,
    repeated,
    rotary_flags,
    rotate,
    rotate_body,
    slice_body,
)
from mqc.ops._library import Arguments, OnnxForm, OpDef, register

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body


class Call(NamedTuple):
    """The arguments of mqc::attention, and of mqc::attention_int8, in schema order.

    ``caches``: the key and the value cache; of int8 rows also the scales of both.
    """

    q: Tensor
    k: Tensor | None
    v: Tensor | None
    caches: tuple[Tensor, ...]
    past: Tensor
    mask: Tensor
    cos: Tensor | None
    sin: Tensor | None
    scale: float
    rotary: str

    @classmethod
    def of(cls, *given: Any) -> Call:
        """From the operator's arguments, in which the caches stand one by one."""
        return cls._make((*given[:3], given[3:-6], *given[-6:]))

    def turned(self) -> tuple[Tensor, Tensor, Tensor]:
        """:func:`heads_of` with queries and keys rotated."""
        check_rotary(self.rotary, self.cos, self.sin)
        q, k, v = heads_of(self.q, self.k, self.v, self.caches[0])
        if self.cos is not None and self.sin is not None:
            cos, sin = self.cos.unsqueeze(1), self.sin.unsqueeze(1)
            q, k = rotate(q, cos, sin, self.rotary), rotate(k, cos, sin, self.rotary)
        return q, k, v

    def appended(self, *new: Tensor) -> tuple[Tensor, ...]:
        """The caches, each with its new rows [B, Hkv, S, ..]. Raises UsageError on a short mask."""
        start, rows = int(self.past.item()), self.mask.shape[3]
        end = start + new[0].shape[2]
        if rows < end:
            raise UsageError(f"a mask of {rows} columns for {end} keys")
        return tuple(append(c, n, start, rows) for c, n in zip(self.caches, new, strict=True))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Rows [B, S, Hq * Dv] of rotated ``q`` [B, Hq, S, D] over the rows that are in use."""
        end, repeats = int(self.past.item()) + q.shape[2], q.shape[1] // keys.shape[1]
        keys, values = (repeated(x[:, :, :end], repeats) for x in (keys, values))
        out: Tensor = torch.ops.aten.scaled_dot_product_attention.default(
            q, keys, values, self.mask[..., :end], scale=self.scale
        )
        return out.transpose(1, 2).flatten(2)


def heads_of(
    q: Tensor, k: Tensor | None, v: Tensor | None, key_cache: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as [B, heads, S, D]; packed ones (k and v None) are taken apart.

    Raises:
        UsageError: where the heads do not fit the cache's.
    """
    groups = key_cache.shape[1]
    if (k is None) != (v is None):
        raise UsageError("k and v come together, or packed in q: one of the two is missing")
    if k is None or v is None:
        q, k, v = q.split([q.shape[2] - 2 * groups, groups, groups], dim=2)
    if k.shape[2] != groups or q.shape[2] < groups or q.shape[2] % groups:
        raise UsageError(
            f"{q.shape[2]} query and {k.shape[2]} key heads do not fit a cache of {groups} heads",
            hint="key heads are the cache's, and divide the query heads",
        )
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def append(cache: Tensor, new: Tensor, past: int, keys: int) -> Tensor:
    """``cache`` with ``new`` at rows past.., grown to ``keys`` rows where it is shorter."""
    end = past + new.shape[2]
    if past > cache.shape[2] or (keys > cache.shape[2] and keys != end):
        raise UsageError(
            f"a cache of {cache.shape[2]} rows does not hold {past} past rows and {keys} keys",
            hint="give the cache as many rows as the mask has columns, or exactly `past`",
        )
    return torch.cat([cache[:, :, :past], new.to(cache.dtype), cache[:, :, end:]], dim=2)


def reference(*given: Any) -> tuple[Tensor, ...]:
    """softmax(scale * rot(q) K^T, where mask) V, with K and V the past rows and the new ones.

    Query head h attends key head h // (Hq / Hkv). Nothing is repeated.

    Args:
        q: float [B, S, Hq, D]; or [B, S, Hq + 2 Hkv, D], keys and values packed after the queries.
        k, v: float [B, S, Hkv, D] and [B, S, Hkv, Dv], or None where packed.
        key_cache, value_cache: [B, Hkv, C, D] and [B, Hkv, C, Dv]; rows from ``past`` on are not
            read. Keys in the cache are rotated.
        past: int64 [1], the same for all sequences.
        mask: bool [B, 1, S, M], True = may attend, M >= past + S; column j is key row j. Columns
            from past + S on are ignored.
        cos, sin: [B or 1, S, R], R <= D even; None with rotary "none".
        scale: of the scores.
        rotary: "none", "half" or "interleaved" (:func:`rotate`).

    Returns:
        (out [B, S, Hq * Dv], key cache, value cache). The caches have max(C, M) rows: where the
        given ones are too short they grow, which is possible for M = past + S. Kernels may write
        the new rows in place, where input and output cache are the same memory.

    Raises:
        UsageError: on arguments that do not fit each other.
    """
    call = Call.of(*given)
    q, k, v = call.turned()
    caches = call.appended(k, v)
    return call.attend(q, *caches), *caches


def fake(*given: Any) -> tuple[Tensor, ...]:
    """Shape function: the output and the caches, as long as the longer of cache and mask."""
    call = Call.of(*given)
    q, caches = call.q, call.caches
    heads = q.shape[2] if call.k is not None else q.shape[2] - 2 * caches[0].shape[1]
    rows = torch.sym_max(caches[0].shape[2], call.mask.shape[3])
    out = q.new_empty((*q.shape[:2], heads * caches[1].shape[3]))
    return out, *(c.new_empty((*c.shape[:2], rows, *c.shape[3:])) for c in caches)


def variant_flags(arguments: Arguments) -> tuple[str, ...]:
    packed = ("packed",) if arguments.get("k") is None else ()
    return (*packed, *rotary_flags(arguments))


def _stop(body: Body) -> str:
    return body("Add", "past", body.dim("q", 1))


def append_body(body: Body, cache: str, new: str, dtype: str = "FLOAT") -> str:
    """The cache with the new rows: one longer than the past, or a buffer with rows replaced."""

    def inside(inner: Body) -> str:
        head = slice_body(inner, cache, inner.axes(0), "past", 2)
        tail = slice_body(inner, cache, _stop(inner), end_of(inner), 2)
        return inner("Concat", head, new, tail, axis=2)

    full = body("Equal", "past", body.dim(cache, 2))
    return body.choose(full, lambda inner: inner("Concat", cache, new, axis=2), inside, dtype)


def _body(body: Body, flags: Sequence[str]) -> tuple[str, ...]:
    """Grouped query heads are stacked along tokens: one product a key head, nothing repeated.

    Scores are made of all rows of the cache, so that no row is copied out of it; those after
    the mask's columns are forbidden.
    """
    q, k, v = heads_body(body, flags)
    keys, values = append_body(body, "key_cache", k), append_body(body, "value_cache", v)
    return attend_body(body, q, keys, values), keys, values


def heads_body(body: Body, flags: Sequence[str]) -> tuple[str, str, str]:
    """Rotated queries [B, S, Hq, D]; rotated keys and values as caches have them, [B, H, S, D]."""
    end = end_of(body)
    q, k, v = "q", "k", "v"
    if "packed" in flags:
        minus = body("Neg", body.dim("key_cache", 1))
        first = body("Mul", minus, body.axes(2))
        k, v = slice_body(body, "q", first, minus, 2), slice_body(body, "q", minus, end, 2)
        q = slice_body(body, "q", body.axes(0), first, 2)
    if "half" in flags or "interleaved" in flags:
        q, k = rotate_body(body, q, flags), rotate_body(body, k, flags)
    k, v = (body("Transpose", x, perm=[0, 2, 1, 3]) for x in (k, v))
    return q, k, v


def attend_body(body: Body, q: str, keys: str, values: str) -> str:
    """Attention of rotated ``q`` to the rows of float caches, as rows [B, S, Hq * Dv]."""
    groups, swap = body.dim("key_cache", 1), [0, 2, 1, 3]
    scaled = body("Mul", body("Transpose", q, perm=swap), body.attribute("scale"))
    heads, minus_one, zero = body.dim(scaled, 1), body.axes(-1), body.axes(0)
    width = body.dim(keys, 3)
    stacked = body("Reshape", scaled, body("Concat", zero, groups, minus_one, width, axis=0))
    scores = body("MatMul", stacked, body("Transpose", keys, perm=[0, 1, 3, 2]))
    scores = _masked_body(body, scores, keys, body("Div", heads, groups))
    out = body("MatMul", body("Softmax", scores, axis=-1), values)
    shape = body("Concat", zero, heads, minus_one, body.dim(values, 3), axis=0)
    rows = body("Transpose", body("Reshape", out, shape), perm=swap)
    return body("Reshape", rows, body.axes(0, 0, -1))


def _masked_body(body: Body, scores: str, keys: str, repeats: str) -> str:
    """``scores`` [B, Hkv, repeats * S, rows of the cache], low where the mask forbids.

    The numbers to add are made of common inputs alone, so onnxruntime makes them once for all
    layers; they are padded where the cache has more rows than there are keys.
    """
    allowed = body("Where", "mask", body.constant(np.float32(0)), body.constant(FORBIDDEN))
    times = body("Concat", body.axes(1, 1), repeats, body.axes(1), axis=0)
    mask = body("Tile", allowed, times)

    def padded(inner: Body) -> str:
        stop = _stop(inner)
        known = slice_body(inner, mask, inner.axes(0), stop, 3)
        more = inner("Sub", inner.dim(keys, 2), stop)
        pads = inner("Concat", inner.axes(0, 0, 0, 0, 0, 0, 0), more, axis=0)
        return inner("Add", scores, inner("Pad", known, pads, inner.constant(FORBIDDEN)))

    exact = body("Equal", body.dim(keys, 2), _stop(body))
    return body.choose(exact, lambda inner: inner("Add", scores, mask), padded)


def define(
    name: str,
    form: str,
    caches: tuple[str, ...],
    reference: Callable[..., tuple[Tensor, ...]],
    body: Callable[[Body, Sequence[str]], tuple[str, ...]],
    dtypes: Mapping[str, str],
) -> OpDef:
    """Register an operator of a :class:`Call`: ``caches`` are the names of what it appends to."""
    tensors = ", ".join(f"Tensor {cache}" for cache in caches)
    results = ", ".join(f"Tensor new_{cache}" for cache in caches)
    outputs = ("out", *(f"new_{cache}" for cache in caches))

    def inputs(flags: Sequence[str]) -> tuple[str, ...]:
        apart = () if "packed" in flags else ("k", "v")
        angles = ("cos", "sin") if "half" in flags or "interleaved" in flags else ()
        return ("q", *apart, *caches, "past", "mask", *angles)

    return register(
        OpDef(
            name,
            f"(Tensor q, Tensor? k, Tensor? v, {tensors}, Tensor past, Tensor mask, Tensor? cos, "
            f"Tensor? sin, float scale, str rotary) -> (Tensor out, {results})",
            reference,
            fake,
            OnnxForm(
                form,
                variant_flags,
                inputs,
                body,
                {"past": "int64", "mask": "bool", **dtypes},
                attributes=("scale",),
                outputs=lambda flags: outputs,
            ),
        )
    )


OP = define("attention", "Attention", ("key_cache", "value_cache"), reference, _body, {})
