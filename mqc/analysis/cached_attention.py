"""Attentions of a decoder over growing caches: what each reads and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from mqc.analysis.heads import unrepeated
from mqc.analysis.rotary import Rotary, find_rotary
from mqc.analysis.sdpa import SDPA, read_sdpa, token_major
from mqc.ir import Component, Port
from mqc.ir.edit import aten, tensor_type
from mqc.transform import Skip


@dataclass
class CachedAttention:
    """One attention of a decoder with what it reads; q, k, v are [B, heads, S, D]."""

    sdpa: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    caches: tuple[fx.Node, fx.Node]
    joins: tuple[fx.Node, fx.Node]
    mask: fx.Node
    scale: float

    @staticmethod
    def rotary(value: fx.Node) -> tuple[Rotary, bool] | None:
        """The rotary embedding that makes ``value``, and whether its source is so laid out, too."""
        found = find_rotary(value, 1)
        if found is not None:
            return found, True
        source = token_major(value)
        if source is None or tensor_type(source).rank != 4:
            return None
        found = find_rotary(source, 2)
        return None if found is None else (found, False)


def is_growing(port: Port) -> bool:
    """Whether a port is a cache of as many rows as there are past tokens."""
    return port.axis("past") is not None and port.type.rank == 4


def find_cached(component: Component, caches: list[Port]) -> list[CachedAttention] | Skip:
    """All attentions that read a cache, or why one of them does not match."""
    left = {component.placeholder(port.name) for port in caches}
    layers = []
    for node in component.graph.find_nodes(op="call_function", target=SDPA):
        layer = _match(component, node)
        if isinstance(layer, str):
            return Skip(f"{component.name}: %{node.name}", layer)
        layers.append(layer)
        left -= set(layer.caches)
    if left:
        names = ", ".join(sorted(str(node.target) for node in left))
        return Skip(component.name, f"no attention of the known form reads {names}")
    return layers


def _match(component: Component, node: fx.Node) -> CachedAttention | str:
    found = read_sdpa(node)
    if isinstance(found, str):
        return found
    if found.mask is None:
        return "it has no mask"
    joins: list[Any] = []
    for name, side in (("key", found.key), ("value", found.value)):
        join: Any = unrepeated(side) or side
        if join.target is not aten.cat.default or len(join.args) < 2 or len(join.args[0]) != 2:
            return f"its {name}s are not a cache and new rows"
        cache, _ = join.args[0]
        if cache.op != "placeholder" or not is_growing(component.input(str(cache.target))):
            return f"its {name}s do not start with a cache"
        if int(join.args[1]) % 4 != 2 or not _private(component, join, node):
            return f"something else reads its {name}s"
        joins.append(join)
    (key_cache, key), (value_cache, value) = (join.args[0] for join in joins)
    if not isinstance(tensor_type(key).shape[1], int):
        return "its number of heads is not fixed"
    caches = (key_cache, value_cache)
    rows = (found.query, key, value)
    return CachedAttention(node, *rows, caches, (joins[0], joins[1]), found.mask, found.scale)


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
