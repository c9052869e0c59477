"""The static memory plan: no two living values share a byte, and little is wasted."""

from __future__ import annotations

import itertools
from pathlib import Path

import cuda_cases
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from mqc.backends.cuda.emit import plan_json, read_plan
from mqc.backends.cuda.executor import Arena
from mqc.backends.cuda.plan import ALIGNMENT, Value, lifetimes, solve
from mqc.errors import ArtifactError

LIFE = st.tuples(st.integers(0, 20), st.integers(0, 6), st.integers(1, 4000))


def overlaps(values: list[Value], sizes: dict[str, int]) -> list[tuple[str, str]]:
    layout = solve(values, sizes)
    found = []
    for one, other in itertools.combinations(values, 2):
        if one.last < other.first or other.last < one.first:
            continue
        a, b = (layout.places[v.node, v.index][0] for v in (one, other))
        if a < b + other.nbytes(sizes) and b < a + one.nbytes(sizes):
            found.append((one.node, other.node))
    return found


@given(st.lists(LIFE, min_size=1, max_size=25))
def test_lives_that_overlap_do_not_share_bytes(lives: list[tuple[int, int, int]]) -> None:
    values = [
        Value(f"n{i}", 0, (size,), torch.float32, first, first + length)
        for i, (first, length, size) in enumerate(lives)
    ]
    assert overlaps(values, {}) == []
    layout = solve(values, {})
    alive = [sum(v.nbytes({}) for v in values if v.first <= step <= v.last) for step in range(27)]
    total = sum(-(-v.nbytes({}) // ALIGNMENT) * ALIGNMENT for v in values)
    assert max(alive) <= layout.nbytes <= total


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("tokens", [1, 37, 1024])
def test_plans_of_models(name: str, tokens: int) -> None:
    component = cuda_cases.lowered(name).components["decoder"]
    values = lifetimes(component)
    sizes = {"batch": 2, "tokens": tokens, "rows": 1}
    assert len(values) == 4 * 9 + 1 and overlaps(values, sizes) == []
    layout = solve(values, sizes)
    assert layout.nbytes < 0.25 * sum(value.nbytes(sizes) for value in values)
    outputs = {node.name for node in component.output_node.all_input_nodes}
    assert not outputs & {value.node for value in values}


def test_arena_serves_smaller_sizes_and_falls_back_for_larger_ones() -> None:
    values = [Value("a", 0, (1, "tokens", 20), torch.int8, 0, 1)]
    arena = Arena(values, {"tokens": 4}, torch.device("cpu"))
    assert arena.layout.nbytes == ALIGNMENT and arena.holds({"tokens": 3})
    small = arena.view("a", 0, (1, 3, 20), torch.int8)
    assert small.shape == (1, 3, 20) and small.stride() == (96, 32, 1)
    assert small.data_ptr() == arena.memory.data_ptr()
    large = arena.view("a", 0, (1, 40, 20), torch.int8)
    assert large.stride(1) == 32 and large.data_ptr() != arena.memory.data_ptr()
    assert not arena.holds({"tokens": 5})


def test_plan_as_a_file(tmp_path: Path) -> None:
    import json

    program = cuda_cases.lowered("tiny-llava")
    (tmp_path / "plan.json").write_text(json.dumps(plan_json(program)))
    plans = read_plan(tmp_path)
    assert plans == {part.name: lifetimes(part) for part in program}
    (tmp_path / "plan.json").write_text('{"format": 9}')
    with pytest.raises(ArtifactError, match="format 9"):
        read_plan(tmp_path)
