"""Packing as lists: found from the model's own function, equal to it on features."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from mqc.capture.adapters.packed import pack_lists


def apply(index: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return (rows[index] * weight[..., None].to(rows.dtype)).sum(1)


def shrink(rows: torch.Tensor) -> torch.Tensor:
    """The first row as it is, then a 4x6 grid shrunk to 3x4 bilinearly."""
    grid = rows[1:25].reshape(4, 6, -1).permute(2, 0, 1)[None]
    small = interpolate(grid, [3, 4], mode="bilinear")[0]
    return torch.cat([rows[:1], small.flatten(1).T])


@pytest.mark.parametrize("taps", [1, 4])
def test_picking_and_repeating(taps: int) -> None:
    rows = torch.randn(9, 5, dtype=torch.float64)
    index, weight = pack_lists(lambda x: x[[4, 4, 0, 8]], 9, taps)
    assert index.shape == weight.shape == (4, taps)
    assert torch.equal(apply(index, weight, rows), rows[[4, 4, 0, 8]])


def test_bilinear() -> None:
    rows = torch.randn(25, 5, dtype=torch.float64)
    index, weight = pack_lists(shrink, 25, 4)
    torch.testing.assert_close(apply(index, weight, rows), shrink(rows), rtol=1e-6, atol=1e-6)
    assert weight[0].tolist() == [1.0, 0.0, 0.0, 0.0]


def test_many_rows_are_asked_about_in_blocks() -> None:
    def mean(x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (x + x.flip(0))

    rows = torch.randn(600, 2, dtype=torch.float64)
    index, weight = pack_lists(mean, 600, 2)
    assert torch.allclose(apply(index, weight, rows), mean(rows))


def test_too_many_rows_mixed() -> None:
    with pytest.raises(ValueError, match="more than 2 rows"):
        pack_lists(lambda x: x.mean(0, keepdim=True), 3, 2)
