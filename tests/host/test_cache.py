"""Capacities of cache buffers."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mqc.host.cache import SMALLEST, grown, next_capacity


@given(st.integers(1, 5000), st.integers(0, 5000), st.one_of(st.none(), st.integers(1, 5000)))
def test_capacity_holds_what_is_needed(needed: int, current: int, limit: int | None) -> None:
    rows = next_capacity(needed, current, limit)
    assert rows >= needed
    assert rows == current if needed <= current else rows > current
    if limit is not None and needed <= limit and needed > current:
        assert rows <= limit
    if needed > current and limit is None:
        assert rows < 2 * needed or rows == SMALLEST


def test_growing_token_by_token_copies_rarely() -> None:
    rows, copies = 0, 0
    for needed in range(1, 4097):
        new = next_capacity(needed, rows, 4096)
        copies += new != rows
        rows = new
    assert rows == 4096 and copies == 7  # 64, 128, ..., 4096


def test_a_larger_buffer_keeps_the_rows_in_use() -> None:
    cache = torch.randn(2, 3, 4, 5)
    larger = grown(cache, 9, 3)
    assert larger.shape == (2, 3, 9, 5)
    assert torch.equal(larger[:, :, :3], cache[:, :, :3]) and not larger[:, :, 3:].any()
