"""Which channel ends up where? Found by sending indices through the graph's view operators.

Instead of reasoning about every reshape, permute, split and repeat symbolically, a value is
replaced by a tensor of channel indices and the real operators are run on it, on tiny sizes. The
result says exactly which channel of the source stands at which place of the target.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from mqc.ir import TensorType
from mqc.ir.dialect import SIZE_OPS, VIEW_OPS
from mqc.ir.edit import aten
from mqc.ir.serialize import target_name
from mqc.ir.symbols import evaluate, evaluate_shape

CLONES = frozenset(("aten.contiguous.default", "aten.clone.default"))
EMPTY = -1
"""Index of rows that come from no channel of the source (for example constants)."""


def is_view(node: fx.Node) -> bool:
    """Whether ``node`` only moves, repeats or selects elements of its inputs."""
    if node.op != "call_function":
        return False
    name = target_name(node.target)
    return name in VIEW_OPS or name in CLONES or node.target is operator.getitem


def is_choice(node: fx.Node) -> bool:
    """Whether ``node`` takes whole rows of one value or of another."""
    if node.target != aten.where.self:
        return False
    condition = node.args[0]
    kind = condition.meta.get("type") if isinstance(condition, fx.Node) else None
    return isinstance(kind, TensorType) and kind.shape[-1:] == (1,)


class IndexTrace:
    """Evaluates view-like nodes on index tensors. ``sizes`` gives every symbol a small value."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.values: dict[fx.Node, Any] = {}

    def shape(self, node: fx.Node) -> list[int]:
        kind = node.meta["type"]
        assert isinstance(kind, TensorType)
        return evaluate_shape(kind.shape, self.sizes)

    def seed_channels(self, node: fx.Node) -> None:
        """Let ``node`` hold its last-axis index in every row."""
        shape = self.shape(node)
        self.values[node] = torch.arange(shape[-1]).expand(shape).clone()

    def seed(self, node: fx.Node, value: torch.Tensor) -> None:
        self.values[node] = value

    def get(self, value: Any) -> Any:
        """The index tensor of a node (or the value of a size, or a plain argument)."""
        if isinstance(value, (list, tuple)):
            return type(value)(self.get(item) for item in value)
        if not isinstance(value, fx.Node):
            return value
        if value not in self.values:
            self.values[value] = self._evaluate(value)
        return self.values[value]

    def _evaluate(self, node: fx.Node) -> Any:
        if is_choice(node):  # both sides hold the same channel, or it is not known which
            left, right = self.get(node.args[1]), self.get(node.args[2])
            return torch.where(left == right, left, EMPTY)
        if node.op != "call_function" or not (is_view(node) or self._is_size(node)):
            return torch.full(self.shape(node), EMPTY)
        if node.target == aten.sym_size.int:
            source, dim = node.args
            assert isinstance(source, fx.Node) and isinstance(dim, int)
            kind = source.meta["type"]
            assert isinstance(kind, TensorType)
            return evaluate(kind.shape[dim], self.sizes)
        args = self.get(node.args)
        kwargs = {key: self.get(item) for key, item in node.kwargs.items()}
        assert callable(node.target)
        return node.target(*args, **kwargs)

    @staticmethod
    def _is_size(node: fx.Node) -> bool:
        return target_name(node.target) in SIZE_OPS


def channels_of(value: Any) -> set[int]:
    """The source channels that occur in an index tensor (or a list of them)."""
    if isinstance(value, (list, tuple)):
        return set().union(*(channels_of(item) for item in value))
    if not isinstance(value, torch.Tensor):
        return set()
    return set(value.unique().tolist()) - {EMPTY}
