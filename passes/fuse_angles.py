"""Cosines and sines of a decoder's rotary positions become one operator."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from mqc.ir import Component, Program
from mqc.ir.dialect import VIEW_OPS
from mqc.ir.edit import aten, call_several, eliminate_dead_code, get_param, is_tensor, tensor_type
from mqc.ir.serialize import target_name
from mqc.ops import rotary_angles
from mqc.transform import Pass, PassContext, PassResult, Skip

_mqc = torch.ops.mqc
_COS, _SIN = 7, 8
"""Arguments of mqc::attention."""
_TURNS = {aten.cos.default: Tensor.cos, aten.sin.default: Tensor.sin}
_OPS = VIEW_OPS | {
    f"aten.{name}"
    for name in "mul.Tensor to.dtype index.Tensor index_select.default sym_size.int".split()
}
_BATCH, _TOKENS = 2, 3
"""Sizes at which a graph's angles are computed to be read off."""


class FuseAngles(Pass):
    """What leads from positions to the angles of attention -> mqc::rotary_angles.

    Models write multimodal rotary embedding as two dozen slices, selections and concatenations,
    which a decode step pays for at every token. Each column of the result is the cosine of some
    axis' position times some frequency: both are read off by computing the graph's angles for the
    positions (1, 0, 0), (0, 1, 0), .. in float64. The operator then has to give what the graph
    gives at other positions, else the graph stays and a skip says so.

    Postcondition: all angles of mqc::attention come from mqc::rotary_angles but those skipped.
    """

    name = "fuse-angles"
    after = ("fuse-attention", "fuse-order")
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            for cos, sin in _pairs(component):
                found = _read(program, cos, sin)
                if isinstance(found, str):
                    result.skips.append(Skip(f"{component.name}: %{cos.name}", found))
                elif ctx.take():
                    _fuse(program, component, (cos, sin), *found)
                    result.counts["angles"] += 1
        eliminate_dead_code(program)
        return result


def _pairs(component: Component) -> list[tuple[fx.Node, fx.Node]]:
    """The (cos, sin) that attentions turn by and that are not fused yet, each once."""
    pairs: dict[tuple[fx.Node, fx.Node], None] = {}
    for node in component.graph.find_nodes(op="call_function", target=_mqc.attention.default):
        cos, sin = node.args[_COS], node.args[_SIN]
        if isinstance(cos, fx.Node) and cos.target is not operator.getitem:
            pairs[cos, sin] = None
    return list(pairs)


def _read(program: Program, cos: fx.Node, sin: fx.Node) -> tuple[fx.Node, Tensor, Tensor] | str:
    """(positions, frequency of each column, axis of each column), or why they cannot be read."""
    cones = [_cone(cos), _cone(sin)]
    sources = {node for cone in cones for node in cone if _is_source(node)}
    if len(sources) != 1:
        return f"the angles come from {len(sources)} values of whole numbers"
    source = sources.pop()
    strange = sorted({target_name(n.target) for cone in cones for n in cone if not _known(n)})
    if strange:
        return f"the angles are made by {', '.join(strange)}"
    kind = tensor_type(source)
    if kind.rank not in (2, 3) or (kind.rank == 3 and not isinstance(kind.shape[0], int)):
        return f"positions of shape {kind.shape}"
    lead = [int(size) for size in kind.shape[:-2]]
    sizes = dict(zip(map(str, kind.shape[-2:]), (_BATCH, _TOKENS), strict=True))

    def angles(node: fx.Node, cone: list[fx.Node], positions: Tensor, turn: bool) -> Tensor:
        return _compute(program, node, cone, {source: positions}, sizes, turn)

    axes = lead[0] if lead else 1
    units = torch.eye(axes, dtype=torch.float64).reshape(axes, *lead, 1, 1)
    shape = (*lead, _BATCH, _TOKENS)
    try:
        rows = [angles(cos, cones[0], unit.expand(shape), False) for unit in units]
        freq = torch.stack([row[0, 0] for row in rows])
        axis = freq.abs().argmax(0)
        freq = freq.sum(0)
        generator = torch.Generator().manual_seed(0)
        positions = torch.randint(0, 1000, shape, generator=generator)
        wanted = [
            angles(node, cone, positions.double(), True)
            for node, cone in zip((cos, sin), cones, strict=True)
        ]
    except (RuntimeError, IndexError, KeyError, TypeError) as error:
        return f"the angles cannot be computed from the positions alone: {error}"
    given = rotary_angles.reference(positions, freq, axis if lead else None)
    for made, want in zip(given, wanted, strict=True):
        if made.shape != want.shape or not torch.allclose(made, want, rtol=0, atol=1e-9):
            return "a column is not the cosine of one position times a frequency"
    return source, freq, axis


def _is_source(node: fx.Node) -> bool:
    """Whole numbers that are no view of others."""
    if node.op == "get_attr" or not is_tensor(node) or tensor_type(node).dtype != torch.int64:
        return False
    return node.op == "placeholder" or target_name(node.target) not in _OPS


def _known(node: fx.Node) -> bool:
    if node.op == "get_attr" or _is_source(node) or node.target in _TURNS:
        return True
    return node.op == "call_function" and target_name(node.target) in _OPS


def _cone(end: fx.Node) -> list[fx.Node]:
    """``end`` and what leads to it, up to values of whole numbers and parameters, in order."""
    found: set[fx.Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        if not _is_source(node) and node.target is not aten.sym_size.int:
            stack.extend(node.all_input_nodes)
    return sorted(found)


def _compute(
    program: Program,
    end: fx.Node,
    cone: list[fx.Node],
    known: dict[fx.Node, Tensor],
    sizes: dict[str, int],
    turn: bool,
) -> Tensor:
    """``end`` in float64; without ``turn`` cosine and sine are left out: the angles themselves."""
    values: dict[fx.Node, Any] = dict(known)
    for node in cone:
        if node in values:
            continue
        if node.op == "get_attr":
            value = program.params[str(node.target)]
            values[node] = value.double() if value.is_floating_point() else value
        elif node.target is aten.sym_size.int:
            size = tensor_type(node.args[0]).shape[int(node.args[1])]  # type: ignore[arg-type]
            values[node] = size if isinstance(size, int) else sizes[size]
        elif node.target is aten.to.dtype:
            values[node] = values[node.args[0]]  # type: ignore[index]
        elif node.target in _TURNS:
            value = values[node.args[0]]  # type: ignore[index]
            values[node] = _TURNS[node.target](value) if turn else value
        else:
            args = fx.map_arg(node.args, lambda other: values[other])
            values[node] = node.target(*args, **node.kwargs)  # type: ignore[operator]
    result: Tensor = values[end]
    return result


def _fuse(
    program: Program,
    component: Component,
    pair: tuple[fx.Node, fx.Node],
    source: fx.Node,
    freq: Tensor,
    axis: Tensor,
) -> None:
    graph, kinds = component.graph, [tensor_type(node) for node in pair]
    with graph.inserting_before(min(pair)):
        columns = get_param(program, graph, "rotary.freq", freq.to(kinds[0].dtype))
        axes = None
        if tensor_type(source).rank == 3:
            axes = get_param(program, graph, "rotary.axes", axis)
        args = (source, columns, axes)
        made = call_several(graph, _mqc.rotary_angles.default, args, kinds, pair[0])
    for old, new in zip(pair, made, strict=True):
        assert new is not None
        old.replace_all_uses_with(new)
