"""Attention of vision towers as one operator: the same rows, less in memory."""

from __future__ import annotations

import pytest
import torch
from onnx_cases import float_program, inputs_of
from programs import captured
from tiny import NAMES, program

from mqc.ir import Component, ParamStore, Port, Program, TensorType
from mqc.ir.edit import aten, call
from mqc.passes.canonicalize import Canonicalize
from mqc.passes.fuse_tower_attention import FuseTowerAttention
from mqc.testing.families import FAMILIES
from mqc.transform import PassContext, PassManager
from mqc.transform.equivalence import end_to_end_error

_SDPA = aten.scaled_dot_product_attention.default
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
    assert counts["attentions"] == 4 and counts.get("packed", 0) == PACKED[name]
    assert counts.get("rotary", 0) == (4 if name == "tiny-qwen2-vl" else 0)
    targets = [str(node.target) for node in after.components["vision"].graph.nodes]
    assert "aten.scaled_dot_product_attention.default" not in targets
    for size in (1, 3):
        sizes = {"blocks": size, "tiles": size, "images": size}
        wanted, found = rows(before, sizes), rows(after, sizes)
        assert float((wanted - found).abs().max()) < 1e-10 * float(wanted.abs().max())


TURNED = {"glm4v": 2, "llava:pixtral": 2, "mistral3": 2, "qwen2_5_vl": 2, "qwen2_vl": 2}
TURNED |= {"qwen3_vl": 3, "qwen3_vl_moe": 2}
"""Attentions of the families' towers with a rotary embedding."""
ONE_LINEAR = {"blip-2": 2, "instructblip": 2, "paper_experts": 2}
ONE_LINEAR |= {name: count for name, count in TURNED.items() if name[:2] in ("gl", "qw")}
MASKED = {"qwen2_5_vl": 1, "blip-2": 3, "instructblip": 3}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family(name: str) -> None:
    """Towers, resamplers and query transformers, in float64, end to end."""
    wide = captured(name, torch.float64)
    before = PassManager([Canonicalize()]).run(wide, PassContext())
    vision = before.components["vision"].graph
    found = len(vision.find_nodes(op="call_function", target=_SDPA))
    manager = PassManager([FuseTowerAttention()])
    after = manager.run(before, PassContext())
    record = manager.records[0]
    assert record.counts["attentions"] == found >= 2 and not record.skips
    for what, wanted in (("rotary", TURNED), ("packed", ONE_LINEAR), ("masked", MASKED)):
        assert record.counts.get(what, 0) == wanted.get(name, 0), what
    assert end_to_end_error(before, after, seed=3) <= 1e-12


def test_decoders_are_left_alone() -> None:
    before = float_program("qwen2_vl")
    after, _ = fused(before)
    count = len(after.components["decoder"].graph.nodes)
    assert count == len(before.components["decoder"].graph.nodes)


@pytest.mark.parametrize("kind", ["mask", "wide mask", "float mask", "plain", "grouped", "causal"])
def test_forms_of_attention(kind: str) -> None:
    """Masks, groups of heads, readers that need heads apart; what does not fit has a reason."""
    rows = TensorType((2, 4, "rows", 6), torch.float64)
    keys = TensorType((2, 2 if kind == "grouped" else 4, "keys", 6), torch.float64)
    mask = TensorType((1, 1, 1 if kind == "wide mask" else "rows", "keys"), torch.bool)
    mask = mask.with_dtype(torch.float64) if kind == "float mask" else mask
    graph = torch.fx.Graph()
    types = {"q": rows, "k": keys, "v": keys, "mask": mask}
    ports = [Port(name, what, (None,) * 4) for name, what in types.items()]
    given = []
    for port in ports:
        given.append(graph.placeholder(port.name))
        given[-1].meta = {"type": port.type}
    args = tuple(given if "mask" in kind else given[:3])
    node = call(graph, _SDPA, args, rows, given[0])
    if kind == "grouped":
        node.kwargs = {"enable_gqa": True}
    if kind == "causal":
        node.kwargs = {"is_causal": True}
    graph.output((node,))
    component = Component("vision", graph, ports, [Port("out", rows, (None,) * 4)])
    before = Program({"vision": component}, ParamStore(), [], {})
    manager = PassManager([FuseTowerAttention()])
    after = manager.run(before, PassContext())
    reasons = {
        "wide mask": "its mask has not a row for every query",
        "float mask": "its mask is not one of booleans",
        "causal": "it has dropout or an implicit causal mask",
    }
    record = manager.records[0]
    assert [skip.reason for skip in record.skips] == [reasons[k] for k in reasons if k == kind]
    assert record.counts.get("attentions", 0) == (kind not in reasons)
    assert record.counts.get("masked", 0) == (kind == "mask")
    generator = torch.Generator().manual_seed(0)
    tokens = 7 if kind == "causal" else 5
    q = torch.randn(2, 4, tokens, 6, generator=generator, dtype=torch.float64)
    k, v = (
        torch.randn(2, int(keys.shape[1]), 7, 6, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    allowed = torch.ones(1, 1, 1 if kind == "wide mask" else tokens, 7).tril(2).to(mask.dtype)
    (wanted,), (found,) = (p.module("vision")(q, k, v, allowed) for p in (before, after))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
