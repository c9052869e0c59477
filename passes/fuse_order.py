"""The index arithmetic of AIFS becomes three operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from mqc.ir import Component, Port, Program
from mqc.ir.edit import aten, call, call_several, eliminate_dead_code, replace, tensor_type
from mqc.passes.aifs_reorder import AIFS
from mqc.passes.modality_split import INPUT
from mqc.transform import Pass, PassContext, PassResult, Skip

_mqc = torch.ops.mqc


class FuseOrder(Pass):
    """What aifs-reorder wrote -> mqc::token_order, mqc::take_tokens, mqc::take_keys.

    The order of the tokens is computed once, by one operator instead of a dozen, and applied to
    each input by one more: a decode step, whose only token is where it belongs, no longer pays for
    forty small operators. Needs the cache as a buffer, whose rows in use are an input (``past``).

    Postcondition: the mask's order is read from mqc::token_order, or a skip says why not.
    """

    name = "fuse-order"
    after = ("aifs-reorder", "fuse-attention")
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            if program.facts.get("kv_order") != AIFS or not component.has_input(INPUT):
                continue
            found = _find(component)
            if isinstance(found, Skip):
                result.skips.append(found)
            elif ctx.take():
                _fuse(component, found, result)
        eliminate_dead_code(program)
        return result


class _Found:
    """The values of aifs-reorder in one component.

    ``order``, ``place``, ``count``: see mqc::token_order; ``moved``: input port -> its values in
    the new order (for the mask: rows and columns).
    """

    def __init__(self, order: fx.Node, place: fx.Node, count: fx.Node) -> None:
        self.order, self.place, self.count = order, place, count
        self.moved: dict[str, fx.Node] = {}


def _find(component: Component) -> _Found | Skip:
    modality = component.placeholder(INPUT)
    if not component.has_input("past"):
        return Skip(component.name, "the cache is no buffer: the rows in use are no input")
    places = list(_places(modality))
    if len(places) != 1:
        return Skip(component.name, f"{len(places)} values look like new places of tokens")
    place, count = places[0]
    orders = [user for user in place.users if _is_inverse(user, place)]
    if len(orders) != 1:
        return Skip(component.name, f"{len(orders)} values look like the order of tokens")
    found = _Found(orders[0], place, count)
    for port in component.inputs:
        if port.name == INPUT or port.axis("token") is None:
            continue
        node = component.placeholder(port.name)
        axis = port.axis("token")
        moved = _gathered(node, axis, found.order)
        if moved is not None and port.axis("key") is not None:
            moved = _gathered(moved, port.axes.index("key"), None)
        if moved is None:
            return Skip(component.name, f"input {port.name!r} is not permuted as expected")
        found.moved[port.name] = moved
    return found


def _places(modality: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(new places of tokens, visual tokens) as aifs-reorder writes them from the row mask."""
    for where in modality.users:
        if where.target is not aten.where.self or where.args[0] is not modality:
            continue
        first: Any = where.args[1]
        second: Any = where.args[2]
        visual: Any = first.args[0] if _is(first, aten.cumsum.default) else None
        if visual is None or not _is(visual, aten.to.dtype) or visual.args[0] is not modality:
            continue
        offset: Any = second.args[1] if _is(second, aten.add.Tensor) else None
        count: Any = offset.args[0] if _is(offset, aten.unsqueeze.default) else None
        if not _is(count, aten.sum.dim_IntList) or count.args[0] is not visual:
            continue
        for user in where.users:
            if user.target is aten.sub.Scalar and user.args[1] == 1:
                yield user, count


def _is(node: object, target: object) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _is_inverse(node: fx.Node, place: fx.Node) -> bool:
    """0, 1, ... put where ``place`` says."""
    if node.target is not aten.scatter.src or node.args[2] is not place:
        return False
    return node.args[0] is node.args[3]


def _gathered(value: fx.Node, axis: int | None, order: fx.Node | None) -> fx.Node | None:
    """``value`` gathered along ``axis``, its only reader but for sizes; by ``order`` if given."""
    readers = [user for user in value.users if user.target is not aten.sym_size.int]
    gathers = [user for user in readers if _is(user, aten.gather.default)]
    if len(readers) != 1 or len(gathers) != 1 or gathers[0].args[1] != axis:
        return None
    index: Any = gathers[0].args[2]
    while _is(index, aten.expand.default) or _is(index, aten.reshape.default):
        index = index.args[0]
    return gathers[0] if order is None or index is order else None


def _fuse(component: Component, found: _Found, result: PassResult) -> None:
    graph, modality = component.graph, component.placeholder(INPUT)
    anchor = next(node for node in graph.nodes if node.op == "call_function")
    kinds = [*(tensor_type(node) for node in (found.order, found.place, found.count))]
    with graph.inserting_before(anchor):
        made = call_several(graph, _mqc.token_order.default, (modality,), [*kinds, None], modality)
        order, place, count, _ = made
        assert order is not None and place is not None and count is not None
        past = component.placeholder("past")
        fresh = {}
        for port in component.inputs:
            if port.name in found.moved:
                fresh[port.name] = _take(component, port, order, past)
    for name, node in fresh.items():
        replace(found.moved[name], node)
    for old, new in ((found.order, order), (found.place, place), (found.count, count)):
        old.replace_all_uses_with(new)
    result.counts["inputs"] += len(fresh)


def _take(component: Component, port: Port, order: fx.Node, past: fx.Node) -> fx.Node:
    value = component.placeholder(port.name)
    kind = tensor_type(value)
    if port.axis("key") is not None:
        return call(component.graph, _mqc.take_keys.default, (value, order, past), kind, value)
    args = (value, order, port.axes.index("token"))
    return call(component.graph, _mqc.take_tokens.default, args, kind, value)
