"""Structural checks of a program. Cheap: run after every pass."""

from __future__ import annotations

from torch import fx

from mqc.errors import VerificationError
from mqc.ir.dialect import DIALECTS
from mqc.ir.program import Component, Program
from mqc.ir.serialize import target_name
from mqc.ir.types import SCALAR, TensorType


def verify(program: Program) -> None:
    """Raise :class:`~mqc.errors.VerificationError` unless the program is well formed.

    Checked: the graph is sound (fx lint), placeholders and outputs match the ports in number, name
    and rank, every value is typed, every parameter exists with the recorded shape (where it is
    loaded), links join existing ports of equal width, all operators are legal in the dialect.
    """
    for component in program:
        try:
            component.graph.lint()
        except RuntimeError as error:
            raise VerificationError(f"component {component.name}: {error}") from error
        _verify_ports(component)
        for node in component.graph.nodes:
            _verify_node(component, program, node)
        _verify_dialect(component, program.dialect)
    for link in program.links:
        source = program.components[link.source[0]].output(link.source[1])
        target = program.components[link.target[0]].input(link.target[1])
        if source.type.shape[-1] != target.type.shape[-1]:
            raise VerificationError(
                f"link {'.'.join(link.source)} -> {'.'.join(link.target)} joins widths "
                f"{source.type.shape[-1]} and {target.type.shape[-1]}"
            )


def _verify_ports(component: Component) -> None:
    names = [str(node.target) for node in component.graph.find_nodes(op="placeholder")]
    if names != [port.name for port in component.inputs]:
        raise VerificationError(
            f"component {component.name}: placeholders {names} are not its inputs "
            f"{[port.name for port in component.inputs]}"
        )
    values = component.output_node.args[0]
    if not isinstance(values, (tuple, list)) or len(values) != len(component.outputs):
        raise VerificationError(f"component {component.name}: outputs are not a flat tuple")
    for port in (*component.inputs, *component.outputs):
        if len(port.axes) != port.type.rank:
            raise VerificationError(
                f"component {component.name}: port {port.name} names {len(port.axes)} axes of "
                f"a rank-{port.type.rank} tensor"
            )


def _verify_node(component: Component, program: Program, node: fx.Node) -> None:
    if node.op == "output":
        return
    where = f"component {component.name}: %{node.name}"
    if node.op not in ("placeholder", "get_attr", "call_function"):
        raise VerificationError(f"{where} is a {node.op}; only function calls are allowed")
    kind = node.meta.get("type")
    if kind is None:
        raise VerificationError(f"{where} ({node.target}) has no type")
    if node.op == "get_attr":
        name = str(node.target)
        if name not in program.params:
            raise VerificationError(f"{where} reads parameter {name!r}, which does not exist")
        if isinstance(kind, TensorType) and program.params.is_loaded(name):
            actual = TensorType.of(program.params[name])
            if actual.shape != kind.shape:
                raise VerificationError(f"{where} is typed {kind}, but {name!r} is {actual}")
    elif not isinstance(kind, TensorType) and kind != SCALAR and not isinstance(kind, str):
        raise VerificationError(f"{where} has a type of unknown form: {kind!r}")


def _verify_dialect(component: Component, name: str) -> None:
    targets = {target_name(node.target) for node in component.graph.nodes if _is_call(node)}
    illegal = DIALECTS[name].illegal(targets)
    if illegal:
        raise VerificationError(
            f"component {component.name}: {', '.join(illegal)} not legal in dialect {name!r}",
            hint="report the model family, or lower these operators in a custom pass",
        )


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function"
