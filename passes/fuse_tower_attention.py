"""Attention without a cache, as vision towers have it, becomes the operator of the decoder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mqc.analysis.rotary import Rotary, find_rotary
from mqc.errors import PassPostconditionError
from mqc.ir import SCALAR, Component, Program, TensorType
from mqc.ir.edit import (
    aten,
    call,
    call_several,
    eliminate_dead_code,
    get_param,
    replace,
    tensor_type,
)
from mqc.passes.fuse_attention import packed_heads
from mqc.transform import Pass, PassContext, PassResult, Skip

_SDPA = aten.scaled_dot_product_attention.default
_ATTENTION = torch.ops.mqc.attention.default


@dataclass
class _Rows:
    """Heads of one side: ``source`` [S, H, D] or [B, S, H, D], turned by ``rotary`` if given."""

    source: fx.Node
    rotary: Rotary | None = None


class FuseTowerAttention(Pass):
    """Rotary embedding and attention of all rows to all rows -> mqc::attention, empty caches.

    Unlike plain attention it never holds the products of all rows, and where query, key and value
    are slices of one linear's result it reads them there. Only attention without a mask, with as
    many heads of keys as of queries, in components without a cache is rewritten.

    Postcondition: a rewritten attention reads no cache and has no reader of its new caches.
    """

    name = "fuse-tower-attention"
    after = ("cleanup", "merge-linears", "fuse-quantize")
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            if any(port.axis("past") or port.axis("capacity") for port in component.inputs):
                continue
            rewrite = _Rewrite(program, component, result)
            for node in list(component.graph.find_nodes(op="call_function", target=_SDPA)):
                reason = _refusal(node)
                if reason is not None:
                    result.skips.append(Skip(f"{component.name}: %{node.name}", reason))
                elif ctx.take():
                    rewrite.fuse(node)
        eliminate_dead_code(program)
        return result

    def ensures(self, result: PassResult) -> None:
        for component in result.program:
            if any(port.axis("past") or port.axis("capacity") for port in component.inputs):
                continue
            for node in component.graph.find_nodes(op="call_function", target=_ATTENTION):
                if tensor_type(node.args[3]).shape[2] != 0 or len(node.users) > 1:
                    raise PassPostconditionError(f"%{node.name} has a cache")


def _refusal(node: fx.Node) -> str | None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if given.get("dropout_p") or given.get("is_causal") or given.get("attn_mask") is not None:
        return "it has dropout or a mask"
    kinds = [tensor_type(given[name]) for name in names[:3]]
    if any(kind.rank != 4 for kind in kinds):
        return "its rows have no axis of heads"
    heads, width = kinds[0].shape[1], kinds[0].shape[3]
    if not isinstance(heads, int) or not isinstance(width, int):
        return "its number of heads is not fixed"
    if any(kind.shape[:3] != kinds[0].shape[:3] for kind in kinds) or kinds[1].shape[3] != width:
        return "keys differ from queries in number or width"
    if not isinstance(kinds[2].shape[3], int):
        return "the width of its values is not fixed"
    return None


class _Rewrite:
    def __init__(self, program: Program, component: Component, result: PassResult) -> None:
        self.program, self.component, self.result = program, component, result
        self.graph = component.graph
        self.shared: dict[Any, fx.Node] = {}

    def fuse(self, sdpa: fx.Node) -> None:
        query, key, value = sdpa.args[:3]
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
        assert isinstance(value, fx.Node)
        kind = tensor_type(query)
        batch, heads, tokens, width = kind.shape
        wide = tensor_type(value).shape[3]
        assert isinstance(heads, int) and isinstance(width, int) and isinstance(wide, int)
        given = sdpa.kwargs.get("scale", sdpa.args[6] if len(sdpa.args) > 6 else None)
        scale = 1 / math.sqrt(width) if given is None else float(given)  # type: ignore[arg-type]
        with self.graph.inserting_before(sdpa):
            sides = [self._rows(node) for node in (query, key, value)]
            turns = [side.rotary for side in sides[:2]]
            same = turns[0] is not None and turns[1] is not None and _same(turns[0], turns[1])
            form, cos, sin = "none", None, None
            if same and turns[0] is not None:
                form = turns[0].form
                cos, sin = (self._batched(node, 2) for node in (turns[0].cos, turns[0].sin))
                self.result.counts["rotary"] += 1
            elif any(turn is not None for turn in turns):
                sides[:2] = [_Rows(self._token_major(node)) for node in (query, key)]
            packed = self._packed([side.source for side in sides], kind)
            self.result.counts["packed"] += packed is not None
            rows: tuple[fx.Node | None, ...] = (packed, None, None)
            if packed is None:
                rows = tuple(self._batched(side.source, 3) for side in sides)
            caches = (
                self._empty(batch, heads, width, query),
                self._empty(batch, heads, wide, query),
            )
            args = (*rows, *caches, self._past(), self._mask(query), cos, sin, scale, form)
            flat = kind.with_shape(batch, tokens, heads * wide)
            out, *_ = call_several(self.graph, _ATTENTION, args, [flat, None, None], sdpa)
        assert out is not None
        self._replace(sdpa, out, wide)
        self.result.counts["attentions"] += 1

    # -- what is read ----------------------------------------------------------------------------

    def _rows(self, value: fx.Node) -> _Rows:
        source = self._token_major(value)
        found = find_rotary(source, tensor_type(source).rank - 2)
        return _Rows(source) if found is None else _Rows(found.source, found)

    def _token_major(self, value: fx.Node) -> fx.Node:
        """[B, S, H, D], or [S, H, D] for a batch of one, of ``value`` [B, H, S, D]."""
        inner: Any = value.args[0] if value.args else None
        if _swaps(value, 1, 2):
            return inner  # type: ignore[no-any-return]
        if value.target is aten.unsqueeze.default and value.args[1] == 0 and _swaps(inner, 0, 1):
            return inner.args[0]  # type: ignore[no-any-return]
        batch, heads, tokens, width = tensor_type(value).shape
        kind = tensor_type(value).with_shape(batch, tokens, heads, width)
        return call(self.graph, aten.transpose.int, (value, 1, 2), kind, value)

    def _batched(self, value: fx.Node, rank: int) -> fx.Node:
        """``value`` with a batch axis of one where it has only ``rank`` axes."""
        kind = tensor_type(value)
        if kind.rank != rank:
            return value
        if ("batched", value) not in self.shared:
            made = call(
                self.graph, aten.unsqueeze.default, (value, 0), kind.with_shape(1, *kind.shape),
                value,
            )  # fmt: skip
            self.shared["batched", value] = made
        return self.shared["batched", value]

    def _packed(self, sources: list[fx.Node], kind: TensorType) -> fx.Node | None:
        """[B, S, 3 H, D] where the sides are planes 0, 1, 2 of one [S, 3, H, D], or adjacent
        slices of one linear's result."""
        if all(source.target is aten.reshape.default for source in sources):
            return packed_heads(self.graph, *sources)
        whole: Any = None
        for index, source in enumerate(sources):
            if source.target is not aten.select.int or list(source.args[1:]) != [0, index]:
                return None
            turned: Any = source.args[0]
            if turned.target is not aten.permute.default or tensor_type(turned).rank != 4:
                return None
            if [int(axis) % 4 for axis in turned.args[1]] != [1, 0, 2, 3]:
                return None
            if whole is not None and turned.args[0] is not whole:
                return None
            whole = turned.args[0]
        if tensor_type(whole).shape[1] != 3:
            return None
        _, heads, tokens, width = kind.shape
        assert isinstance(heads, int)
        made = kind.with_shape(1, tokens, 3 * heads, width)
        sizes = [1, -1, 3 * heads, width]
        return call(self.graph, aten.reshape.default, (whole, sizes), made, whole)

    # -- what a decoder would be given -----------------------------------------------------------

    def _past(self) -> fx.Node:
        if "past" not in self.shared:
            value = torch.zeros(1, dtype=torch.int64)
            self.shared["past"] = get_param(self.program, self.graph, "attention.past", value)
        return self.shared["past"]

    def _empty(self, batch: Any, heads: int, width: int, like: fx.Node) -> fx.Node:
        key = ("cache", batch, heads, width)
        if key not in self.shared:
            kind = tensor_type(like)
            value = torch.zeros(1, heads, 0, width, dtype=kind.dtype)
            one = get_param(self.program, self.graph, "attention.cache", value)
            if batch != 1:
                size = call(self.graph, aten.sym_size.int, (like, 0), SCALAR, like)
                made = kind.with_shape(batch, heads, 0, width)
                one = call(self.graph, aten.expand.default, (one, [size, -1, -1, -1]), made, like)
            self.shared[key] = one
        return self.shared[key]

    def _mask(self, query: fx.Node) -> fx.Node:
        batch, _, tokens, _ = tensor_type(query).shape
        key = ("mask", batch, tokens)
        if key not in self.shared:
            kind = TensorType((batch, 1, tokens, tokens), torch.bool)
            yes = torch.ones(1, 1, 1, 1, dtype=torch.bool)
            one = get_param(self.program, self.graph, "attention.mask", yes)
            sizes: list[Any] = [
                size
                if isinstance(size, int)
                else call(self.graph, aten.sym_size.int, (query, axis), SCALAR, query)
                for axis, size in ((0, batch), (2, tokens))
            ]
            shape = [sizes[0], 1, sizes[1], sizes[1]]
            self.shared[key] = call(self.graph, aten.expand.default, (one, shape), kind, query)
        return self.shared[key]

    # -- what reads it ---------------------------------------------------------------------------

    def _replace(self, sdpa: fx.Node, out: fx.Node, width: int) -> None:
        """Reshapes of ``transpose(sdpa, 1, 2)`` read ``out``; other readers get it taken apart."""
        kind = tensor_type(sdpa)
        batch, heads, tokens, _ = kind.shape
        for turned in [user for user in sdpa.users if _swaps(user, 1, 2)]:
            for user in list(turned.users):
                if user.target is aten.reshape.default:
                    user.replace_input_with(turned, out)
            if not turned.users:
                self.graph.erase_node(turned)
        if not sdpa.users:
            self.graph.erase_node(sdpa)
            return
        made: list[fx.Node] = []
        sizes: list[Any] = [-1, tokens, heads, width]
        if not isinstance(tokens, int):
            with self.graph.inserting_after(out):
                made.append(call(self.graph, aten.sym_size.int, (out, 1), SCALAR, sdpa))
            sizes[1] = made[0]
        with self.graph.inserting_after(made[0] if made else out):
            rows = kind.with_shape(batch, tokens, heads, width)
            apart = call(self.graph, aten.reshape.default, (out, sizes), rows, sdpa)
        with self.graph.inserting_after(apart):
            turned = call(self.graph, aten.transpose.int, (apart, 1, 2), kind, sdpa)
        replace(sdpa, turned)


def _swaps(node: Any, first: int, second: int) -> bool:
    """Whether ``node`` swaps these two axes of its input."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is aten.transpose.int:
        rank = tensor_type(node).rank
        return sorted(int(axis) % rank for axis in node.args[1:3]) == [first, second]  # type: ignore[arg-type]
    if node.target is not aten.permute.default:
        return False
    order = list(range(tensor_type(node).rank))
    order[first], order[second] = second, first
    given: Any = node.args[1]
    return [int(axis) % len(order) for axis in given] == order


def _same(query: Rotary, key: Rotary) -> bool:
    return (query.cos, query.sin, query.form) == (key.cos, key.sin, key.form)
