"""Columns are split where they dominate, and only there."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import prepared

from mqc.ir.edit import aten
from mqc.numerics.hadamard import apply_hadamard
from mqc.passes.rms_suppress import MAX_COLUMNS, RmsSuppress
from mqc.transform import PassContext, PassManager
from mqc.transform.equivalence import end_to_end_error


def test_finds_the_mean_column_of_a_rotated_weight() -> None:
    """W H^T with rows of non-zero mean: column 0 is sqrt(n) times the mean (paper, section 3.4)."""
    generator = torch.Generator().manual_seed(0)
    for width in (592, 560, 1024):
        weight = torch.randn(64, width, generator=generator) + 0.5
        rotated = apply_hadamard(weight, width)
        assert RmsSuppress().dominant(rotated) == [0]
        centred = apply_hadamard(weight - weight.mean(1, keepdim=True), width)
        assert RmsSuppress().dominant(centred) == []


@given(st.integers(0, 2**31), st.integers(1, MAX_COLUMNS), st.integers(8, 40))
@settings(max_examples=30, deadline=None)
def test_planted_columns_are_found(seed: int, count: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(16, width, generator=generator) + 0.5
    planted = sorted(torch.randperm(width, generator=generator)[:count].tolist())
    weight[:, planted] *= 50
    assert RmsSuppress().dominant(weight) == planted


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_uniform_weights_are_left_alone(seed: int) -> None:
    weight = torch.rand(16, 32, generator=torch.Generator().manual_seed(seed)) + 1.0
    assert RmsSuppress().dominant(weight) == []
    assert RmsSuppress().dominant(torch.zeros(4, 8)) == []


def test_activation_outliers_count_too() -> None:
    ranges = torch.ones(32)
    ranges[5] = 10.0
    assert RmsSuppress().dominant(torch.rand(16, 32) + 1.0, ranges) == [5]


def test_split_columns_are_zero_and_shared_by_all_readers() -> None:
    program = prepared("llava", "fuse-norm").copy()
    decoder = program.components["decoder"]
    queries = next(
        n
        for n in decoder.graph.find_nodes(op="call_function", target=aten.linear.default)
        if "q_proj" in str(n.args[1])
    )
    name = str(queries.args[1].target)  # type: ignore[union-attr]
    weight = program.params[name].clone()
    weight[:, 3] *= 100
    program.params[name] = weight
    manager = PassManager([RmsSuppress()])
    result = manager.run(program, PassContext())
    detail = next(d for d in manager.records[0].details if any("q_proj" in x for x in d["layers"]))
    assert detail["columns"] == [3] and len(detail["layers"]) == 3
    assert end_to_end_error(program.to(torch.float64), result.to(torch.float64)) <= 1e-6
    for node in result.components["decoder"].graph.nodes:
        if node.target == torch.ops.mqc.rank_update.default and "layers.0.self_attn" in str(
            node.args[2]
        ):
            kept = result.params[str(node.args[0].args[1].target)]
            assert not kept[:, 3].any()
