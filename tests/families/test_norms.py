"""Norms whose gains no weight can take: sandwich norms, post-norm blocks, pooled features."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from programs import captured, prepared
from torch import fx

from mqc.analysis.flow import ChannelFlow, is_linear
from mqc.analysis.streams import find_streams
from mqc.ir import Program
from mqc.ir.edit import aten, tensor_type
from mqc.passes.canonicalize import Canonicalize
from mqc.passes.fuse_norm import FuseNorm
from mqc.passes.hadamard_fuse import HadamardFuse
from mqc.passes.rms_suppress import RmsSuppress
from mqc.transform import PassContext, PassManager
from mqc.transform.equivalence import end_to_end_error

hadamard = torch.ops.mqc.hadamard.default


def gained(program: Program, component: str) -> list[fx.Node]:
    return [
        node
        for node in program.components[component].graph.nodes
        if node.target in (aten.rms_norm.default, aten.layer_norm.default)
        and node.args[2] is not None
    ]


def test_sandwich_norms_are_followed_by_one_fast_transform_each() -> None:
    """Two layers, two norms a layer that write the stream: no matrix is multiplied online."""
    program = prepared("gemma3", "hadamard-fuse")
    language = next(s for s in find_streams(ChannelFlow(program)) if s.width == 48)
    assert not language.group.barriers
    transforms = program.components["decoder"].graph.find_nodes(op="call_function", target=hadamard)
    assert len(transforms) == 4
    for node in transforms:
        assert node.args[0] in gained(program, "decoder") and node.args[1] == 48
    rotations = [name for name in program.params if ".rotation" in name]
    assert len(rotations) == 1  # the tower's last norm, whose gain stands before a pooling


def test_outliers_of_sandwich_gains_are_spread() -> None:
    """A channel that a gain makes large is no outlier of the stream that the readers see."""
    program = captured("gemma3").copy()
    name = next(n for n in program.params if n.endswith("layers.0.post_attention_layernorm.weight"))
    gain = program.params[name].clone()
    gain[5] = 200.0
    program.params[name] = gain
    passes = [Canonicalize(), FuseNorm(), HadamardFuse()]
    rotated = PassManager(passes).run(program, PassContext())
    decoder = rotated.components["decoder"]
    node = next(iter(decoder.graph.find_nodes(op="call_function", target=hadamard)))
    before, after = node.args[0], node
    assert isinstance(before, fx.Node)
    values: dict[fx.Node, torch.Tensor] = {}

    class Watch(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            values[n] = super().run_node(n)
            return values[n]

    module = rotated.module("decoder")
    watch = Watch(module)
    tokens = 6
    caches = [torch.zeros(1, 2, 0, 12) for _ in range(4)]
    mask = torch.ones(1, 2, tokens, tokens, dtype=torch.bool).tril()
    embeds = torch.randn(1, tokens, 48, generator=torch.Generator().manual_seed(0))
    places = torch.arange(tokens)[None]
    watch.run(embeds, places, mask, places, *caches)
    named = {n.name: v for n, v in values.items()}

    def peak(x: torch.Tensor) -> float:
        energy = x.square().mean((0, 1))
        return float(energy.max() / energy.mean())

    assert peak(named[before.name]) > 30 and peak(named[after.name]) < 5


@pytest.mark.parametrize("name", ["blip-2", "instructblip"])
def test_readers_in_post_norm_blocks_see_transformed_values(name: str) -> None:
    program = prepared(name, "hadamard-online")
    gains = gained(program, "vision")
    assert len(gains) >= 5
    for norm in gains:
        assert not any(is_linear(user) for user in norm.users)
    readers = Counter(
        tensor_type(user).shape[-1]
        for node in program.components["vision"].graph.find_nodes(
            op="call_function", target=hadamard
        )
        for user in node.users
    )
    assert readers[24] >= 8 and readers[40] >= 2  # queries' attention, their feed-forward


def test_flattened_rows_are_put_back_into_their_batch() -> None:
    """Its language model flattens tokens around feed-forward blocks."""
    before, after = captured("blip-2"), prepared("blip-2", "canonicalize")
    for program, found in ((before, True), (after, False)):
        nodes = program.components["decoder"].graph.nodes
        flat = [n for n in nodes if is_linear(n) and tensor_type(n).rank == 2]
        assert bool(flat) == found


def test_a_split_reads_what_stands_before_it_now() -> None:
    """Two linears in a row, both with split columns: the second reads the first's corrected sum."""
    program = prepared("mistral3", "fuse-norm", torch.float64)
    split = RmsSuppress(threshold=1.0001).run(program.copy(), PassContext()).program
    assert end_to_end_error(program, split) <= 1e-10


@pytest.mark.parametrize("name", ["gemma3", "paligemma", "idefics3", "llava_onevision"])
def test_unpadded_convolutions_are_linears(name: str) -> None:
    graph = prepared(name, "canonicalize").components["vision"].graph
    assert not [
        node for node in graph.nodes if "conv" in str(node.target) and node.op != "get_attr"
    ]
