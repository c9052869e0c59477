"""Experts by modality: values that matter in visual rows alone, or in text rows alone.

Where rows choose by their modality between two values, all that is computed for one of them only
is needed in the rows that take it. No names: the choice is a ``where`` whose condition comes from
the component's row mask.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from mqc.analysis.flow import NORMS
from mqc.analysis.modality import Modality
from mqc.ir import Component
from mqc.ir.dialect import POINTWISE_OPS
from mqc.ir.edit import argument, aten, is_tensor, tensor_type
from mqc.ir.serialize import target_name

MASK = "modality"
"""Name of the input that says which rows are visual: bool [batch, tokens]."""

_ROW_WISE = frozenset(
    f"mqc.{name}.default"
    for name in (
        "quantize_static linear_w4a8 linear_w8a8 linear_w4a16 linear_w8a16 hadamard rank_update"
    ).split()
)


@dataclass(frozen=True)
class Choice:
    """``node`` takes visual rows from its first value and text rows from its second.

    ``visual`` and ``text`` are the nodes that only that side needs, in graph order; every one of
    them works on each row alone and has the shape [batch, tokens, channels].
    """

    node: fx.Node
    visual: tuple[fx.Node, ...]
    text: tuple[fx.Node, ...]


def find_choices(component: Component) -> list[Choice]:
    """Every choice of rows by modality of a component, in graph order."""
    if not any(port.name == MASK for port in component.inputs):
        return []
    mask = component.placeholder(MASK)
    found = []
    for node in component.graph.find_nodes(op="call_function", target=aten.where.self):
        if _says_visual(node.args[0], mask) and tensor_type(node).rank == 3:
            sides = (_private(node, place) for place in (1, 2))
            found.append(Choice(node, *sides))
    return found


def rows_of(component: Component) -> dict[fx.Node, Modality]:
    """The modality whose rows alone need a node, for every node of an expert."""
    rows: dict[fx.Node, Modality] = {}
    for choice in find_choices(component):
        rows.update(dict.fromkeys(choice.visual, Modality.VISUAL))
        rows.update(dict.fromkeys(choice.text, Modality.TEXT))
    return rows


def _says_visual(value: object, mask: fx.Node) -> bool:
    """Whether a condition is the row mask itself, as it is or with visual rows first."""
    while isinstance(value, fx.Node) and value.target in (
        aten.unsqueeze.default,
        aten.expand.default,
    ):
        value = value.args[0]
    if value is mask:
        return True
    return visual_count(value, mask) is not None


def visual_count(value: object, mask: fx.Node) -> fx.Node | None:
    """The number of visual rows int64 [batch] behind ``place < number``, the mask of a component
    whose visual rows come first; None for any other value."""
    if not (isinstance(value, fx.Node) and value.target == aten.lt.Tensor):
        return None
    places, limit = value.args
    steps = isinstance(places, fx.Node) and places.target == aten.arange.default
    if not (steps and isinstance(limit, fx.Node) and limit.target == aten.unsqueeze.default):
        return None
    count = limit.args[0]
    if not (isinstance(count, fx.Node) and count.target == aten.sum.dim_IntList):
        return None
    source = count.args[0]
    cast = isinstance(source, fx.Node) and source.target == aten.to.dtype
    return count if cast and source.args[0] is mask else None  # type: ignore[union-attr]


def _private(choice: fx.Node, place: int) -> tuple[fx.Node, ...]:
    """Row-wise nodes that nothing but argument ``place`` of ``choice`` needs."""
    kind = tensor_type(choice)
    rows = kind.shape[:2]
    inside: set[fx.Node] = set()
    for node in reversed(list(choice.graph.nodes)):
        if node.op != "call_function" or not node.users or not _row_wise(node, rows):
            continue
        if all(u in inside or (u is choice and _only(choice, place, node)) for u in node.users):
            inside.add(node)
    return tuple(node for node in choice.graph.nodes if node in inside)


def _only(choice: fx.Node, place: int, node: fx.Node) -> bool:
    return [at for at, value in enumerate(choice.args) if value is node] == [place]


def _row_wise(node: fx.Node, rows: tuple[int | str, ...]) -> bool:
    if not is_tensor(node) or tensor_type(node).rank != 3 or tensor_type(node).shape[:2] != rows:
        return False
    if node.target in NORMS:
        return len(node.args[1]) == 1  # type: ignore[arg-type]
    if node.target in (aten.slice.Tensor, aten.index_select.default):
        return int(argument(node, 1)) % 3 == 2
    name = target_name(node.target)
    return node.target == aten.linear.default or name in _ROW_WISE or name in POINTWISE_OPS
