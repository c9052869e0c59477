"""A component as an ONNX graph: exported again without its parameters, translated node by node.

Parameters are inputs of the traced graph, so no weight is in memory while this runs and no
optimizer can fold, copy or unpack one. :mod:`mqc.backends.onnx.write` makes them initializers and
streams their data into the file.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mqc.errors import TargetError
from mqc.ir import Component, Port, TensorType

OPSET = 21
_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29)
_SYMBOL_NAMES = str.maketrans("+-*/()", "      ")


def trace_component(
    component: Component, translations: Mapping[Callable[..., Any], Callable[..., Any]]
) -> ir.Model:
    """Translate ``component`` to ONNX.

    Args:
        component: a graph of ATen and ``mqc::`` operators; it is not changed.
        translations: operator overload -> function that emits ONNX operators.

    Returns:
        A model whose graph's inputs are the component's input ports followed by its parameters in
        the order of their names, and whose outputs are its output ports, all under their names.

    Raises:
        TargetError: an operator has no translation, or a dynamic size became a constant.
    """
    names = sorted(component.param_names())
    exported = _export(component, names)
    try:
        with _quiet():
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                optimize=True,
                verify=False,
                verbose=False,
                input_names=[*(port.name for port in component.inputs), *names],
                output_names=[port.name for port in component.outputs],
                custom_translation_table=dict(translations),
            )
    except Exception as error:
        raise _failure(component, error) from error
    assert program is not None
    _set_ports(program.model, component)
    return program.model


def _export(component: Component, names: list[str]) -> ExportedProgram:
    module = _parameters_as_inputs(component, names)
    sizes = example_sizes(component)
    args, shapes = [], []
    with FakeTensorMode(shape_env=ShapeEnv()):
        for port in component.inputs:
            shape = [_evaluate(size, sizes) for size in port.type.shape]
            args.append(torch.empty(shape, dtype=port.type.dtype))
            shapes.append(
                {i: Dim.AUTO for i, s in enumerate(port.type.shape) if isinstance(s, str)}
            )
        for node in list(module.graph.find_nodes(op="placeholder"))[len(component.inputs) :]:
            kind = node.meta["type"]
            args.append(torch.empty(kind.shape, dtype=kind.dtype))
            shapes.append({})
    try:
        with torch.no_grad(), _quiet():
            exported = torch.export.export(
                module, tuple(args), dynamic_shapes=tuple(shapes), strict=False
            )
    except Exception as error:
        raise _failure(component, error) from error
    _check_dynamic(component, exported)
    return exported


def _parameters_as_inputs(component: Component, names: list[str]) -> fx.GraphModule:
    """The graph with a placeholder after its inputs for every parameter in ``names``."""
    graph = component.copy().graph
    readers: dict[str, list[fx.Node]] = {}
    for node in graph.find_nodes(op="get_attr"):
        readers.setdefault(str(node.target), []).append(node)
    last = list(graph.find_nodes(op="placeholder"))[-1]
    for index, name in enumerate(names):
        kind = readers[name][0].meta["type"]
        assert isinstance(kind, TensorType)
        with graph.inserting_after(last):
            last = graph.placeholder(f"p{index}")
        last.meta = {"type": kind}
        for node in readers[name]:
            node.replace_all_uses_with(last)
            graph.erase_node(node)
    return fx.GraphModule(torch.nn.Module(), graph)


def example_sizes(component: Component) -> dict[str, int]:
    """A different size for every symbol in the component's inputs; none is 0 or 1."""
    symbols: dict[str, None] = {}
    for port in component.inputs:
        for size in port.type.shape:
            if isinstance(size, str):
                words = size.translate(_SYMBOL_NAMES).split()
                symbols.update(dict.fromkeys(word for word in words if not word.isdigit()))
    return dict(zip(symbols, _PRIMES, strict=False))


def _evaluate(size: int | str, sizes: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    return int(eval(size, {"__builtins__": {}}, dict(sizes)))


def _check_dynamic(component: Component, exported: ExportedProgram) -> None:
    nodes = exported.graph.find_nodes(op="placeholder")[: len(component.inputs)]
    for port, node in zip(component.inputs, nodes, strict=True):
        for axis, size in enumerate(port.type.shape):
            if isinstance(size, str) and isinstance(node.meta["val"].shape[axis], int):
                raise TargetError(
                    f"component {component.name}: axis {axis} ({size}) of input {port.name} "
                    f"became the constant {node.meta['val'].shape[axis]}",
                    hint="a pass replaced a symbolic size by a number",
                )


def _set_ports(model: ir.Model, component: Component) -> None:
    """Give the graph's inputs and outputs the types of the ports, with their readable sizes."""
    for values, ports in (
        (model.graph.inputs, component.inputs),
        (model.graph.outputs, component.outputs),
    ):
        for value, port in zip(values, ports, strict=False):  # parameters follow the inputs
            _set_port(value, port)


def _set_port(value: ir.Value, port: Port) -> None:
    value.shape = ir.Shape(list(port.type.shape))
    value.type = ir.TensorType(_onnx_dtype(port.type.dtype))


def _onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    return ir.tensor(torch.empty(0, dtype=dtype)).dtype


def _failure(component: Component, error: Exception) -> TargetError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if "Error" in line or "ERROR" in line), "")
    return TargetError(
        f"component {component.name} cannot be written as ONNX: {type(error).__name__}: "
        f"{reason or (lines or [''])[0]}",
        hint="use --target reference, or lower the operator in a custom pass",
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes on packages and flags that do not matter here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
