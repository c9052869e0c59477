"""Mixtures of experts: sums of row-wise branches, each weighted by what a router chose for it.

Found by their arithmetic alone. ``chosen`` is a sorting order cut to its first k places: k
different numbers a row. A branch counts in a row by ``sum(weights * (chosen == expert))``, which is
0 wherever ``expert`` is not among them, so only the rows that chose it need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from mqc.analysis.rows import row_region
from mqc.ir import Component
from mqc.ir.edit import argument, aten, is_tensor, tensor_type


@dataclass(frozen=True)
class Branch:
    """``value`` [B, S, N] counts in the rows that chose ``expert``.

    ``inside``: row-wise nodes behind the router's choice that lead to it and nowhere else, in graph
    order; those that only make the mask of the rows that chose it are left out. Empty where
    something else reads ``value``.
    """

    expert: int
    value: fx.Node
    inside: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Mixture:
    """``node`` [B, S, N] is the sum of all branches, in the order of their numbers.

    ``chosen`` int64 [B, S, k]: the experts of each row, all different and of 0 .. len(branches);
    ``weights`` [B, S, k]: of each choice.
    """

    node: fx.Node
    chosen: fx.Node
    weights: fx.Node
    branches: tuple[Branch, ...]


def find_mixtures(component: Component) -> list[Mixture]:
    """Every mixture of a component, in graph order."""
    found = []
    for node in component.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if not any(user.target is aten.add.Tensor and user.args[0] is node for user in node.users):
            found += _mixtures(node)
    return found


def _mixtures(end: fx.Node) -> list[Mixture]:
    """The mixture that ``end``, or an addition that leads to it, is."""
    node: Any = end
    while _is(node, aten.add.Tensor):
        mixture = _mixture(node)
        if mixture is not None:
            return [mixture]
        node = node.args[0]
    return []


def _mixture(node: fx.Node) -> Mixture | None:
    if tensor_type(node).rank != 3:
        return None
    terms = []
    value: Any = node
    while _is(value, aten.add.Tensor) and not value.kwargs and len(value.args) == 2:
        if value is not node and len(value.users) != 1:
            return None
        terms.append(value.args[1])
        value = value.args[0]
    read = [_term(term) for term in [value, *reversed(terms)]]
    first = read[0]
    if first is None:
        return None
    _, _, chosen, weights = first
    branches = []
    for expert, item in enumerate(read):
        if item is None or item[1:] != (expert, chosen, weights):
            return None
        branches.append(item[0])
    if _experts(chosen) != len(branches):
        return None
    if tensor_type(weights).dtype != tensor_type(node).dtype:
        return None
    made = (_branch(expert, term, chosen) for expert, term in enumerate(branches))
    return Mixture(node, chosen, weights, tuple(made))


def _branch(expert: int, term: fx.Node, chosen: fx.Node) -> Branch:
    value = next(item for item in term.all_input_nodes if _column(item) is None)
    region = set(row_region(term, tensor_type(term).shape[:2], start=chosen))
    inside, pending = set(), [value]
    while pending:
        node = pending.pop()
        if node in region and node not in inside:
            inside.add(node)
            masked = masks_rows(node, expert, chosen)
            pending += node.all_input_nodes if masked is None else [masked]
    return Branch(expert, value, tuple(sorted(inside)))


def _term(node: Any) -> tuple[fx.Node, int, fx.Node, fx.Node] | None:
    """(product, expert, chosen, weights) where a value is a branch times its column of weights."""
    if not _is(node, aten.mul.Tensor) or len(node.users) != 1:
        return None
    for value, factor in (node.args, node.args[::-1]):
        column = _column(factor)
        if column is None or not is_tensor(value) or _column(value) is not None:
            continue
        if tensor_type(value).shape == tensor_type(node).shape:
            return (node, *column)
    return None


def _column(node: Any) -> tuple[int, fx.Node, fx.Node] | None:
    """(expert, chosen, weights) of ``sum(weights * (chosen == expert), -1, keepdim)``."""
    if _is(node, aten.to.dtype):
        node = node.args[0]
    if not _is(node, aten.sum.dim_IntList) or list(node.args[1]) not in ([-1], [2]):
        return None
    product: Any = node.args[0]
    if argument(node, 2) is not True or not _is(product, aten.mul.Tensor):
        return None
    for weights, match in (product.args, product.args[::-1]):
        compared = compared_choice(match)
        if compared is not None and is_tensor(weights):
            expert, chosen = compared
            if tensor_type(weights).shape == tensor_type(chosen).shape:
                return expert, chosen, weights
    return None


def compared_choice(node: Any) -> tuple[int, fx.Node] | None:
    """(expert, chosen) of ``chosen == expert``, where ``chosen`` is a router's choice."""
    if not _is(node, aten.eq.Scalar):
        return None
    chosen, expert = node.args
    if not isinstance(expert, int) or not is_tensor(chosen) or _experts(chosen) is None:
        return None
    return expert, chosen


def masks_rows(node: fx.Node, expert: int, chosen: fx.Node) -> fx.Node | None:
    """``x`` where ``node`` is x times "the row chose ``expert``": 1 in the rows that did."""
    if node.target is not aten.mul.Tensor:
        return None
    value: Any
    factor: Any
    for value, factor in (node.args, node.args[::-1]):
        flag = factor.args[0] if _is(factor, aten.to.dtype) else factor
        if not _is(flag, aten.any.dim) or argument(flag, 1) not in (-1, 2):
            continue
        if compared_choice(flag.args[0]) == (expert, chosen) and isinstance(value, fx.Node):
            return value
    return None


def _experts(chosen: fx.Node) -> int | None:
    """How many numbers there are of which a row's are the first in a sorting order."""
    order: Any = chosen
    if _is(order, aten.slice.Tensor) and order.args[1] in (-1, 2) and argument(order, 4) is None:
        order = order.args[0]
    if not _is(order, aten.argsort.default) or argument(order, 1) not in (None, -1, 2):
        return None
    kind = tensor_type(order)
    size = kind.shape[-1]
    return size if kind.rank == 3 and isinstance(size, int) else None


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target
