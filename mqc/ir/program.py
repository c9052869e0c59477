"""Program: a multimodal model as a few graphs, their parameters, and how they are joined.

``vision`` (tower and connector) and ``embed`` write the rows that the host merges into the
``decoder``'s input. The merge itself is glue outside the graphs; a :class:`Link` tells analyses
that values flow there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from mqc.ir.params import ParamStore
from mqc.ir.types import Port, TensorType


@dataclass(frozen=True)
class Link:
    """Rows of an output port of one component that become rows of an input port of another."""

    source: tuple[str, str]
    target: tuple[str, str]


class Component:
    """One graph: flat placeholders named as ``inputs``, one output node with a flat tuple."""

    def __init__(self, name: str, graph: fx.Graph, inputs: list[Port], outputs: list[Port]) -> None:
        self.name = name
        self.graph = graph
        self.inputs = inputs
        self.outputs = outputs

    def input(self, name: str) -> Port:
        return next(port for port in self.inputs if port.name == name)

    def has_input(self, name: str) -> bool:
        return any(port.name == name for port in self.inputs)

    def output(self, name: str) -> Port:
        return next(port for port in self.outputs if port.name == name)

    def placeholder(self, name: str) -> fx.Node:
        """The placeholder node of input ``name``."""
        nodes = self.graph.find_nodes(op="placeholder")
        found: fx.Node = next(node for node in nodes if node.target == name)
        return found

    @property
    def output_node(self) -> fx.Node:
        node: fx.Node = self.graph.output_node()
        return node

    def output_value(self, name: str) -> fx.Node:
        """The node whose value is output ``name``."""
        index = next(i for i, port in enumerate(self.outputs) if port.name == name)
        values = self.output_node.args[0]
        assert isinstance(values, (tuple, list))
        value = values[index]
        assert isinstance(value, fx.Node)
        return value

    def param_names(self) -> set[str]:
        return {str(node.target) for node in self.graph.find_nodes(op="get_attr")}

    def copy(self) -> Component:
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        result = graph.graph_copy(self.graph, mapping)
        output = graph.output(result)
        output.meta = dict(self.output_node.meta)
        return Component(self.name, graph, list(self.inputs), list(self.outputs))


@dataclass
class Program:
    """A captured model on its way through the passes.

    ``facts`` is JSON data about the model (token ids, cache shapes, where it came from, what
    passes decided). ``history`` lists the passes that ran. ``dtype`` is the compute dtype of every
    floating-point value. ``dialect`` names the table of legal operators (:mod:`mqc.ir.dialect`).
    """

    components: dict[str, Component]
    params: ParamStore
    links: list[Link]
    facts: dict[str, Any]
    dtype: torch.dtype = torch.float32
    dialect: str = "captured"
    history: list[dict[str, Any]] = field(default_factory=list)

    def __iter__(self) -> Iterator[Component]:
        return iter(self.components.values())

    def module(self, name: str) -> fx.GraphModule:
        """Component ``name`` as a callable: placeholders in order, returns the tuple of outputs."""
        component = self.components[name].copy()
        root = torch.nn.Module()
        for key in sorted(component.param_names()):
            root.register_buffer(_attribute(key), self.params[key])
        for node in component.graph.find_nodes(op="get_attr"):
            node.target = _attribute(str(node.target))
        return fx.GraphModule(root, component.graph)

    def copy(self) -> Program:
        """Own graphs, shared tensors."""
        return Program(
            {name: component.copy() for name, component in self.components.items()},
            self.params.copy(),
            list(self.links),
            json.loads(json.dumps(self.facts)),
            self.dtype,
            self.dialect,
            json.loads(json.dumps(self.history)),
        )

    def to(self, dtype: torch.dtype) -> Program:
        """A copy that computes in ``dtype``: parameters, literals and types of all floats."""
        other = self.copy()
        other.params = self.params.cast(dtype)
        other.dtype = dtype
        for component in other:
            component.inputs = [_cast_port(port, dtype) for port in component.inputs]
            component.outputs = [_cast_port(port, dtype) for port in component.outputs]
            for node in component.graph.nodes:
                node.args = _cast_literals(node.args, dtype)
                node.kwargs = _cast_literals(node.kwargs, dtype)
                kind = node.meta.get("type")
                if isinstance(kind, TensorType) and kind.dtype.is_floating_point:
                    node.meta["type"] = kind.with_dtype(dtype)
        return other

    def prune(self) -> int:
        """Drop the parameters that no graph reads; return how many."""
        used: set[str] = set()
        for component in self:
            used |= component.param_names()
        return self.params.prune(used)


def _attribute(name: str) -> str:
    """A parameter's name as one attribute: ``a.weight`` and ``a.weight.scale`` may both exist."""
    return name.replace(".", "/")


def _cast_port(port: Port, dtype: torch.dtype) -> Port:
    if not port.type.dtype.is_floating_point:
        return port
    return Port(port.name, port.type.with_dtype(dtype), port.axes)


def _cast_literals(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.dtype):
        return dtype if value.is_floating_point else value
    if isinstance(value, tuple):
        return tuple(_cast_literals(item, dtype) for item in value)
    if isinstance(value, list):
        return [_cast_literals(item, dtype) for item in value]
    if isinstance(value, dict):
        return {key: _cast_literals(item, dtype) for key, item in value.items()}
    return value
