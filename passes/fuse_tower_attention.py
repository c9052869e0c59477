"""Attention without a cache, as vision towers and resamplers have it, becomes one operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mqc.analysis.heads import unrepeated
from mqc.analysis.rotary import Rotary, find_rotary
from mqc.analysis.sdpa import SDPA, Columns, Sdpa, find_columns, read_sdpa, token_major
from mqc.errors import PassPostconditionError
from mqc.ir import SCALAR, Component, Program
from mqc.ir.edit import aten, call, eliminate_dead_code, tensor_type
from mqc.passes.fuse_attention import replace_heads, same_angles
from mqc.transform import Pass, PassContext, PassResult, Skip

_ATTENTION = torch.ops.mqc.attention_full.default


@dataclass
class _Rows:
    """Heads of one side before ``rotary``: ``source`` of rank 3 or 4, heads on axis ``heads``."""

    source: fx.Node
    heads: int
    rotary: Rotary | None = None


class FuseTowerAttention(Pass):
    """Rotary embedding, repeated heads and attention to all keys -> mqc::attention_full.

    Unlike plain attention its kernel never holds the products of all rows, skips keys that a mask
    (of windows, of segments) forbids to a block of rows, and where query, key and value are
    columns of one linear's result it reads them there. Components without a cache are rewritten;
    a rotary embedding that is not recognised stays before the operator.

    Postcondition: what is left of such attention could not be rewritten.
    """

    name = "fuse-tower-attention"
    after = ("cleanup", "merge-linears", "fuse-quantize")
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in _without_cache(program):
            rewrite = _Rewrite(component, result)
            for node in list(component.graph.find_nodes(op="call_function", target=SDPA)):
                found = _read(node)
                if isinstance(found, str):
                    result.skips.append(Skip(f"{component.name}: %{node.name}", found))
                elif ctx.take():
                    rewrite.fuse(found)
        eliminate_dead_code(program)
        return result

    def ensures(self, result: PassResult) -> None:
        for component in _without_cache(result.program):
            for node in component.graph.find_nodes(op="call_function", target=SDPA):
                if isinstance(_read(node), Sdpa):
                    raise PassPostconditionError(f"%{node.name} could have been fused")


def _without_cache(program: Program) -> list[Component]:
    return [
        component
        for component in program
        if not any(port.axis("past") or port.axis("capacity") for port in component.inputs)
    ]


def _read(node: fx.Node) -> Sdpa | str:
    """An attention that the operator computes, or why it does not."""
    found = read_sdpa(node)
    if isinstance(found, str):
        return found
    query, key, value = (tensor_type(n).shape for n in (found.query, found.key, found.value))
    if not query[0] == key[0] == value[0]:
        return "its keys are those of another batch"
    if key[1] != value[1] or int(query[1]) % int(key[1]):
        return "its heads of keys do not divide those of queries"
    if found.mask is not None:
        batch, _, rows, keys = tensor_type(found.mask).shape
        if batch not in (1, query[0]) or (rows, keys) != (query[2], key[2]):
            return "its mask has not a row for every query"
    return found


class _Rewrite:
    def __init__(self, component: Component, result: PassResult) -> None:
        self.graph, self.result = component.graph, result
        self.shared: dict[fx.Node, fx.Node] = {}

    def fuse(self, sdpa: Sdpa) -> None:
        kind = tensor_type(sdpa.query)
        batch, _, tokens, _ = kind.shape
        key, value = unrepeated(sdpa.key), unrepeated(sdpa.value)
        if key is None or value is None:
            key, value = sdpa.key, sdpa.value
        with self.graph.inserting_before(sdpa.node):
            sides = [_rows(node) for node in (sdpa.query, key, value)]
            turns = [side.rotary for side in sides[:2]]
            form, cos, sin = "none", None, None
            if turns[0] is not None and turns[1] is not None and same_angles(turns[0], turns[1]):
                form = turns[0].form
                cos, sin = (self._batched(node) for node in (turns[0].cos, turns[0].sin))
                self.result.counts["rotary"] += 1
            else:
                sides[:2] = [_Rows(node, 1) for node in (sdpa.query, key)]
            found = [find_columns(side.source, side.heads) for side in sides]
            packed = _joined(found)
            if packed is not None and _rows_of(packed, batch, tokens):
                heads: list[fx.Node | None] = [self._columns(packed, batch, tokens), None, None]
                self.result.counts["packed"] += 1
            else:
                keys = tensor_type(key).shape[2]
                heads = [
                    self._apart(side, columns, batch, rows)
                    for side, columns, rows in zip(sides, found, (tokens, keys, keys), strict=True)
                ]
            self.result.counts["masked"] += sdpa.mask is not None
            groups, wide = tensor_type(value).shape[1::2]
            args = (*heads, sdpa.mask, cos, sin, groups, sdpa.scale, form)
            count = kind.shape[1]
            assert isinstance(count, int) and isinstance(wide, int)
            flat = kind.with_shape(batch, tokens, count * wide)
            out = call(self.graph, _ATTENTION, args, flat, sdpa.node)
        replace_heads(sdpa.node, out)
        self.result.counts["attentions"] += 1

    # -- what is read ----------------------------------------------------------------------------

    def _batched(self, angles: fx.Node) -> fx.Node:
        """``angles`` [B, S, R], with a batch of one where there is none."""
        kind = tensor_type(angles)
        if kind.rank == 3:
            return angles
        if angles not in self.shared:
            wide = kind.with_shape(1, *kind.shape)
            self.shared[angles] = call(
                self.graph, aten.unsqueeze.default, (angles, 0), wide, angles
            )
        return self.shared[angles]

    def _apart(self, side: _Rows, columns: Columns | None, batch: Any, rows: Any) -> fx.Node:
        """One side as [B, rows, H, D]."""
        if columns is not None and _rows_of(columns, batch, rows):
            return self._columns(columns, batch, rows)
        source, kind = side.source, tensor_type(side.source)
        if kind.rank == 4 and side.heads == 1:
            turned = kind.with_shape(kind.shape[0], kind.shape[2], kind.shape[1], kind.shape[3])
            return call(self.graph, aten.transpose.int, (source, 1, 2), turned, source)
        if kind.rank == 3:
            wide = kind.with_shape(1, *kind.shape)
            return call(self.graph, aten.unsqueeze.default, (source, 0), wide, source)
        return source

    def _columns(self, columns: Columns, batch: Any, rows: Any) -> fx.Node:
        """``columns`` as [B, rows, H, D]."""
        base, kind = columns.base, tensor_type(columns.base)
        sizes: list[Any] = [1, -1] if batch == 1 else [-1, rows]
        if isinstance(sizes[1], str):
            sizes[1] = call(self.graph, aten.sym_size.int, (base, 1), SCALAR, base)
        if (columns.start, columns.end) != (0, kind.shape[-1]):
            span = (base, kind.rank - 1, columns.start, columns.end)
            part = kind.with_shape(*kind.shape[:-1], columns.end - columns.start)
            base = call(self.graph, aten.slice.Tensor, span, part, base)
        apart = kind.with_shape(batch, rows, columns.heads, columns.width)
        shape = [*sizes, columns.heads, columns.width]
        return call(self.graph, aten.reshape.default, (base, shape), apart, base)


def _rows(value: fx.Node) -> _Rows:
    """``value`` [B, H, S, D] before its rotary embedding, if it has one."""
    found = find_rotary(value, 1)
    if found is not None:
        return _Rows(found.source, 1, found)
    source = token_major(value)
    if source is None:
        return _Rows(value, 1)
    axis = tensor_type(source).rank - 2
    found = find_rotary(source, axis)
    return _Rows(source, axis) if found is None else _Rows(found.source, axis, found)


def _rows_of(columns: Columns, batch: Any, rows: Any) -> bool:
    """Whether the base can be taken apart to [batch, rows, ...] without asking for more sizes."""
    shape = tensor_type(columns.base).shape
    return bool(batch == 1 or (len(shape) == 3 and shape[:2] == (batch, rows)))


def _joined(sides: list[Columns | None]) -> Columns | None:
    """Queries, keys and values side by side in the rows of one value, as one range of columns."""
    query, key, value = sides
    if query is None or key is None or value is None:
        return None
    if not query.base is key.base is value.base or len({s.width for s in sides if s}) > 1:
        return None
    if (query.end, key.end) != (key.start, value.start) or key.heads != value.heads:
        return None
    heads = query.heads + key.heads + value.heads
    return Columns(query.base, query.start, heads, query.width)
