"""Values of symbolic sizes: ``"past + tokens"`` with ``{"past": 3, "tokens": 2}`` is 5."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mqc.ir.types import Dim

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "floor": math.floor,
    "ceiling": math.ceil,
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "FloorDiv": operator.floordiv,
    "TruncToInt": int,
    "IntTrueDiv": operator.truediv,
}


class ExampleSizes(dict[str, int]):
    """Sizes to try a graph on: those given, and ``default`` for every other symbol."""

    def __init__(self, default: int, **sizes: int) -> None:
        super().__init__(sizes)
        self.default = default

    def __missing__(self, name: str) -> int:
        return self.default


def evaluate(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The number a size stands for. Raises ``KeyError`` for an unknown symbol.

    Only arithmetic is understood, so the text of a size can never run code.
    """
    if isinstance(dim, int):
        return dim
    return int(_walk(ast.parse(dim, mode="eval").body, sizes))


def evaluate_shape(shape: Sequence[Dim], sizes: Mapping[str, int]) -> list[int]:
    """:func:`evaluate` for every size of a shape."""
    return [evaluate(dim, sizes) for dim in shape]


def _walk(node: ast.expr, sizes: Mapping[str, int]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_walk(node.left, sizes), _walk(node.right, sizes))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_walk(node.operand, sizes)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
        return _CALLS[node.func.id](*(_walk(arg, sizes) for arg in node.args))
    raise ValueError(f"a size may hold arithmetic only, not {ast.dump(node)}")
