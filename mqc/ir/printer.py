"""Stable text of a graph, for golden tests, dumps and bug reports."""

from __future__ import annotations

from typing import Any

from torch import fx

from mqc.ir.program import Component, Program
from mqc.ir.serialize import target_name
from mqc.ir.types import TensorType, dtype_name


def format_component(component: Component, program: Program | None = None) -> str:
    """One line a node: ``%name: type = op(args)``. Parameters are printed as ``@name``.

    With ``program``, the types of parameters are shown where they are in memory.
    """
    inputs = ", ".join(f"{port.name}: {port.type}" for port in component.inputs)
    lines = [f"component {component.name}({inputs})"]
    for node in component.graph.nodes:
        if node.op == "call_function":
            lines.append(f"  %{node.name}{_type(node)} = {_call(node)}")
    values = component.output_node.args[0]
    assert isinstance(values, (tuple, list))
    named = zip(component.outputs, values, strict=True)
    lines.append("  return " + ", ".join(f"{port.name}={_arg(v)}" for port, v in named))
    if program is not None:
        for name in sorted(component.param_names()):
            if program.params.is_loaded(name):
                lines.append(f"  @{name}: {TensorType.of(program.params[name])}")
    return "\n".join(lines) + "\n"


def format_program(program: Program) -> str:
    """All components, in the order of the program."""
    head = f"program dialect={program.dialect} dtype={dtype_name(program.dtype)}\n"
    return head + "\n".join(format_component(component) for component in program)


def _type(node: fx.Node) -> str:
    kind = node.meta.get("type")
    return "" if kind is None else f": {kind}"


def _call(node: fx.Node) -> str:
    args = [_arg(arg) for arg in node.args]
    args += [f"{key}={_arg(arg)}" for key, arg in node.kwargs.items()]
    return f"{target_name(node.target)}({', '.join(args)})"


def _arg(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"@{value.target}" if value.op == "get_attr" else f"%{value.name}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_arg, value))})"
    if isinstance(value, list):
        return f"[{', '.join(map(_arg, value))}]"
    return str(value)
