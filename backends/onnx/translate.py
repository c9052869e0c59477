"""A component as an ONNX model, node by node."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import onnx
from onnx import TensorProto
from torch import fx

import mqc.backends.onnx.rules_math  # noqa: F401  (registers rules)
from mqc.backends.onnx.builder import ONNX_DTYPE, Builder, Unsupported, type_of
from mqc.backends.onnx.rules import RULES, Call
from mqc.backends.onnx.rules_math import size_rule
from mqc.ir import TUPLE, Component, TensorType
from mqc.ir.types import Dim
from mqc.ops import OPS

DOMAIN = "ai.mqc"


def translate(component: Component) -> onnx.ModelProto:
    """Translate ``component`` to ONNX; it is not changed.

    Returns:
        A model whose graph's inputs are the input ports followed by the parameters in the order of
        their names, and whose outputs are the output ports, all under their own names.

    Raises:
        Unsupported: there is no rule for a call; the message names it.
    """
    builder = Builder(component)
    parameters: dict[str, TensorType] = {}
    ports = {node: port.name for port, node in reversed(_results(component))}
    for node in component.graph.nodes:
        if node.op == "get_attr":
            parameters[str(node.target)] = node.meta["type"]
            builder.names[node] = str(node.target)
        elif node.op == "placeholder":
            builder.names[node] = str(node.target)
        elif node.meta.get("type") == TUPLE:
            builder.enter(node)
            _several(builder, node, ports)
        elif node.target is operator.getitem and node.args[0].meta.get("type") == TUPLE:
            continue  # named with the call that makes it
        elif node.op == "call_function":
            start = len(builder.nodes)
            builder.enter(node)
            result = _translate(builder, node)
            name = ports.get(node, node.name)
            made = any(result in item.output for item in builder.nodes[start:])
            builder.names[node] = (
                builder.rename(result, name, start) if made or node in ports else result
            )
    for port, node in _results(component):
        if builder.names[node] != port.name:
            builder.enter(component.output_node)
            builder.rename(builder.names[node], port.name, len(builder.nodes))
    return builder.model(sorted(parameters.items()))


def _results(component: Component) -> list[tuple[Any, fx.Node]]:
    values = component.output_node.args[0]
    assert isinstance(values, (tuple, list))
    return list(zip(component.outputs, values, strict=True))


def _translate(builder: Builder, node: fx.Node) -> str:
    if not isinstance(node.meta.get("type"), TensorType):
        return size_rule(builder, node)
    found = RULES.get(node.target)
    if found is not None:
        return found(builder, Call(node))
    if str(node.target).startswith("mqc."):
        return _own(builder, node)[0]
    raise Unsupported(f"{node.target} has no rule")


class _Operand(NamedTuple):
    """A tensor argument as variants see it; ``dtype`` is the ONNX name, e.g. "UINT8"."""

    shape: tuple[Dim, ...]
    dtype: str

    @classmethod
    def of(cls, node: fx.Node) -> _Operand:
        kind = type_of(node)
        return cls(kind.shape, TensorProto.DataType.Name(ONNX_DTYPE[kind.dtype]))


def _several(builder: Builder, node: fx.Node, ports: dict[fx.Node, str]) -> None:
    """A call with several results: each is named after its reader, or after its port."""
    if not str(node.target).startswith("mqc."):
        raise Unsupported(f"{node.target} has no rule")
    readers = {user: _index(user) for user in node.users}
    names = {index: user.name for user, index in readers.items()}
    names |= {index: ports[user] for user, index in readers.items() if user in ports}
    made = _own(builder, node)
    missing = [index for index in names if index >= len(made)]
    if missing:
        raise Unsupported(f"{node.target}: result {missing[0]} is empty by definition")
    builder.nodes[-1].output[:] = [names.get(i, name) for i, name in enumerate(made)]
    for user, index in readers.items():
        builder.names[user] = names[index]


def _index(getitem: fx.Node) -> int:
    index = getitem.args[1]
    assert isinstance(index, int)
    return index


def _own(builder: Builder, node: fx.Node) -> list[str]:
    """An ``mqc::`` operator: a node of domain ai.mqc whose type names the variant."""
    op = OPS[str(node.target).split(".")[1]]
    call = Call(node)
    kinds: dict[str, Any] = {}
    for name in op.arguments:
        value = call[name]
        kinds[name] = _Operand.of(value) if isinstance(value, fx.Node) else value
    flags = op.onnx.flags(kinds)
    made = {} if op.onnx.constants is None else op.onnx.constants(kinds)
    inputs = []
    for name in op.onnx.inputs(flags):
        if name in made:
            inputs.append(builder.constant(made[name]))
        else:
            inputs.append(builder.name(call[name.removesuffix("_in")]))
    attributes = op.attributes(call._values)
    name = builder("_".join((op.onnx.name, *flags)), *inputs, domain=DOMAIN, **attributes)
    names = [name, *(f"{name}.{extra}" for extra in op.onnx.outputs(flags)[1:])]
    builder.nodes[-1].output[:] = names
    return names
