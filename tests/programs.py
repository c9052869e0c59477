"""Programs that pass tests start from: random models of every family, and a hand-made graph."""

from __future__ import annotations

from functools import cache

import torch
from shared import shared_program
from torch import fx

from mqc.capture import capture
from mqc.ir import Component, Link, ParamStore, Port, Program, TensorType
from mqc.passes.canonicalize import Canonicalize
from mqc.passes.fuse_norm import FuseNorm
from mqc.passes.hadamard_fuse import HadamardFuse
from mqc.passes.hadamard_online import HadamardOnline
from mqc.testing.families import BASIC, build_family
from mqc.transform import Pass, PassContext, PassManager

aten = torch.ops.aten
NAMES = BASIC


@cache
def captured(name: str, dtype: torch.dtype = torch.float32) -> Program:
    """A random model of family ``name``, as captured; do not change it."""
    kind = str(dtype).removeprefix("torch.")
    return shared_program(
        f"{name}-{kind}".replace(":", "_"),
        lambda: capture(build_family(name, dtype)[0], dtype=dtype),
    )


@cache
def prepared(name: str, stage: str, dtype: torch.dtype = torch.float32) -> Program:
    """``captured`` after the float passes up to ``stage`` (a pass name)."""
    passes: list[Pass] = []
    for item in (Canonicalize(), FuseNorm(), HadamardFuse(), HadamardOnline()):
        passes.append(item)
        if item.name == stage:
            break
    return PassManager(passes).run(captured(name, dtype), PassContext())


def tiny_program(hidden: int = 8, vocab: int = 11, seed: int = 0) -> Program:
    """A one-layer text-and-vision model written by hand: embed and vision feed a decoder.

    The decoder is a residual feed-forward block with an RMSNorm and a head; there is no attention
    and no cache, so that its whole text fits a golden file.
    """
    generator = torch.Generator().manual_seed(seed)
    params = ParamStore()

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    params["embed.weight"] = rand(vocab, hidden)
    params["proj.weight"], params["proj.bias"] = rand(hidden, 6), rand(hidden)
    params["norm.weight"] = 1 + 0.1 * rand(hidden)
    params["gate.weight"], params["up.weight"] = rand(12, hidden), rand(12, hidden)
    params["down.weight"], params["head.weight"] = rand(hidden, 12), rand(vocab, hidden)
    params["last.weight"] = 1 + 0.1 * rand(hidden)
    params["mix.weight"], params["mix.bias"] = rand(hidden, hidden), rand(hidden)
    components = [_embed(hidden), _vision(hidden), _decoder(hidden, vocab)]
    links = [
        Link(("vision", "image_embeds"), ("decoder", "inputs_embeds")),
        Link(("embed", "embeddings"), ("decoder", "inputs_embeds")),
    ]
    program = Program(
        {item.name: item for item in components}, params, links, {"vocab_size": vocab}
    )
    for component in program:
        for node in component.graph.find_nodes(op="get_attr"):
            node.meta = {"type": TensorType.of(params[str(node.target)])}
    return program


class Builder:
    """Nodes with types, one call a line."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def input(self, name: str, kind: TensorType) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta = {"type": kind}
        return node

    def param(self, name: str) -> fx.Node:
        return self.graph.create_node("get_attr", name)

    def call(self, target: object, *args: object, kind: TensorType) -> fx.Node:
        node = self.graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta = {"type": kind}
        return node


def _f32(*shape: int | str) -> TensorType:
    return TensorType(tuple(shape), torch.float32)


def _embed(hidden: int) -> Component:
    b, ids = Builder(), TensorType(("batch", "tokens"), torch.int64)
    out = _f32("batch", "tokens", hidden)
    x = b.input("input_ids", ids)
    y = b.call(aten.embedding.default, b.param("embed.weight"), x, kind=out)
    b.graph.output((y,))
    return Component(
        "embed",
        b.graph,
        [Port("input_ids", ids, ("batch", "token"))],
        [Port("embeddings", out, ("batch", "token", None))],
    )


def _vision(hidden: int) -> Component:
    b, kind, out = Builder(), _f32("patches", 6), _f32("patches", hidden)
    x = b.input("pixels", kind)
    y = b.call(aten.linear.default, x, b.param("proj.weight"), b.param("proj.bias"), kind=out)
    b.graph.output((y,))
    return Component(
        "vision",
        b.graph,
        [Port("pixels", kind, ("patch", None))],
        [Port("image_embeds", out, ("patch", None))],
    )


def _decoder(hidden: int, vocab: int) -> Component:
    b = Builder()
    stream, wide = _f32("batch", "tokens", hidden), _f32("batch", "tokens", 12)
    index = TensorType(("batch", "rows"), torch.int64)
    picked = _f32("batch", "rows", hidden)
    x = b.input("inputs_embeds", stream)
    rows = b.input("logit_index", index)
    mixed = b.call(aten.linear.default, x, b.param("mix.weight"), b.param("mix.bias"), kind=stream)
    first = b.call(aten.add.Tensor, x, mixed, kind=stream)
    norm = b.call(aten.rms_norm.default, first, [hidden], b.param("norm.weight"), 1e-6, kind=stream)
    gate = b.call(aten.linear.default, norm, b.param("gate.weight"), kind=wide)
    active = b.call(aten.silu.default, gate, kind=wide)
    up = b.call(aten.linear.default, norm, b.param("up.weight"), kind=wide)
    product = b.call(aten.mul.Tensor, active, up, kind=wide)
    down = b.call(aten.linear.default, product, b.param("down.weight"), kind=stream)
    second = b.call(aten.add.Tensor, first, down, kind=stream)
    last = b.call(
        aten.rms_norm.default, second, [hidden], b.param("last.weight"), 1e-6, kind=stream
    )
    lined = b.call(
        aten.unsqueeze.default, rows, 2, kind=TensorType(("batch", "rows", 1), torch.int64)
    )
    spread = b.call(
        aten.expand.default,
        lined,
        [-1, -1, hidden],
        kind=TensorType(("batch", "rows", hidden), torch.int64),
    )
    taken = b.call(aten.gather.default, last, 1, spread, kind=picked)
    out = _f32("batch", "rows", vocab)
    logits = b.call(aten.linear.default, taken, b.param("head.weight"), kind=out)
    b.graph.output((logits,))
    return Component(
        "decoder",
        b.graph,
        [
            Port("inputs_embeds", stream, ("batch", "token", None)),
            Port("logit_index", index, ("batch", "row")),
        ],
        [Port("logits", out, ("batch", "row", None))],
    )
