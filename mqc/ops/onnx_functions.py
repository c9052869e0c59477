"""The `mqc::` operators in ONNX: translation for torch.onnx, and portable function bodies.

Every call becomes a node of domain "ai.mqc" whose op type names its variant. A FunctionProto of
that name, in standard ops, makes a file run in a stock onnxruntime; a custom-op library that
registers the op type takes precedence over it.

    program = torch.onnx.export(exported, dynamo=True, opset_version=21,
                                custom_translation_table=translation_table())
    attach_functions(program.model_proto)

onnx and onnxscript are imported by this module alone, not by `mqc.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxscript
import onnxscript.values
import torch

from mqc.errors import TargetError
from mqc.ops._library import OPS, OpDef
from mqc.ops._onnx_body import DOMAIN, DOMAIN_VERSION, OPSET, Body

_TYPES = {
    "float": ["tensor(float)"],
    "q8": ["tensor(int8)", "tensor(uint8)"],
    "bool": ["tensor(bool)"],
    "bool|int64": ["tensor(bool)", "tensor(int64)"],
    "int64": ["tensor(int64)"],
    "float|int64": ["tensor(float)", "tensor(int64)"],
    "float|bool": ["tensor(float)", "tensor(bool)"],
}


def _parse(op_type: str) -> tuple[OpDef, tuple[str, ...]]:
    """Split an op type into its operator and variant flags."""
    name, *flags = op_type.split("_")
    for op in OPS.values():
        if op.onnx.name == name:
            return op, tuple(flags)
    raise TargetError(
        f"{DOMAIN}::{op_type} is not an operator of this version of mqc",
        hint="compile the model again with the installed version",
    )


def variant_inputs(op_type: str) -> tuple[str, ...]:
    """Names of a variant's inputs, in order; what a native kernel of that name receives."""
    op, flags = _parse(op_type)
    return op.onnx.inputs(flags)


def variant_outputs(op_type: str) -> tuple[str, ...]:
    """Names of a variant's outputs, in order."""
    op, flags = _parse(op_type)
    return op.onnx.outputs(flags)


def function_proto(op_type: str) -> onnx.FunctionProto:
    """The body of one variant, e.g. "LinearW4A8_count_bias", in standard ops of opset 21.

    Raises:
        TargetError: on an op type that is not mqc's.
    """
    op, flags = _parse(op_type)
    form, body = op.onnx, Body()
    made = form.body(body, flags)
    results = (made,) if isinstance(made, str) else made
    return body.function(op_type, form.inputs(flags), results, form.outputs(flags), form.attributes)


def _nodes(graph_nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """All nodes, those of subgraphs included."""
    for node in graph_nodes:
        yield node
        for attribute in node.attribute:
            for graph in [attribute.g, *attribute.graphs]:
                yield from _nodes(graph.node)


def function_protos(model: onnx.ModelProto) -> list[onnx.FunctionProto]:
    """Bodies of exactly the `ai.mqc` op types that occur in a model, sorted by name."""
    nodes = list(_nodes(model.graph.node))
    for function in model.functions:
        nodes.extend(_nodes(function.node))
    return [function_proto(t) for t in sorted({n.op_type for n in nodes if n.domain == DOMAIN})]


def attach_functions(model: onnx.ModelProto) -> None:
    """Add the bodies a model lacks, and its imports of the domains they use, in place."""
    present = {function.name for function in model.functions if function.domain == DOMAIN}
    model.functions.extend(f for f in function_protos(model) if f.name not in present)
    imports = {opset.domain for opset in model.opset_import}
    for domain, version in ((DOMAIN, DOMAIN_VERSION), ("", OPSET)):
        if domain not in imports:
            model.opset_import.append(onnx.helper.make_opsetid(domain, version))


def _schema(op_type: str) -> onnx.defs.OpSchema:
    """The schema torch.onnx needs to build a node of a variant."""
    op, flags = _parse(op_type)
    form = op.onnx
    kinds = {a.name: str(a.type) for a in op.overload._schema.arguments}
    attribute = onnx.defs.OpSchema.AttrType
    parameter = onnx.defs.OpSchema.FormalParameter
    constraints: list[tuple[str, list[str], str]] = []
    other = form.dtypes.get("*", "float")

    def typed(name: str) -> onnx.defs.OpSchema.FormalParameter:
        constraints.append((f"T_{name}", _TYPES[form.dtypes.get(name, other)], ""))
        return parameter(name, f"T_{name}")

    return onnx.defs.OpSchema(
        op_type,
        DOMAIN,
        DOMAIN_VERSION,
        inputs=[typed(name) for name in form.inputs(flags)],
        outputs=[typed(name) for name in form.outputs(flags)],
        type_constraints=constraints,
        attributes=[
            onnx.defs.OpSchema.Attribute(
                name, attribute.FLOAT if kinds[name] == "float" else attribute.INT
            )
            for name in form.attributes
        ],
    )


def _require_float32(op: OpDef, arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        dtype = str(getattr(value, "dtype", ""))  # an ONNX name, e.g. "DOUBLE"
        if dtype in ("DOUBLE", "FLOAT16", "BFLOAT16"):
            raise TargetError(
                f"mqc::{op.name} is exported to ONNX in float32 only; {name} is {dtype}",
                hint="convert the program's float tensors to float32 before emitting",
            )


def _translation(op: OpDef) -> Callable[..., Any]:
    opset = onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION)
    standard = onnxscript.opset21

    def translate(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(op.arguments, args, strict=False)) | kwargs
        _require_float32(op, arguments)
        form = op.onnx
        op_type = "_".join((form.name, *form.flags(arguments)))
        values = dict(arguments)
        if form.constants is not None:
            for name, array in form.constants(arguments).items():
                tensor = onnx.numpy_helper.from_array(np.ascontiguousarray(array))
                values[name] = standard.Constant(value=tensor)
        names = variant_inputs(op_type)
        inputs = [values[name.removesuffix("_in")] for name in names]
        call = onnxscript.values.Op(opset, op_type, _schema(op_type))
        made = call(*inputs, **op.attributes(arguments))
        if op.results == 1:
            return made
        results = list(made) if isinstance(made, (tuple, list)) else [made]
        # What a variant leaves out has no elements; a graph that reads it gets just that.
        empty = standard.Constant(value=onnx.numpy_helper.from_array(np.zeros(0, np.float32)))
        return tuple(results + [empty] * (op.results - len(results)))

    return translate


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """OpOverload -> translation, for torch.onnx.export(custom_translation_table=...).

    A float tensor that is not float32 makes the export fail with a `TargetError` as a cause
    (`__cause__`) of torch.onnx's own error.
    """
    table: dict[Callable[..., Any], Callable[..., Any]] = {}
    for op in OPS.values():
        overload: torch._ops.OpOverload = op.overload
        table[overload] = _translation(op)
    return table
