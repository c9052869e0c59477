"""KV caches as buffers: rows of fixed capacity, of which the first ones are in use.

A program with ``facts["cache"] == "buffer"`` (pass fuse-attention) takes and returns such caches
and the number of rows in use; others take and return caches that are as long as the past.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

BUFFER = "buffer"
"""``facts["cache"]`` of a decoder with buffers; "growing" or nothing otherwise."""
KV_CACHE = "kv_cache"
"""The fact that says what a lowered decoder's buffers are to hold: "int8"; floats without it."""
SMALLEST = 64
"""Rows of the smallest buffer."""


def is_buffer(facts: Mapping[str, Any]) -> bool:
    """Whether a decoder's caches are buffers."""
    return facts.get("cache") == BUFFER


def past_of(mask: torch.Tensor) -> int:
    """Rows in use before a call whose mask is bool [B, M, T, past + T]."""
    return int(mask.shape[3] - mask.shape[2])


def next_capacity(needed: int, current: int, limit: int | None = None) -> int:
    """Rows of a buffer that holds ``needed`` of them: ``current`` where they fit, else doubled.

    Doubling copies each row a constant number of times however long the text grows. ``limit``
    (the model's positions) bounds it, for no row beyond is ever needed; more than ``limit``
    ``needed`` rows are given all the same.
    """
    if needed <= current:
        return current
    rows = max(SMALLEST, current)
    while rows < needed:
        rows *= 2
    return rows if limit is None else max(needed, min(rows, limit))


def grown(cache: torch.Tensor, rows: int, used: int) -> torch.Tensor:
    """A buffer [B, heads, rows, ...] that starts with the ``used`` first rows of ``cache``."""
    result = cache.new_zeros(*cache.shape[:2], rows, *cache.shape[3:])
    result[:, :, :used] = cache[:, :, :used]
    return result
