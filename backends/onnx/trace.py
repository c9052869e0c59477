"""The road of :mod:`torch.onnx`, for components that :mod:`mqc.backends.onnx.translate` cannot do.

It knows many more operators and is about twenty times slower: the graph is traced twice more.
Parameters are inputs of the traced graph, so no weight is in memory while this runs and no
optimizer can fold, copy or unpack one.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import onnx
import onnx_ir as ir
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mqc.backends.onnx.builder import OPSET, evaluate_size, value_info
from mqc.errors import TargetError
from mqc.ir import Component, TensorType
from mqc.ops.onnx_functions import translation_table

_PRIMES = (5, 7, 11, 13, 17, 19, 23, 29)
_SYMBOL_NAMES = str.maketrans("+-*/()", "      ")


def trace_component(component: Component) -> onnx.ModelProto:
    """Translate ``component`` to ONNX; the result is as :func:`~mqc.backends.onnx.translate` gives.

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
                custom_translation_table=translation_table(),
            )
    except Exception as error:
        raise _failure(component, error) from error
    assert program is not None
    _clean(program.model)
    model = ir.to_proto(program.model)
    model.graph.name = component.name
    for values, ports in (
        (model.graph.input, component.inputs),
        (model.graph.output, component.outputs),
    ):
        for value, port in zip(values, ports, strict=False):  # parameters follow the inputs
            value.CopyFrom(value_info(port.name, port.type))
    return model


def _export(component: Component, names: list[str]) -> ExportedProgram:
    module = _parameters_as_inputs(component, names)
    sizes = example_sizes(component)
    args, shapes = [], []
    with FakeTensorMode(shape_env=ShapeEnv()):
        for port in component.inputs:
            shape = [evaluate_size(size, sizes) for size in port.type.shape]
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


def _clean(model: ir.Model) -> None:
    """Remove what depends on the machine or the run, and types that a checker may contradict."""
    model.producer_name = model.producer_version = model.doc_string = None
    model.domain = model.model_version = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    kept = {*values, *model.graph.outputs}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        node.metadata_props.clear()
        node.doc_string = None
        values.extend(node.outputs)
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
        if value not in kept:
            value.shape, value.type = None, None


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
