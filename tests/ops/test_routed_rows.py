"""Rows sorted by the expert they chose: by definition, in torch and in stock onnxruntime."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import call, run_body


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Different experts in each row: some or all of them, some of which nobody may choose."""
    experts = draw(st.integers(1, 6))
    choices = draw(st.integers(1, experts))
    batch, tokens = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    chosen = st.permutations(range(experts)).map(lambda order: order[:choices])
    rows = draw(st.lists(chosen, min_size=batch * tokens, max_size=batch * tokens))
    return torch.tensor(rows).reshape(batch, tokens, choices), experts


@settings(max_examples=25, deadline=None)
@given(routings())
def test_each_expert_gets_its_rows_and_every_row_its_sum(given: tuple[torch.Tensor, int]) -> None:
    """Expert e gives (e + 1) * x: sums are those of the definition, in the experts' order."""
    index, experts = given
    batch, tokens, choices = index.shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, tokens, 3, generator=generator)
    visual = torch.rand(batch, tokens, generator=generator) < 0.5
    weights = torch.rand(batch, tokens, choices, generator=generator)

    rows, place, counts = call("route_rows", {"index": index, "experts": experts})
    routed = {"rows": rows, "counts": counts, "experts": experts}
    parts = call("split_rows", {"x": x, **routed})
    marks = call("split_rows", {"x": visual, **routed})
    for expert in range(experts):
        chosen = (index == expert).any(-1)
        assert counts[expert] == chosen.sum()
        assert torch.equal(parts[expert], x[chosen][None])
        assert torch.equal(marks[expert], visual[chosen][None])
    outputs = [part * (expert + 1) for expert, part in enumerate(parts)]
    joined = {"y": torch.cat(outputs, 1), "weights": weights, "place": place}
    total = torch.zeros_like(x)
    for expert in range(experts):
        weight = (weights * (index == expert)).sum(-1, keepdim=True)
        total = total + x * (expert + 1) * weight
    result = call("join_rows", joined)
    assert torch.equal(result, total)

    made = run_body("route_rows", {"index": index, "experts": experts})
    assert all(map(torch.equal, made, (rows, place, counts)))
    for value, wanted in ((x, parts), (visual, marks)):
        made = run_body("split_rows", {"x": value, **routed})
        assert len(made) == experts and all(map(torch.equal, made, wanted))
    assert torch.equal(run_body("join_rows", joined)[0], result)


def linear(groups: int) -> dict[str, Any]:
    """A quantized linear of no rows."""
    shape = (5, groups) if groups > 1 else (5,)
    return {
        "xq": torch.zeros(1, 0, 8, dtype=torch.uint8),
        "qweight": torch.randint(0, 256, (5, 4), dtype=torch.uint8),
        "w_scale": torch.rand(shape),
        "x_scale": torch.tensor([0.1, 0.2]),
        "modality": torch.zeros(1, 0, dtype=torch.bool),
        "bias": torch.rand(5),
        "x_split": None,
        "w_split": None,
    }


NO_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("hadamard", {"x": torch.zeros(1, 0, 8), "block": 8}),
    ("hadamard", {"x": torch.zeros(1, 0, 24), "block": 24}),
    ("linear_w4a8", linear(1)),
    ("linear_w4a8", linear(2)),
]


@pytest.mark.parametrize(("name", "values"), NO_ROWS)
def test_bodies_take_no_rows(name: str, values: dict[str, Any]) -> None:
    (made,) = run_body(name, values)
    assert made.shape == call(name, values).shape and made.numel() == 0


def test_rows_of_one_expert_keep_their_order() -> None:
    index = torch.tensor([[[1], [0], [1], [1], [0]]])
    rows, place, counts = call("route_rows", {"index": index, "experts": 3})
    assert rows.tolist() == [1, 4, 0, 2, 3]
    assert place.flatten().tolist() == [2, 0, 3, 4, 1]
    assert counts.tolist() == [2, 3, 0]
