"""Editing a graph without losing types: every helper leaves ``meta["type"]`` set."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mqc.ir.params import ParamStore
from mqc.ir.program import Program
from mqc.ir.types import TUPLE, TensorType

aten = torch.ops.aten


def tensor_type(node: fx.Node) -> TensorType:
    """The type of a tensor node. Raises ``TypeError`` for a symbolic size or an untyped node."""
    kind = node.meta.get("type")
    if not isinstance(kind, TensorType):
        raise TypeError(f"%{node.name} ({node.target}) is not a typed tensor: {kind!r}")
    return kind


def is_tensor(value: Any) -> bool:
    """Whether ``value`` is a node that yields a typed tensor."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("type"), TensorType)


def param_value(params: ParamStore, value: Any) -> torch.Tensor | None:
    """The tensor behind a ``get_attr`` node, or None for anything else."""
    if isinstance(value, fx.Node) and value.op == "get_attr":
        return params[str(value.target)]
    return None


def argument(node: fx.Node, index: int) -> Any:
    """Positional argument ``index`` or None where it was left out."""
    return node.args[index] if index < len(node.args) else None


def get_param(program: Program, graph: fx.Graph, hint: str, value: torch.Tensor) -> fx.Node:
    """A new parameter (copy on write) and its ``get_attr`` node at the insertion point."""
    node = graph.create_node("get_attr", program.params.add(hint, value))
    node.meta = {"type": TensorType.of(value)}
    return node


def set_param(
    program: Program, node: fx.Node, index: int, value: torch.Tensor, hint: str | None = None
) -> None:
    """Make argument ``index`` of ``node`` a new parameter holding ``value``.

    The name derives from the parameter it replaces, or from ``hint`` where there was none.
    Missing arguments in between are filled with None (their default in ATen's signatures).
    """
    old = argument(node, index)
    if isinstance(old, fx.Node) and old.op == "get_attr":
        hint = str(old.target)
    with node.graph.inserting_before(node):
        new = get_param(program, node.graph, hint or f"{node.name}.arg{index}", value)
    args = list(node.args) + [None] * (index + 1 - len(node.args))
    args[index] = new
    node.args = tuple(args)
    if isinstance(old, fx.Node) and old.op == "get_attr" and not old.users:
        node.graph.erase_node(old)


def call(
    graph: fx.Graph, target: Any, args: tuple[Any, ...], kind: TensorType | str, like: fx.Node
) -> fx.Node:
    """A new call at the insertion point, with type ``kind`` and the module path of ``like``."""
    node = graph.call_function(target, args)
    node.meta = {"type": kind}
    if "module" in like.meta:
        node.meta["module"] = like.meta["module"]
    return node


def replace(old: fx.Node, new: fx.Node) -> None:
    """Let all users of ``old`` read ``new``, and erase ``old``."""
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def insert_after(
    value: fx.Node, target: Any, args: tuple[Any, ...], users: list[fx.Node] | None = None
) -> fx.Node:
    """Insert ``target(value, *args)`` (same type) after ``value`` for ``users`` (default: all)."""
    users = list(value.users) if users is None else users
    with value.graph.inserting_after(value):
        new = call(value.graph, target, (value, *args), tensor_type(value), value)
    for user in users:
        user.replace_input_with(value, new)
    return new


def eliminate_dead_code(program: Program) -> int:
    """Erase nodes without effect in every component; return how many."""
    count = 0
    for component in program:
        for node in reversed(list(component.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                component.graph.erase_node(node)
                count += 1
    return count


def call_several(
    graph: fx.Graph,
    target: Any,
    args: tuple[Any, ...],
    kinds: Sequence[TensorType | None],
    like: fx.Node,
) -> list[fx.Node | None]:
    """A new call with several results at the insertion point; the typed nodes of the results.

    ``kinds``: the type of each result, None for one that nobody will read (no node is made).
    """
    node = call(graph, target, args, TUPLE, like)
    return [
        None if kind is None else call(graph, operator.getitem, (node, index), kind, like)
        for index, kind in enumerate(kinds)
    ]
