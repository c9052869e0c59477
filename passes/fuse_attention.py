"""Attention over a growing cache becomes one operator over a cache of fixed capacity."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mqc.analysis.heads import unrepeated
from mqc.analysis.rotary import Rotary, find_rotary
from mqc.errors import PassPostconditionError
from mqc.ir import SCALAR, Component, Port, Program, TensorType
from mqc.ir.edit import aten, call, call_several, eliminate_dead_code, replace, tensor_type
from mqc.passes.fuse_quantize import joined, whole_value
from mqc.transform import Pass, PassContext, PassResult, Skip

_mqc = torch.ops.mqc
_SDPA = aten.scaled_dot_product_attention.default
BUFFER = "buffer"
"""``facts["cache"]`` of a program whose decoder takes caches of fixed capacity and ``past``."""
PAST = "past"


@dataclass
class _Layer:
    """One attention of a decoder with what it reads; q, k, v are [B, heads, S, D]."""

    sdpa: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    caches: tuple[fx.Node, fx.Node]
    joins: tuple[fx.Node, fx.Node]
    mask: fx.Node
    scale: float


class FuseAttention(Pass):
    """Rotary embedding, cache concatenation, repeated heads and attention -> mqc::attention.

    The decoder's inputs change: instead of growing ``past_key_i`` [batch, heads, past, D] it takes
    ``past`` (int64 [1]) and ``key_cache_i`` [batch, heads, capacity, D], whose first ``past`` rows
    are valid, and returns ``new_key_cache_i``. Index arithmetic on the size of the past takes it
    from ``past``. A rotary embedding that is not recognised stays before the operator. All layers
    are rewritten or, where one does not match, none: the reason is a skip.

    Postcondition: a program with ``facts["cache"] == "buffer"`` has no growing cache.
    """

    name = "fuse-attention"
    after = ("cleanup", "aifs-reorder", "merge-linears", "fuse-quantize")
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            caches = [port for port in component.inputs if _is_cache(port)]
            if not caches:
                continue
            if any(port.axis("memory") is not None for port in component.inputs):
                reason = "the memory of a recurrent layer stands among the caches"
                result.skips.append(Skip(component.name, reason))
                continue
            layers = _layers(component, caches)
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
                    if _is_cache(port):
                        raise PassPostconditionError(f"input {port.name!r} still grows")


def _is_cache(port: Port) -> bool:
    return port.axis("past") is not None and port.type.rank == 4


# ---- matching ----------------------------------------------------------------------------------


def _layers(component: Component, caches: list[Port]) -> list[_Layer] | Skip:
    """All attentions that read a cache, or why one of them does not match."""
    left = {component.placeholder(port.name) for port in caches}
    layers = []
    for node in component.graph.find_nodes(op="call_function", target=_SDPA):
        layer = _match(component, node)
        if isinstance(layer, str):
            return Skip(f"{component.name}: %{node.name}", layer)
        layers.append(layer)
        left -= set(layer.caches)
    if left:
        names = ", ".join(sorted(str(node.target) for node in left))
        return Skip(component.name, f"no attention of the known form reads {names}")
    return layers


def _match(component: Component, node: fx.Node) -> _Layer | str:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    query, mask = given["query"], given.get("attn_mask")
    if given.get("dropout_p") or given.get("is_causal"):
        return "it has dropout or an implicit causal mask"
    if not isinstance(mask, fx.Node) or tensor_type(mask).dtype != torch.bool:
        return "its mask is not one of booleans"
    if tensor_type(mask).rank != 4 or tensor_type(mask).shape[1] != 1:
        return "its mask is not the same for all heads"
    joins: list[Any] = []
    for side in ("key", "value"):
        join: Any = unrepeated(given[side]) or given[side]
        if join.target is not aten.cat.default or len(join.args) < 2 or len(join.args[0]) != 2:
            return f"its {side}s are not a cache and new rows"
        cache, _ = join.args[0]
        if cache.op != "placeholder" or not _is_cache(component.input(str(cache.target))):
            return f"its {side}s do not start with a cache"
        if int(join.args[1]) % 4 != 2 or not _private(component, join, node):
            return f"something else reads its {side}s"
        joins.append(join)
    (key_cache, key), (value_cache, value) = (join.args[0] for join in joins)
    width = tensor_type(query).shape[-1]
    heads, groups = tensor_type(query).shape[1], tensor_type(key).shape[1]
    if not all(isinstance(size, int) for size in (width, heads, groups)):
        return "its number of heads is not fixed"
    scale = given.get("scale")
    return _Layer(
        node,
        query,
        key,
        value,
        (key_cache, value_cache),
        (joins[0], joins[1]),
        mask,
        1 / math.sqrt(int(width)) if scale is None else float(scale),
    )


def _private(component: Component, join: fx.Node, sdpa: fx.Node) -> bool:
    """Whether only ``sdpa``, the outputs and sizes read the joined keys, through repetition."""
    stack = list(join.users)
    while stack:
        user = stack.pop()
        if user in (sdpa, component.output_node) or user.target is aten.sym_size.int:
            continue
        if user.target not in (
            aten.unsqueeze.default,
            aten.expand.default,
            aten.reshape.default,
        ):
            return False
        stack += list(user.users)
    return True


def _token_major(value: Any) -> fx.Node | None:
    """x [B, S, H, D] where ``value`` is ``x.transpose(1, 2)``."""
    if value.target is aten.transpose.int and sorted(int(a) % 4 for a in value.args[1:]) == [1, 2]:
        source = value.args[0]
        assert isinstance(source, fx.Node)
        return source
    if value.target is aten.permute.default and [int(a) % 4 for a in value.args[1]] == [0, 2, 1, 3]:
        source = value.args[0]
        assert isinstance(source, fx.Node)
        return source
    return None


def _rotary(value: fx.Node) -> tuple[Rotary, bool] | None:
    """The rotary embedding that makes ``value`` [B, H, S, D], and whether its source is so too."""
    found = find_rotary(value, 1)
    if found is not None:
        return found, True
    source = _token_major(value)
    found = None if source is None else find_rotary(source, 2)
    return None if found is None else (found, False)


# ---- rewriting ---------------------------------------------------------------------------------


class _Rewrite:
    def __init__(self, component: Component) -> None:
        self.component = component
        self.graph = component.graph

    def run(self, layers: list[_Layer], caches: list[Port], result: PassResult) -> None:
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

    def _fuse(self, layer: _Layer, nodes: dict[fx.Node, fx.Node], result: PassResult) -> None:
        sdpa, caches = layer.sdpa, [nodes[cache] for cache in layer.caches]
        query, key = _rotary(layer.query), _rotary(layer.key)
        with self.graph.inserting_before(sdpa):
            if query is not None and key is not None and _same_angles(query[0], key[0]):
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
        self._replace_output(sdpa, out)
        for join, cache, made in zip(layer.joins, caches, grown, strict=True):
            assert made is not None
            self._replace_cache(join, cache, made)

    def _turned(self, value: fx.Node) -> fx.Node:
        """``value`` [B, H, S, D] as [B, S, H, D]."""
        found = _token_major(value)
        if found is not None:
            return found
        batch, heads, tokens, width = tensor_type(value).shape
        kind = tensor_type(value).with_shape(batch, tokens, heads, width)
        return call(self.graph, aten.transpose.int, (value, 1, 2), kind, value)

    def _out_type(self, layer: _Layer) -> TensorType:
        batch, heads, tokens, width = tensor_type(layer.sdpa).shape
        assert isinstance(heads, int) and isinstance(width, int)
        return tensor_type(layer.sdpa).with_shape(batch, tokens, heads * width)

    def _grown(self, cache: fx.Node, layer: _Layer) -> TensorType:
        batch, heads, rows, width = tensor_type(cache).shape
        keys = tensor_type(layer.mask).shape[3]
        return tensor_type(cache).with_shape(batch, heads, f"Max({rows}, {keys})", width)

    def _replace_output(self, sdpa: fx.Node, out: fx.Node) -> None:
        """Readers of ``reshape(transpose(sdpa, 1, 2))`` read ``out``; others get it taken apart."""
        kind = tensor_type(sdpa)
        for turned in list(sdpa.users):
            if _token_major(turned) is not sdpa:
                continue
            for flat in list(turned.users):
                if flat.target is aten.reshape.default and tensor_type(flat) == tensor_type(out):
                    replace(flat, out)
            if not turned.users:
                self.graph.erase_node(turned)
        if sdpa.users:
            batch, heads, tokens, width = kind.shape
            with self.graph.inserting_after(out):
                size = call(self.graph, aten.sym_size.int, (out, 1), SCALAR, sdpa)
            with self.graph.inserting_after(size):
                apart = kind.with_shape(batch, tokens, heads, width)
                shape = (out, [-1, size, heads, width])
                rows = call(self.graph, aten.reshape.default, shape, apart, sdpa)
            with self.graph.inserting_after(rows):
                turned = call(self.graph, aten.transpose.int, (rows, 1, 2), kind, sdpa)
            sdpa.replace_all_uses_with(turned)
        self.graph.erase_node(sdpa)

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


def _same_angles(query: Rotary, key: Rotary) -> bool:
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
