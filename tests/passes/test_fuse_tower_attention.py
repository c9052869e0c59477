"""Attention of vision towers as one operator: the same rows, less in memory."""

from __future__ import annotations

import pytest
import torch
from onnx_cases import float_program, inputs_of
from tiny import NAMES, program

from mqc.ir import Component, ParamStore, Port, Program, TensorType
from mqc.ir.edit import aten, call
from mqc.passes.canonicalize import Canonicalize
from mqc.passes.fuse_tower_attention import FuseTowerAttention
from mqc.transform import PassContext, PassManager

PACKED = {"tiny-qwen2-vl": 4, "tiny-llava": 0, "tiny-internvl": 0}
"""Attentions that read one linear's result; the others have three linears until they are merged."""


def fused(before: Program) -> tuple[Program, dict[str, int]]:
    manager = PassManager([FuseTowerAttention()])
    after = manager.run(before, PassContext())
    return after, dict(manager.records[0].counts)


def rows(program: Program, sizes: dict[str, int]) -> torch.Tensor:
    component = program.components["vision"]
    generated = inputs_of(component, **sizes)
    values = [generated[port.name].to(port.type.dtype) for port in component.inputs]
    with torch.no_grad():
        return torch.cat([rows.flatten() for rows in program.module("vision")(*values)])


@pytest.mark.parametrize("name", NAMES)
def test_towers_keep_their_rows(name: str) -> None:
    before = PassManager([Canonicalize()]).run(program(name), PassContext()).to(torch.float64)
    after, counts = fused(before)
    assert counts["attentions"] == 4 and counts["packed"] == PACKED[name]
    assert counts.get("rotary", 0) == (4 if name == "tiny-qwen2-vl" else 0)
    targets = [str(node.target) for node in after.components["vision"].graph.nodes]
    assert "aten.scaled_dot_product_attention.default" not in targets
    for size in (1, 3):
        sizes = {"blocks": size, "tiles": size, "images": size}
        wanted, found = rows(before, sizes), rows(after, sizes)
        assert float((wanted - found).abs().max()) < 1e-10 * float(wanted.abs().max())


def test_decoders_are_left_alone() -> None:
    before = float_program("qwen2_vl")
    after, _ = fused(before)
    count = len(after.components["decoder"].graph.nodes)
    assert count == len(before.components["decoder"].graph.nodes)


def test_masks_and_other_readers() -> None:
    """Attention with a mask stays; readers that need heads apart get them."""
    kind = TensorType((1, 2, "rows", 4), torch.float32)
    mask = TensorType((1, 1, "rows", "rows"), torch.bool)
    graph = torch.fx.Graph()
    ports = [Port(name, kind, (None,) * 4) for name in "qkv"] + [Port("mask", mask, (None,) * 4)]
    given = []
    for port in ports:
        given.append(graph.placeholder(port.name))
        given[-1].meta = {"type": port.type}
    plain = call(graph, aten.scaled_dot_product_attention.default, tuple(given[:3]), kind, given[0])
    masked = call(graph, aten.scaled_dot_product_attention.default, tuple(given), kind, given[0])
    graph.output((plain, masked))
    outputs = [Port(name, kind, (None,) * 4) for name in ("plain", "masked")]
    components = {"vision": Component("vision", graph, ports, outputs)}
    before = Program(components, ParamStore(), [], {})
    manager = PassManager([FuseTowerAttention()])
    after = manager.run(before, PassContext())
    assert manager.records[0].counts["attentions"] == 1
    assert [skip.reason for skip in manager.records[0].skips] == ["it has dropout or a mask"]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 4, generator=generator) for _ in range(3))
    values = (q, k, v, torch.ones(1, 1, 5, 5, dtype=torch.bool).tril())
    for wanted, found in zip(
        before.module("vision")(*values), after.module("vision")(*values), strict=True
    ):
        assert torch.allclose(wanted, found, atol=1e-6)
