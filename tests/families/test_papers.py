"""Structures of older models: what the analyses and passes make of them."""

from __future__ import annotations

import pytest
import torch
from programs import captured, prepared
from torch import fx

from mqc.analysis.attention import ValueOutputPair, find_attention
from mqc.analysis.flow import ChannelFlow, is_linear
from mqc.analysis.modality import MIXED, VISUAL, find_domains
from mqc.analysis.streams import find_streams
from mqc.capture import probe
from mqc.ir import Program
from mqc.ir.edit import aten, tensor_type
from mqc.testing.families import build_family

hadamard = torch.ops.mqc.hadamard.default


def norms(program: Program, width: int) -> list[fx.Node]:
    """Norms of the tower over ``width`` channels."""
    nodes = program.components["vision"].graph.nodes
    kinds = (aten.layer_norm.default, aten.rms_norm.default)
    return [n for n in nodes if n.target in kinds and tensor_type(n).shape[-1] == width]


@pytest.mark.parametrize("name", ["paper_queries", "paper_slices"])
def test_positions_of_keys_do_not_part_a_norm_from_its_readers(name: str) -> None:
    """Keys read ``norm(x) + position`` and values ``norm(x)``: the gain goes into both."""
    before, after = captured(name), prepared(name, "fuse-norm")
    assert any(node.args[2] is not None for node in norms(before, 48))
    assert len(norms(after, 48)) == 2  # of the keys and values, and after the resampler
    assert all(node.args[2] is None for node in norms(after, 48))


@pytest.mark.parametrize("name", ["paper_queries", "paper_slices"])
def test_resampler_is_rotated_and_its_heads_are_paired(name: str) -> None:
    program = prepared(name, "hadamard-fuse")
    assert not [n for n in norms(program, 48) if n.target == aten.layer_norm.default]
    pairs = [p for p in find_attention(prepared(name, "fuse-norm")) if p.component == "vision"]
    assert len(pairs) == 3 and all(isinstance(pair, ValueOutputPair) for pair in pairs)


def test_rows_that_queries_gather_are_visual() -> None:
    """The queries are parameters; what they attend to is not."""
    program = prepared("paper_slices", "canonicalize")
    domains = find_domains(program)
    component = program.components["vision"]
    assert domains[component.output_value("image_embeds")] == VISUAL
    assert domains[program.components["decoder"].placeholder("inputs_embeds")] == MIXED


def test_post_norm_tower_is_rotated_behind_its_norms() -> None:
    """Each block adds two norms' outputs to the stream; its readers are linears on the stream."""
    program = prepared("paper_experts", "hadamard-fuse")
    stream = next(s for s in find_streams(ChannelFlow(program)) if s.width == 40)
    assert not stream.group.barriers and not stream.group.norms
    graph = program.components["vision"].graph
    transforms = graph.find_nodes(op="call_function", target=hadamard)
    assert len(transforms) == 4
    assert not [name for name in program.params if ".rotation" in name]
    # the convolution over 2 x 2 patches reads the stream as a linear on four of its rows
    assert [site.blocks for site in stream.group.readers] == [1, 1, 1, 1, 4]


def test_heads_of_both_experts_are_rotated_alike() -> None:
    pairs = find_attention(prepared("paper_experts", "fuse-norm"))
    decoder = [pair for pair in pairs if pair.component == "decoder"]
    assert len(decoder) == 2
    for pair in decoder:
        assert isinstance(pair, ValueOutputPair)
        assert len(pair.values) == len(pair.outputs) == 2
        assert pair.value_rows.min() == 72 and pair.value_rows.max() == 95


def test_captured_decoder_asks_for_the_modality() -> None:
    decoder = captured("paper_experts").components["decoder"]
    assert decoder.input("modality").axes == ("batch", "token")
    assert not captured("paper_queries").components["decoder"].has_input("modality")
    linears = [node for node in decoder.graph.nodes if is_linear(node)]
    assert len(linears) == 2 * 5 * 2 + 1  # two layers, five linears, two experts, the head


def test_probe_describes_them() -> None:
    report = probe(build_family("paper_experts")[0])
    assert report.captured and report.adapter == "ExpertsAdapter"
