"""Writes into tensors, taken out of an exported graph.

``torch.export`` records what a model does, in-place writes included: ``x[..., 1::3] = y`` is a
``slice`` of ``x`` and a ``copy_`` into it whose result nobody reads. A program's graphs have
values, not storage, so :func:`functionalize` gives every write a value and lets whoever reads the
written storage afterwards read that value: through ``slice_scatter`` and ``select_scatter`` up the
chain of views to the tensor that owns the storage, and down again to its other views.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import fx

from mqc.errors import CaptureError

aten = torch.ops.aten

_SAME = (aten.detach_.default,)
_SCATTER = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


class _View(NamedTuple):
    """How a value looks at the storage of another: ``target(parent, *args)``."""

    parent: fx.Node
    target: Any
    args: tuple[Any, ...]


def functionalize(graph: fx.Graph) -> int:
    """Rewrite ``graph`` in place; return the number of writes.

    Raises :class:`CaptureError` for a write to an input, a parameter or a buffer, and for one
    through a view that is no slice or selection.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    views: dict[fx.Node, _View] = {}
    count = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if _writes(node) and node.target not in _SAME:
            _rewrite(graph, node, views, order)
            count += 1
        elif _is_alias(node) and isinstance(node.args[0], fx.Node):
            views[node] = _View(node.args[0], node.target, node.args[1:])
    return count


def _writes(node: fx.Node) -> bool:
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    return bool(
        arguments and arguments[0].alias_info is not None and arguments[0].alias_info.is_write
    )


def _is_alias(node: fx.Node) -> bool:
    """Whether the result shares storage with the first argument."""
    schema = node.target._schema  # type: ignore[union-attr]
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _rewrite(
    graph: fx.Graph, write: fx.Node, views: dict[fx.Node, _View], order: dict[fx.Node, int]
) -> None:
    target = write.args[0]
    assert isinstance(target, fx.Node)
    chain = [target]
    while chain[-1] in views:
        chain.append(views[chain[-1]].parent)
    root = chain[-1]
    if root.op != "call_function":
        raise CaptureError(
            f"the model writes into {root.name!r} in place", hint="report the model family"
        )
    others = [view for view in views if view not in chain and _root(view, views) is root]
    later = {
        old: [user for user in old.users if order[user] > order[write]] for old in (*chain, *others)
    }
    with graph.inserting_after(write):
        value = _functional(graph, write)
    new = {target: value}
    last = value
    for child, parent in pairwise(chain):
        view = views[child]
        operator = _SCATTER.get(view.target)
        if operator is None:
            raise CaptureError(
                f"the model writes through {view.target} (%{child.name}) in place",
                hint="report the model family",
            )
        with graph.inserting_after(last):
            args = (parent, new[child], *view.args)
            last = new[parent] = _call(graph, operator, args, parent)
    for other in others:
        view = views[other]
        with graph.inserting_after(last):
            args = (new[view.parent], *view.args)
            last = new[other] = _call(graph, view.target, args, other)
    for old, users in later.items():
        for user in users:
            user.replace_input_with(old, new[old])
    write.replace_all_uses_with(value)
    graph.erase_node(write)
    order.update({node: place for place, node in enumerate(graph.nodes)})
    for old in (*chain, *others):
        if old in views:
            views[new[old]] = views[old]._replace(parent=new[views[old].parent])


def _root(node: fx.Node, views: dict[fx.Node, _View]) -> fx.Node:
    while node in views:
        node = views[node].parent
    return node


def _functional(graph: fx.Graph, write: fx.Node) -> fx.Node:
    """The written value: ``copy_`` is its source in the target's shape and dtype, ``op_`` is
    ``op``."""
    target, *rest = write.args
    assert isinstance(target, fx.Node)
    kwargs = dict(write.kwargs)
    if write.target is aten.copy_.default:
        (value, *_) = rest
        shape = list(target.meta["val"].shape)
        assert isinstance(value, fx.Node)
        if list(value.meta["val"].shape) != shape:
            if not all(isinstance(size, int) for size in shape):
                raise CaptureError(
                    f"the model broadcasts into a slice in place (%{write.name})",
                    hint="report the model family",
                )
            expanded = _call(graph, aten.expand.default, (value, shape), target)
            write.append(expanded)
            value = expanded
        return _call(graph, aten.to.dtype, (value, target.meta["val"].dtype), target)
    packet, overload = str(write.target._schema.name).split("::")[1], write.target._overloadname  # type: ignore[union-attr]
    function = getattr(getattr(aten, packet.removesuffix("_")), overload)
    return _call(graph, function, write.args, target, kwargs)


def _call(
    graph: fx.Graph,
    target: Any,
    args: tuple[Any, ...],
    like: fx.Node,
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    node = graph.call_function(target, args, kwargs or {})
    node.meta = dict(like.meta)
    return node
