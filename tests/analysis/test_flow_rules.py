"""Rules of the channel flow that single families need, on graphs of a few nodes."""

from __future__ import annotations

import pytest
import torch
from programs import Builder

from mqc.analysis.flow import ChannelFlow
from mqc.analysis.mlp import find_feed_forward
from mqc.ir import Component, ParamStore, Port, Program, TensorType
from mqc.ir.edit import aten
from mqc.numerics.stats import relative_error
from mqc.passes.fuse_norm import FuseNorm
from mqc.transform import PassContext, PassManager

ROWS = TensorType(("patches", 8), torch.float64)


def program(builder: Builder, output: object, kind: TensorType, inputs: list[Port]) -> Program:
    """One component with random parameters for every name that the graph reads."""
    builder.graph.output((output,))
    params = ParamStore()
    generator = torch.Generator().manual_seed(0)
    for node in builder.graph.find_nodes(op="get_attr"):
        shape = [int(size) for size in node.meta["type"].shape]
        params[str(node.target)] = torch.randn(shape, generator=generator, dtype=torch.float64)
    ports = [Port("y", kind, (None,) * kind.rank)]
    component = Component("part", builder.graph, inputs, ports)
    return Program({"part": component}, params, [], {}, torch.float64, "canonical")


class Typed(Builder):
    def weight(self, name: str, *shape: int) -> object:
        node = self.param(name)
        node.meta = {"type": TensorType(shape, torch.float64)}
        return node


@pytest.mark.parametrize("kind", ["rows", "number", "sum"])
def test_a_norms_bias_is_not_folded_through_a_scale(kind: str) -> None:
    """``W (c (g n + b))`` is not ``c W g n + W b``."""
    b = Typed()
    x = b.input("x", ROWS)
    factor = b.input("factor", TensorType(("patches", 1), torch.float64))
    gain, bias = b.weight("g", 8), b.weight("b", 8)
    norm = b.call(aten.layer_norm.default, x, [8], gain, bias, 1e-5, kind=ROWS)
    if kind == "sum":
        one = TensorType(("patches", 1, 8), torch.float64)
        wide = b.call(aten.unsqueeze.default, norm, 1, kind=one)
        both = b.call(
            aten.cat.default, [wide, wide], 1, kind=TensorType(("patches", 2, 8), torch.float64)
        )
        scaled = b.call(aten.sum.dim_IntList, both, [1], kind=ROWS)
    else:
        scaled = b.call(aten.mul.Tensor, norm, factor if kind == "rows" else 3.0, kind=ROWS)
    linear = b.call(aten.linear.default, scaled, b.weight("w", 8, 8), kind=ROWS)
    ports = [
        Port("x", ROWS, ("patch", None)),
        Port("factor", TensorType(("patches", 1), torch.float64), ("patch", None)),
    ]
    before = program(b, linear, ROWS, ports)
    manager = PassManager([FuseNorm()])
    after = manager.run(before, PassContext())
    (skip,) = manager.records[0].skips
    assert "bias is scaled" in skip.reason
    inputs = torch.randn(5, 8, dtype=torch.float64), torch.rand(5, 1, dtype=torch.float64)
    want, found = (item.module("part")(*inputs)[0] for item in (before, after))
    assert relative_error(want, found) <= 1e-12


def test_rows_of_one_or_the_other_share_a_group() -> None:
    b = Typed()
    x = b.input("x", ROWS)
    choice = b.input("choice", TensorType(("patches", 1), torch.bool))
    left = b.call(aten.linear.default, x, b.weight("a", 8, 8), kind=ROWS)
    right = b.call(aten.linear.default, x, b.weight("c", 8, 8), kind=ROWS)
    where = b.call(aten.where.self, choice, left, right, kind=ROWS)
    last = b.call(aten.linear.default, where, b.weight("d", 8, 8), kind=ROWS)
    flow = ChannelFlow(program(b, last, ROWS, [Port("x", ROWS, ("patch", None))]))
    group = flow.group_of(where)
    assert group is not None and not group.barriers
    assert [site.node for site in group.writers] == [left, right]
    assert [site.node for site in group.readers] == [last]


def test_a_choice_by_channel_is_a_barrier() -> None:
    b = Typed()
    x = b.input("x", ROWS)
    choice = b.input("choice", TensorType(("patches", 8), torch.bool))
    left = b.call(aten.linear.default, x, b.weight("a", 8, 8), kind=ROWS)
    where = b.call(aten.where.self, choice, left, left, kind=ROWS)
    flow = ChannelFlow(program(b, where, ROWS, [Port("x", ROWS, ("patch", None))]))
    group = flow.group_of(left)
    assert group is not None and next(site.node for site in group.barriers) is where


def test_what_a_constant_was_added_to_is_the_source() -> None:
    """So that a norm at a stream's start can give its gain to a linear."""
    b = Typed()
    x = b.input("x", ROWS)
    norm = b.call(aten.rms_norm.default, x, [8], b.weight("g", 8), 1e-5, kind=ROWS)
    placed = b.call(aten.add.Tensor, norm, b.weight("p", 8), kind=ROWS)
    linear = b.call(aten.linear.default, x, b.weight("w", 8, 8), kind=ROWS)
    total = b.call(aten.add.Tensor, placed, linear, kind=ROWS)
    group = ChannelFlow(program(b, total, ROWS, [Port("x", ROWS, ("patch", None))])).group_of(total)
    assert group is not None
    assert [site.node for site in group.sources] == [norm]
    assert [site.node for site in group.constants] == [placed]


def test_gate_and_up_may_be_one_linear() -> None:
    b = Typed()
    x = b.input("x", ROWS)
    wide, half = (
        TensorType(("patches", 12), torch.float64),
        TensorType(("patches", 6), torch.float64),
    )
    both = b.call(aten.linear.default, x, b.weight("gu", 12, 8), kind=wide)
    gate = b.call(aten.slice.Tensor, both, -1, 0, 6, kind=half)
    up = b.call(aten.slice.Tensor, both, -1, 6, 12, kind=half)
    active = b.call(aten.silu.default, gate, kind=half)
    inner = b.call(aten.mul.Tensor, active, up, kind=half)
    down = b.call(aten.linear.default, inner, b.weight("d", 8, 6), kind=ROWS)
    (pair,) = find_feed_forward(program(b, down, ROWS, [Port("x", ROWS, ("patch", None))]))
    assert pair.down is down and pair.up == (both,) and pair.scalable == ()
