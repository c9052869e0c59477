"""Analyses: what is found in the graphs of every family, and what is refused with a reason."""

from __future__ import annotations

import pytest
import torch
from programs import NAMES, Builder, prepared, tiny_program

from mqc.analysis.attention import Unpaired, ValueOutputPair, find_attention
from mqc.analysis.flow import ChannelFlow
from mqc.analysis.head import find_head
from mqc.analysis.index_trace import IndexTrace
from mqc.analysis.mlp import find_feed_forward
from mqc.analysis.modality import MIXED, TEXT, VISUAL, find_domains
from mqc.analysis.streams import find_free_groups, find_streams
from mqc.ir import TensorType
from mqc.ir.edit import aten


@pytest.mark.parametrize("name", NAMES)
def test_two_streams_without_online_rotation(name: str) -> None:
    program = prepared(name, "fuse-norm")
    streams = find_streams(ChannelFlow(program))
    assert [s.components for s in streams] == [["vision"], ["vision", "embed", "decoder"]]
    vision, language = streams
    assert (vision.width, language.width) == (40, 48)
    assert not language.group.barriers and not language.group.sources
    # A norm with gain at the start of a stream (CLIP) is the only source left.
    assert {s.node.target for s in vision.group.sources} <= {aten.layer_norm.default}
    assert not vision.group.barriers
    # two layers: q, k, v, o, gate, up, down a layer; the embedding and connector write, head reads
    assert len(language.group.readers) == 2 * 5 + 1
    assert len(language.group.writers) == 2 * 2 + 2


@pytest.mark.parametrize("name", NAMES)
def test_attention_pairs_every_layer(name: str) -> None:
    program = prepared(name, "canonicalize")
    pairs = find_attention(program)
    layers = {"vision": 0, "decoder": 0}
    for pair in pairs:
        assert isinstance(pair, ValueOutputPair)
        layers[pair.component] += 1
        if pair.component == "decoder":  # grouped heads: 2 kv heads serve 4
            assert pair.value_rows.shape == (2, 12) and pair.output_columns.shape == (4, 12)
        assert sorted(pair.output_columns.flatten().tolist()) == list(
            range(pair.output_columns.numel())
        )
    assert layers["decoder"] == 2 and layers["vision"] >= 2


def test_fused_qkv_rows_are_the_last_third() -> None:
    pair = find_attention(prepared("qwen2_vl", "canonicalize"))[0]
    assert isinstance(pair, ValueOutputPair) and pair.component == "vision"
    assert pair.value_rows.min() == 80 and pair.value_rows.max() == 119


def test_attention_with_a_gate_is_refused_with_a_reason() -> None:
    program = prepared("llava", "canonicalize").copy()
    decoder = program.components["decoder"]
    node = next(
        iter(
            decoder.graph.find_nodes(
                op="call_function", target=aten.scaled_dot_product_attention.default
            )
        )
    )
    with decoder.graph.inserting_after(node):
        gated = decoder.graph.call_function(aten.sigmoid.default, (node,))
    gated.meta = dict(node.meta)
    node.replace_all_uses_with(gated, delete_user_cb=lambda user: user is not gated)
    found = [p for p in find_attention(program) if p.component == "decoder"]
    assert isinstance(found[0], Unpaired) and "sigmoid" in found[0].reason
    assert isinstance(found[1], ValueOutputPair)


@pytest.mark.parametrize("name", NAMES)
def test_feed_forward_pairs(name: str) -> None:
    pairs = find_feed_forward(prepared(name, "canonicalize"))
    decoder = [p for p in pairs if p.component == "decoder"]
    assert len(decoder) == 2
    for pair in decoder:  # silu(gate) * up: only up is a plain factor
        assert len(pair.up) == 2 and len(pair.scalable) == 1
        assert "up_proj" in str(pair.scalable[0].args[1])
    vision = [p for p in pairs if p.component == "vision"]
    assert len(vision) >= 3 and all(not p.scalable for p in vision)


@pytest.mark.parametrize("name", NAMES)
def test_modalities(name: str) -> None:
    program = prepared(name, "canonicalize")
    domains = find_domains(program)
    decoder = program.components["decoder"]
    assert domains[program.components["vision"].output_value("image_embeds")] == VISUAL
    assert domains[program.components["embed"].output_value("embeddings")] == TEXT
    assert domains[decoder.output_value("present_value_1")] == MIXED
    assert domains[decoder.output_value("logits")] == TEXT
    head = find_head(decoder)
    assert head is not None and head is decoder.output_value("logits")


def test_rotation_cannot_pass_a_softmax_of_the_stream() -> None:
    program = tiny_program()
    decoder = program.components["decoder"]
    for norm in decoder.graph.find_nodes(op="call_function", target=aten.rms_norm.default):
        norm.args = (*norm.args[:2], None, norm.args[3])
    node = decoder.output_value("logits").args[0]
    with decoder.graph.inserting_after(node):
        soft = decoder.graph.call_function(aten.softmax.int, (node, -1))
    soft.meta = dict(node.meta)
    node.replace_all_uses_with(soft, delete_user_cb=lambda user: user is not soft)
    streams = find_streams(ChannelFlow(program))
    assert [str(s.node.target) for s in streams[0].group.barriers if s.node is soft]


def test_free_groups_need_a_norm_and_no_barrier() -> None:
    flow = ChannelFlow(prepared("llava", "fuse-norm"))
    for group in find_free_groups(flow):
        assert group.norms and not group.barriers and not group.sources


def test_index_trace_follows_views() -> None:
    b = Builder()
    x = b.input("x", TensorType(("batch", 6), torch.float32))
    split = b.call(
        aten.reshape.default, x, [-1, 2, 3], kind=TensorType(("batch", 2, 3), torch.float32)
    )
    turned = b.call(
        aten.transpose.int, split, 1, 2, kind=TensorType(("batch", 3, 2), torch.float32)
    )
    trace = IndexTrace({"batch": 1})
    trace.seed_channels(x)
    assert trace.get(turned).tolist() == [[[0, 3], [1, 4], [2, 5]]]
