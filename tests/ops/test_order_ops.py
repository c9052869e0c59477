"""The token order of AIFS and rotary angles: by definition, in torch and in stock onnxruntime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import call, run_body


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=3))
def test_token_order(rows: list[list[bool]]) -> None:
    modality = torch.tensor(rows)
    order, place, count, visual = call("token_order", {"modality": modality})
    for b, row in enumerate(rows):
        wanted = [i for i, is_visual in enumerate(row) if is_visual]
        assert count[b] == len(wanted)
        assert order[b].tolist() == wanted + [i for i in range(4) if i not in wanted]
        assert place[b, order[b]].tolist() == [0, 1, 2, 3]
        assert visual[b].tolist() == [i < len(wanted) for i in range(4)]
    made = run_body("token_order", {"modality": modality})
    assert all(map(torch.equal, made, (order, place, count, visual)))


@pytest.mark.parametrize(
    ("shape", "axis"), [((2, 5, 3), 1), ((2, 5), 1), ((3, 2, 5), 2), ((1, 1, 8), 1)]
)
def test_take_tokens(shape: tuple[int, ...], axis: int) -> None:
    last = axis == len(shape) - 1
    x = torch.arange(torch.Size(shape).numel()).reshape(shape)
    x = x if last else x.float()
    batch, tokens = shape[axis - 1 : axis + 1]
    order = torch.stack([torch.randperm(tokens) for _ in range(batch)])
    values: dict[str, Any] = {"x": x, "order": order, "axis": axis}
    got = call("take_tokens", values)
    for b in range(batch):
        for t in range(tokens):
            if last:
                assert torch.equal(got[..., b, t], x[..., b, order[b, t]])
            else:
                assert torch.equal(got[b, t], x[b, order[b, t]])
    assert torch.equal(run_body("take_tokens", values)[0], got)


@pytest.mark.parametrize(("past", "spare", "kinds"), [(0, 0, 1), (3, 0, 2), (3, 2, 1)])
def test_take_keys(past: int, spare: int, kinds: int) -> None:
    batch, tokens = 2, 4
    mask = torch.rand(batch, kinds, tokens, past + tokens + spare) < 0.5
    order = torch.stack([torch.randperm(tokens) for _ in range(batch)])
    values = {"mask": mask, "order": order, "past": torch.tensor([past])}
    got = call("take_keys", values)
    for b in range(batch):
        new = [*range(past), *(past + order[b]).tolist(), *range(past + tokens, mask.shape[3])]
        assert torch.equal(got[b], mask[b][:, order[b]][..., new])
    assert torch.equal(run_body("take_keys", values)[0], got)


@pytest.mark.parametrize("axes", [None, [0, 2, 1, 0]])
def test_rotary_angles(axes: list[int] | None) -> None:
    lead = () if axes is None else (3,)
    positions = torch.randint(0, 4000, (*lead, 2, 5))
    freq = torch.tensor([1.0, 0.1, 0.01, 0.0])
    given = {"positions": positions, "freq": freq}
    given["axes"] = None if axes is None else torch.tensor(axes)
    cos, sin = call("rotary_angles", given)
    assert cos.shape == sin.shape == (2, 5, 4)
    for column in range(4):
        of = positions if axes is None else positions[axes[column]]
        angle = of.float() * freq[column]
        assert torch.equal(cos[..., column], angle.cos())
        assert torch.equal(sin[..., column], angle.sin())
    for made, want in zip(run_body("rotary_angles", given), (cos, sin), strict=True):
        torch.testing.assert_close(made, want, rtol=0, atol=1e-6)
