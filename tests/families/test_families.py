"""Every family of the table, end to end: capture, all passes, two targets, generation."""

from __future__ import annotations

import pytest
from programs import captured

from mqc.testing.families import FAMILIES
from mqc.testing.families.chats import CHATS
from mqc.testing.families.row import measure

ONLINE = {
    "glm4v": 4,
    "gemma3": 5,
    "minicpmv4_6": 1,
    "minicpmv4_6:dense": 1,
    "minicpmv4_7": 1,
    "paper_experts": 4,
}
"""Rotations that no fold can remove: a gain between the norm that writes a stream and the stream
(post-norm blocks), or between two norms."""


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_family(name: str) -> None:
    """Streams rotated, linears quantized, functions preserved, targets in agreement.

    The float check is exact arithmetic in float64 (1e-10); transformers computes some positions
    in float32, hence the bound on the capture.
    """
    row = measure(name, take=captured)
    assert row.captured, row.reason
    assert row.capture_error is not None and row.capture_error <= 1e-6
    assert row.float_error is not None and row.float_error <= 1e-10
    assert (row.video_error is None) == (name not in CHATS)
    assert row.video_error is None or row.video_error <= 1e-10
    for kind, (rotated, found) in row.streams.items():
        assert rotated == found >= 1, kind
    assert row.online_rotations == ONLINE.get(name, 0), row.skips
    assert row.quantized_weights >= 0.99
    assert row.onnx_agreement is not None and row.onnx_agreement >= 0.95
    assert row.aifs_agreement == 1.0
