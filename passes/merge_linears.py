"""Linears that read one quantized value become one linear: q, k, v; gate and up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mqc.errors import PassPostconditionError
from mqc.ir import Component, Program, TensorType
from mqc.ir.edit import aten, call, eliminate_dead_code, get_param, replace, tensor_type
from mqc.transform import Pass, PassContext, PassResult, Skip

_mqc = torch.ops.mqc
LINEARS = (_mqc.linear_w4a8.default, _mqc.linear_w8a8.default)
XQ, WEIGHT, W_SCALE, X_SCALE, MODALITY, BIAS, X_SPLIT, W_SPLIT, RESIDUAL = range(9)
"""Positions of the integer linears' arguments."""
_ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default)


class MergeLinears(Pass):
    """Join integer linears with one input, one input scale and one weight layout.

    Output channels are concatenated, a linear that feeds an activation (the gate) first, the
    others in graph order; readers get slices of the result. A bias that one of them lacks is zero
    for it. Float columns (``x_split``) are joined to their union, with weight zero for a linear
    that does not read one.

    Postcondition: no two integer linears of a graph that could be merged are left.
    """

    name = "merge-linears"
    after = ("cleanup",)
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            for group in _groups(component):
                reason = _obstacle(group)
                if reason is not None:
                    result.skips.append(Skip(f"{component.name}: {_names(group)}", reason))
                elif ctx.take():
                    _merge(program, component, group)
                    result.counts["merged"] += 1
                    result.counts["linears"] += len(group)
        eliminate_dead_code(program)
        return result

    def ensures(self, result: PassResult) -> None:
        for component in result.program:
            for group in _groups(component):
                if _obstacle(group) is None:
                    raise PassPostconditionError(f"{_names(group)} are left apart")


def arg(node: fx.Node, index: int) -> Any:
    """Argument ``index`` of an integer linear, None where it was left out."""
    return node.args[index] if index < len(node.args) else None


def _groups(component: Component) -> list[list[fx.Node]]:
    """Integer linears by what they have in common; groups of at least two, in graph order."""
    found: dict[Any, list[fx.Node]] = {}
    for node in component.graph.nodes:
        if node.op == "call_function" and node.target in LINEARS:
            groups = tensor_type(arg(node, W_SCALE)).shape[1:]
            scale = str(arg(node, X_SCALE).target)
            key = (node.target, arg(node, XQ), scale, arg(node, MODALITY), groups)
            found.setdefault(key, []).append(node)
    return [_ordered(group) for group in found.values() if len(group) > 1]


def _ordered(group: list[fx.Node]) -> list[fx.Node]:
    """The gate first, for fused gated activations expect it there."""
    return sorted(group, key=lambda node: not any(u.target in _ACTIVATIONS for u in node.users))


def _obstacle(group: list[fx.Node]) -> str | None:
    """Why a group cannot be merged."""
    if any(arg(node, RESIDUAL) is not None for node in group):
        return "one of them adds a residual"
    sources = set()
    for part in (arg(node, X_SPLIT) for node in group):
        if part is None:
            continue
        if part.target is not aten.index_select.default or part.args[2].op != "get_attr":
            return "their float columns are not chosen by a constant index"
        sources.add(part.args[0])
    return "their float columns come from several values" if len(sources) > 1 else None


def _names(group: list[fx.Node]) -> str:
    return ", ".join(str(node.meta.get("module") or node.name) for node in group)


def _merge(program: Program, component: Component, group: list[fx.Node]) -> None:
    graph, first = component.graph, min(group)
    rows = [_rows(node) for node in group]
    kind = tensor_type(first)
    with graph.inserting_before(first):
        weight, scale = (_joined(program, graph, group, i) for i in (WEIGHT, W_SCALE))
        bias = _bias(program, graph, group, rows)
        part, split = _split(program, graph, group, rows)
        head = (arg(first, XQ), weight, scale, arg(first, X_SCALE), arg(first, MODALITY))
        wide = kind.with_shape(*kind.shape[:-1], sum(rows))
        merged = call(graph, first.target, (*head, bias, part, split), wide, first)
        merged.meta["module"] = _common([str(node.meta.get("module", "")) for node in group])
        start, axis = 0, kind.rank - 1
        pieces = []
        for node, size in zip(group, rows, strict=True):
            span = (merged, axis, start, start + size)
            pieces.append(call(graph, aten.slice.Tensor, span, tensor_type(node), node))
            start += size
    for node, piece in zip(group, pieces, strict=True):
        replace(node, piece)


def _rows(node: fx.Node) -> int:
    size = tensor_type(node).shape[-1]
    assert isinstance(size, int)
    return size


def _common(names: list[str]) -> str:
    """``a.{q,k}.w``: dotted names with their parts that differ in braces."""
    columns = zip(*(name.split(".") for name in names), strict=False)
    parts = [list(dict.fromkeys(column)) for column in columns]
    return ".".join(part[0] if len(part) == 1 else "{" + ",".join(part) + "}" for part in parts)


def _joined(program: Program, graph: fx.Graph, group: list[fx.Node], index: int) -> fx.Node:
    names = [str(arg(node, index).target) for node in group]
    value = torch.cat([program.params[name] for name in names])
    return get_param(program, graph, _common([name.partition("~")[0] for name in names]), value)


def _bias(
    program: Program, graph: fx.Graph, group: list[fx.Node], rows: list[int]
) -> fx.Node | None:
    given = [arg(node, BIAS) for node in group]
    known = [str(node.target) for node in given if node is not None]
    if not known:
        return None
    like = program.params[known[0]]
    parts = [
        like.new_zeros(size) if node is None else program.params[str(node.target)]
        for node, size in zip(given, rows, strict=True)
    ]
    hint = _common([name.partition("~")[0] for name in known])
    return get_param(program, graph, hint, torch.cat(parts))


def _split(
    program: Program, graph: fx.Graph, group: list[fx.Node], rows: list[int]
) -> tuple[fx.Node | None, fx.Node | None]:
    """``x_split`` and ``w_split`` over all columns that one of the linears reads in float."""
    chosen: list[tuple[list[int], Tensor] | None] = []
    source: fx.Node | None = None
    for node in group:
        part, weight = arg(node, X_SPLIT), arg(node, W_SPLIT)
        if part is None:
            chosen.append(None)
            continue
        source = part.args[0]
        index = program.params[str(part.args[2].target)]
        chosen.append((index.tolist(), program.params[str(weight.target)]))
    if source is None:
        return None, None
    columns = sorted(set().union(*(item[0] for item in chosen if item is not None)))
    like = next(item[1] for item in chosen if item is not None)
    total = like.new_zeros(sum(rows), len(columns))
    start = 0
    for item, size in zip(chosen, rows, strict=True):
        for place, column in enumerate(item[0] if item is not None else ()):
            assert item is not None
            total[start : start + size, columns.index(column)] = item[1][:, place]
        start += size
    hint = str(arg(group[0], WEIGHT).target).partition("~")[0]
    index_node = get_param(program, graph, f"{hint}.split_columns", torch.tensor(columns))
    split = get_param(program, graph, f"{hint}.split", total)
    kind = tensor_type(source)
    picked = TensorType((*kind.shape[:-1], len(columns)), kind.dtype)
    args = (source, kind.rank - 1, index_node)
    return call(graph, aten.index_select.default, args, picked, group[0]), split
