"""Writing an ONNX graph from a component: values, constants, sizes."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx

from mqc.ir import Component, TensorType
from mqc.ir.edit import tensor_type
from mqc.ir.types import Dim

OPSET = 21
IR_VERSION = 10

ONNX_DTYPE = {
    torch.float64: TensorProto.DOUBLE,
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}

_SIZE_OPS = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.FloorDiv: "Div"}


class Unsupported(Exception):  # noqa: N818  (not an error: another road is taken)
    """A call that has no rule, or a part of one that its rule does not cover."""


class Builder:
    """Collects the nodes of one ONNX graph.

    A tensor is known by its name in the graph. A symbolic size is an int64 tensor of one element.
    Equal constants and equal sizes are written once.
    """

    def __init__(self, component: Component) -> None:
        self.component = component
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.names: dict[fx.Node, str] = {}
        self._cache: dict[Any, str] = {}
        self._scope = ""
        self._label = ""
        self._serial = 0

    # -- nodes -----------------------------------------------------------------------------------

    def enter(self, node: fx.Node) -> None:
        """Name what follows after ``node``, of a component's graph."""
        self._scope, self._serial = node.name, 0
        self._label = "/".join(filter(None, (str(node.meta.get("module", "")), node.name)))

    def __call__(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output; return the output's name."""
        output = f"{self._scope}.{self._serial}"
        name = f"{self._label}.{self._serial}"
        self._serial += 1
        given = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.append(
            helper.make_node(op_type, inputs, [output], name=name, domain=domain, **given)
        )
        return output

    def once(self, key: Any, make: Callable[[], str]) -> str:
        """The value of ``make()``, made when ``key`` is first asked for."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]

    def constant(self, value: npt.ArrayLike, dtype: torch.dtype | None = None) -> str:
        """The name of an initializer that holds ``value``."""
        array = np.asarray(value)
        if dtype is not None:
            array = torch.tensor(array.tolist(), dtype=dtype).numpy()
        key = ("constant", array.dtype.str, array.shape, array.tobytes())

        def make() -> str:
            name = f"constant.{len(self.constants)}"
            self.constants.append(numpy_helper.from_array(np.array(array, order="C"), name))
            return name

        return self.once(key, make)

    def ints(self, *values: int) -> str:
        """An int64 list."""
        return self.constant(np.array(values, np.int64))

    def cast(self, name: str, dtype: torch.dtype) -> str:
        return self("Cast", name, to=ONNX_DTYPE[dtype])

    # -- operands --------------------------------------------------------------------------------

    def name(self, value: Any) -> str:
        """The name of the tensor (or size) that ``value``, a node, has become."""
        return self.names[value]

    def operand(self, value: Any, dtype: torch.dtype) -> str:
        """A node or a number as a tensor of ``dtype``."""
        if not isinstance(value, fx.Node):
            return self.constant(np.array(value), dtype)
        kind = value.meta["type"]
        actual = kind.dtype if isinstance(kind, TensorType) else torch.int64
        return self.name(value) if actual == dtype else self.cast(self.name(value), dtype)

    # -- sizes -----------------------------------------------------------------------------------

    def size(self, value: Any) -> str:
        """A size, given as a number, a node or an expression such as ``a + b``: int64 [1]."""
        if isinstance(value, int):
            return self.ints(value)
        if isinstance(value, fx.Node):
            return self.name(value)
        return self.once(("size", value), lambda: self._expression(str(value)))

    def shape(self, sizes: list[Any]) -> str:
        """Sizes as one int64 list."""
        if all(isinstance(size, int) for size in sizes):
            return self.ints(*sizes)
        return self("Concat", *[self.size(size) for size in sizes], axis=0)

    def reshape(self, name: str, source: tuple[Dim, ...], target: tuple[Dim, ...]) -> str:
        """``name``, of shape ``source``, in the shape ``target``."""
        if source == target:
            return name
        plan: list[Any] = [
            size
            if isinstance(size, int)
            else (0 if axis < len(source) and source[axis] == size else size)
            for axis, size in enumerate(target)
        ]
        unknown = [axis for axis, size in enumerate(plan) if isinstance(size, str)]
        # -1 cannot be inferred for a tensor without elements: an empty past.
        if len(unknown) == 1 and "past" not in source:
            plan[unknown[0]] = -1
        return self("Reshape", name, self.shape(plan))

    def _expression(self, text: str) -> str:
        for port in self.component.inputs:
            if text in port.type.shape:
                axis = port.type.shape.index(text)
                return self("Shape", port.name, start=axis, end=axis + 1)
        return self._evaluate(ast.parse(text, mode="eval").body)

    def _evaluate(self, tree: ast.expr) -> str:
        if isinstance(tree, ast.Constant):
            return self.ints(int(str(tree.value)))
        if isinstance(tree, ast.BinOp) and type(tree.op) in _SIZE_OPS:
            left, right = (self.size(ast.unparse(side)) for side in (tree.left, tree.right))
            return self(_SIZE_OPS[type(tree.op)], left, right)
        symbol = ast.unparse(tree)
        for port in self.component.inputs:
            for axis, size in enumerate(port.type.shape):
                factor = _factor(size, symbol)
                if factor is not None:
                    whole = self("Shape", port.name, start=axis, end=axis + 1)
                    return self("Div", whole, self.ints(factor))
        raise Unsupported(f"size {symbol!r} is not the size of an input")

    # -- the graph -------------------------------------------------------------------------------

    def rename(self, old: str, new: str, start: int) -> str:
        """Let ``old``, made by one of the nodes from ``start`` on, be called ``new``.

        What was made earlier, or is an input, gets an Identity.
        """
        for node in self.nodes[start:]:
            if old in node.output:
                break
        else:
            old = self("Identity", old)
        for node in self.nodes[start:]:
            for names in (node.input, node.output):
                for index, name in enumerate(names):
                    if name == old:
                        names[index] = new
        for key, name in self._cache.items():
            if name == old:
                self._cache[key] = new
        return new

    def model(self, parameters: list[tuple[str, TensorType]]) -> onnx.ModelProto:
        """The finished model; the parameters follow the inputs."""
        ports = self.component.inputs
        inputs = [(port.name, port.type) for port in ports] + parameters
        outputs = [(port.name, port.type) for port in self.component.outputs]
        nodes = _live(self.nodes, {name for name, _ in outputs})
        read = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            self.component.name,
            [value_info(name, kind) for name, kind in inputs],
            [value_info(name, kind) for name, kind in outputs],
            [tensor for tensor in self.constants if tensor.name in read],
        )
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)


def _live(nodes: list[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes that lead to ``wanted`` values: onnxruntime runs all that it is given.

    A rule may have read past a node, so that its result is not needed any more.
    """
    kept = []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]


def evaluate_size(size: int | str, sizes: Mapping[str, int]) -> int:
    """A size such as ``4*blocks`` for given values of the symbols."""
    if isinstance(size, int):
        return size
    return int(eval(size, {"__builtins__": {}}, dict(sizes)))


def type_of(node: Any) -> TensorType:
    """The type of a tensor node."""
    return tensor_type(node)


def value_info(name: str, kind: TensorType) -> onnx.ValueInfoProto:
    """The type of a graph's input or output, with its readable sizes."""
    return helper.make_tensor_value_info(name, ONNX_DTYPE[kind.dtype], list(kind.shape))


def _factor(size: Dim, symbol: str) -> int | None:
    """``n`` where ``size`` is ``n*symbol``."""
    if not isinstance(size, str):
        return None
    first, _, rest = size.partition("*")
    return int(first) if rest.strip() == symbol and first.strip().isdigit() else None
