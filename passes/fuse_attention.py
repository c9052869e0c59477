"""Attention over a growing cache becomes one operator over a cache of fixed capacity."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from mqc.analysis.cached_attention import CachedAttention, find_cached, is_growing
from mqc.analysis.rotary import Rotary
from mqc.analysis.sdpa import swaps, token_major
from mqc.errors import PassPostconditionError
from mqc.ir import SCALAR, Component, Port, Program, TensorType
from mqc.ir.edit import aten, call, call_several, eliminate_dead_code, replace, tensor_type
from mqc.passes.fuse_quantize import joined, whole_value
from mqc.transform import Pass, PassContext, PassResult, Skip

_mqc = torch.ops.mqc
BUFFER = "buffer"
"""``facts["cache"]`` of a program whose decoder takes caches of fixed capacity and ``past``."""
PAST = "past"


class FuseAttention(Pass):
    """Rotary embedding, cache concatenation, repeated heads and attention -> mqc::attention.

    The decoder's inputs change: instead of growing ``past_key_i`` [batch, heads, past, D] it takes
    ``past`` (int64 [1]) and ``key_cache_i`` [batch, heads, capacity, D], whose first ``past`` rows
    are valid, and returns ``new_key_cache_i``. Index arithmetic on the size of the past takes it
    from ``past``. A rotary embedding that is not recognised stays before the operator. All layers
    are rewritten or, where one does not match, none: the reason is a skip.

    Args:
        memory: also rewrite a decoder with recurrent layers, whose memory stays as it is among the
            caches: for targets that keep both. Others would take it for a buffer.

    Postcondition: a program with ``facts["cache"] == "buffer"`` has no growing cache.
    """

    name = "fuse-attention"
    after = ("cleanup", "aifs-reorder", "merge-linears", "fuse-quantize")
    preserves = True

    def __init__(self, memory: bool = False) -> None:
        self._memory = memory

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            caches = [port for port in component.inputs if is_growing(port)]
            if not caches:
                continue
            recurrent = any(port.axis("memory") is not None for port in component.inputs)
            if recurrent and not self._memory:
                reason = "the memory of a recurrent layer stands among the caches"
                result.skips.append(Skip(component.name, reason))
                continue
            layers = find_cached(component, caches)
            if isinstance(layers, Skip):
                result.skips.append(layers)
            elif ctx.take():
                _Rewrite(component).run(layers, caches, result)
                program.facts["cache"] = BUFFER
        eliminate_dead_code(program)
        return result

    def ensures(self, result: PassResult) -> None:
        if result.program.facts.get("cache") == BUFFER:
            for component in result.program:
                for port in component.inputs:
                    if is_growing(port):
                        raise PassPostconditionError(f"input {port.name!r} still grows")


class _Rewrite:
    def __init__(self, component: Component) -> None:
        self.component = component
        self.graph = component.graph

    def run(self, layers: list[CachedAttention], caches: list[Port], result: PassResult) -> None:
        first = self.component.placeholder(caches[0].name)
        past_port = Port(PAST, TensorType((1,), torch.int64), (None,))
        with self.graph.inserting_before(first):
            self.past = self._input(past_port)
        renamed = {port.name: self._cache_port(port) for port in caches}
        nodes = {}
        for port in caches:
            old = self.component.placeholder(port.name)
            with self.graph.inserting_before(old):
                nodes[old] = self._input(renamed[port.name])
        for layer in layers:
            self._fuse(layer, nodes, result)
        for node in reversed(list(self.graph.nodes)):  # what only led to the old attentions
            if node.op == "call_function" and not node.users:
                self.graph.erase_node(node)
        for old, new in nodes.items():
            self._sizes(old, new)
            self.graph.erase_node(old)
        ports = [renamed.get(port.name, port) for port in self.component.inputs]
        ports.insert(ports.index(renamed[caches[0].name]), past_port)
        self.component.inputs = ports
        result.counts["layers"] += len(layers)

    def _input(self, port: Port) -> fx.Node:
        node = self.graph.placeholder(port.name)
        node.meta = {"type": port.type}
        return node

    def _cache_port(self, port: Port) -> Port:
        kind, _, index = port.name.removeprefix("past_").partition("_")
        axes = tuple("capacity" if role == "past" else role for role in port.axes)
        shape = tuple(
            "capacity" if role == "past" else size
            for role, size in zip(port.axes, port.type.shape, strict=True)
        )
        return Port(f"{kind}_cache_{index}", TensorType(shape, port.type.dtype), axes)

    def _fuse(
        self, layer: CachedAttention, nodes: dict[fx.Node, fx.Node], result: PassResult
    ) -> None:
        sdpa, caches = layer.sdpa, [nodes[cache] for cache in layer.caches]
        query, key = layer.rotary(layer.query), layer.rotary(layer.key)
        with self.graph.inserting_before(sdpa):
            if query is not None and key is not None and same_angles(query[0], key[0]):
                form, cos, sin = query[0].form, query[0].cos, query[0].sin
                q, k = (
                    self._turned(side.source) if head_major else side.source
                    for side, head_major in (query, key)
                )
                result.counts["rotary"] += 1
            else:
                form, cos, sin = "none", None, None
                q, k = self._turned(layer.query), self._turned(layer.key)
            v = self._turned(layer.value)
            packed = packed_heads(self.graph, q, k, v)
            result.counts["packed"] += packed is not None
            heads: tuple[fx.Node | None, ...] = (
                (q, k, v) if packed is None else (packed, None, None)
            )
            kinds = [self._out_type(layer), *(self._grown(cache, layer) for cache in caches)]
            angles = (cos, sin, layer.scale, form)
            args = (*heads, *caches, self.past, layer.mask, *angles)
            out, *grown = call_several(self.graph, _mqc.attention.default, args, kinds, sdpa)
        assert out is not None
        replace_heads(sdpa, out)
        for join, cache, made in zip(layer.joins, caches, grown, strict=True):
            assert made is not None
            self._replace_cache(join, cache, made)

    def _turned(self, value: fx.Node) -> fx.Node:
        """``value`` [B, H, S, D] as [B, S, H, D]."""
        found = token_major(value)
        if found is not None and tensor_type(found).rank == 4:
            return found
        batch, heads, tokens, width = tensor_type(value).shape
        kind = tensor_type(value).with_shape(batch, tokens, heads, width)
        return call(self.graph, aten.transpose.int, (value, 1, 2), kind, value)

    def _out_type(self, layer: CachedAttention) -> TensorType:
        batch, heads, tokens, width = tensor_type(layer.sdpa).shape
        assert isinstance(heads, int) and isinstance(width, int)
        return tensor_type(layer.sdpa).with_shape(batch, tokens, heads * width)

    def _grown(self, cache: fx.Node, layer: CachedAttention) -> TensorType:
        batch, heads, rows, width = tensor_type(cache).shape
        keys = tensor_type(layer.mask).shape[3]
        return tensor_type(cache).with_shape(batch, heads, f"Max({rows}, {keys})", width)

    def _replace_cache(self, join: fx.Node, cache: fx.Node, made: fx.Node) -> None:
        """The joined rows become the new cache where the component returns them."""
        output = self.component.output_node
        values = output.args[0]
        assert isinstance(values, (tuple, list))
        ports = list(self.component.outputs)
        for index, value in enumerate(values):
            if value is join:
                axes = self.component.outputs[index].axes
                roles = tuple("capacity" if role == "key" else role for role in axes)
                ports[index] = Port(f"new_{cache.target}", tensor_type(made), roles)
        self.component.outputs = ports
        output.replace_input_with(join, made)

    def _sizes(self, old: fx.Node, new: fx.Node) -> None:
        """Let what asked for a size of a growing cache find it elsewhere."""
        for size in [user for user in old.users if user.target is aten.sym_size.int]:
            if int(size.args[1]) % 4 != 2:  # type: ignore[arg-type]
                size.replace_input_with(old, new)
                continue
            for user in list(size.users):
                if user.target in (aten.add.Tensor, aten.sub.Tensor):
                    user.replace_input_with(size, self.past)
            if size.users:
                self._from_mask(size)
            else:
                self.graph.erase_node(size)

    def _from_mask(self, size: fx.Node) -> None:
        """The number of past rows as the mask's columns less the new tokens."""
        mask, embeds = (self.component.placeholder(name) for name in ("mask", "inputs_embeds"))
        with self.graph.inserting_before(size):
            keys = call(self.graph, aten.sym_size.int, (mask, 3), SCALAR, size)
            tokens = call(self.graph, aten.sym_size.int, (embeds, 1), SCALAR, size)
            new = call(self.graph, operator.sub, (keys, tokens), SCALAR, size)
        replace(size, new)


def replace_heads(sdpa: fx.Node, out: fx.Node) -> None:
    """Let readers of ``sdpa`` [B, H, S, D] read ``out`` [B, S, H * D], and erase ``sdpa``.

    Reshapes of ``transpose(sdpa, 1, 2)`` read ``out`` as it is; others get it taken apart.
    """
    graph, kind = sdpa.graph, tensor_type(sdpa)
    batch, heads, tokens, width = kind.shape
    for turned in [user for user in sdpa.users if swaps(user, 1, 2)]:
        for user in list(turned.users):
            if user.target is aten.reshape.default:
                user.replace_input_with(turned, out)
        if not turned.users:
            graph.erase_node(turned)
    if not sdpa.users:
        graph.erase_node(sdpa)
        return
    made: list[fx.Node] = []
    sizes: list[Any] = [-1, tokens, heads, width]
    if not isinstance(tokens, int):
        with graph.inserting_after(out):
            made.append(call(graph, aten.sym_size.int, (out, 1), SCALAR, sdpa))
        sizes[1] = made[0]
    with graph.inserting_after(made[0] if made else out):
        rows = kind.with_shape(batch, tokens, heads, width)
        apart = call(graph, aten.reshape.default, (out, sizes), rows, sdpa)
    with graph.inserting_after(apart):
        turned = call(graph, aten.transpose.int, (apart, 1, 2), kind, sdpa)
    replace(sdpa, turned)


def same_angles(query: Rotary, key: Rotary) -> bool:
    return (query.cos, query.sin, query.form) == (key.cos, key.sin, key.form)


def packed_heads(graph: fx.Graph, q: fx.Node, k: fx.Node, v: fx.Node) -> fx.Node | None:
    """[B, S, Hq + 2 Hkv, D] where q, k and v are adjacent slices of one linear's result."""
    parts = []
    for node in (q, k, v):
        source = node.args[0] if node.target is aten.reshape.default else None
        if not isinstance(source, fx.Node) or tensor_type(source).rank != 3:
            return None
        parts.append(source)
    shapes = [tensor_type(node).shape for node in (q, k, v)]
    found = joined(parts)
    if found is None or len({shape[3] for shape in shapes}) > 1:
        return None
    whole = whole_value(graph, found)
    heads = sum(int(shape[2]) for shape in shapes)
    kind = tensor_type(q).with_shape(*shapes[0][:2], heads, shapes[0][3])
    sizes = q.args[1]
    assert isinstance(sizes, (list, tuple))
    return call(graph, aten.reshape.default, (whole, [*sizes[:2], heads, shapes[0][3]]), kind, q)
