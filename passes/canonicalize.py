"""Bring a captured program into the one form that analyses and passes expect."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from mqc.errors import PassPostconditionError
from mqc.ir import Program
from mqc.ir.edit import (
    argument,
    aten,
    call,
    eliminate_dead_code,
    get_param,
    is_tensor,
    replace,
    tensor_type,
)
from mqc.passes.keep_rows import keep_rows
from mqc.passes.products import conv_to_linear, is_by_matrix, is_tiling, matmul_to_linear
from mqc.passes.rms_norms import match_rms_norm
from mqc.transform import Pass, PassContext, PassResult

_DROPPED = (
    aten.contiguous.default,
    aten.clone.default,
    aten.dropout.default,
    aten.detach.default,
    aten.alias.default,
)
_RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default)
_CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_UNPADDED = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
_FOLD_LIMIT = 1 << 24
"""Constant folding never makes a tensor of more elements than this."""


class Canonicalize(Pass):
    """Bring the graphs into canonical form.

    Postcondition: dialect ``canonical`` (no view, copy, guard or cast between float types);
    every RMSNorm is one ``aten.rms_norm``; values that depend on parameters alone are parameters;
    a convolution whose windows tile its input is a ``linear`` over patches, and so is a product
    with a parameter.

    Copies, views and casts are taken out whatever the limit of a bisection, for they are not legal
    in the dialect; the rewrites behind them count.
    """

    name = "canonicalize"
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        program = program.to(program.dtype)  # all float literals and types: the compute dtype
        result = PassResult(program)
        for component in program:
            for node in list(component.graph.nodes):
                if _is_copy(node):
                    replace(node, node.args[0])
                    result.counts["copies"] += 1
                elif node.target in _RESHAPES:
                    _to_reshape(node)
                    result.counts["views"] += 1
                elif node.target in _CASTS and _is_float_cast(node):
                    replace(node, node.args[0])
                    result.counts["casts"] += 1
            for node in list(component.graph.nodes):
                if _foldable(node) and ctx.take():
                    _fold(program, node)
                    result.counts["constants"] += 1
            for node in list(
                component.graph.find_nodes(op="call_function", target=aten.rsqrt.default)
            ):
                result.counts["rms_norms"] += match_rms_norm(node, ctx)
            for node in list(component.graph.nodes):
                if node.target in _UNPADDED and argument(node, 4) in (None, "valid"):
                    node.args = (*node.args[:4], 0, *node.args[5:])
                    node.target = _UNPADDED[node.target]
                if node.target == aten.matmul.default and is_by_matrix(node) and ctx.take():
                    matmul_to_linear(program, node)
                    result.counts["linears"] += 1
                elif node.target in _CONVS and is_tiling(node) and ctx.take():
                    conv_to_linear(program, node)
                    result.counts["patch_linears"] += 1
            if kept := keep_rows(component, ctx):
                result.counts["kept_rows"] += kept
        eliminate_dead_code(program)
        program.dialect = "canonical"
        return result

    def ensures(self, result: PassResult) -> None:
        for component in result.program:
            for node in component.graph.nodes:
                if node.target in _CASTS and _is_float_cast(node):
                    raise PassPostconditionError(f"%{node.name} is still a cast between floats")


def _is_copy(node: fx.Node) -> bool:
    """Whether ``node`` gives its first argument as it is; padding by nothing does."""
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        return all(amount == 0 for amount in node.args[1])  # type: ignore[union-attr]
    return node.op == "call_function" and node.target in _DROPPED


def _to_reshape(node: fx.Node) -> None:
    """``view`` and ``flatten`` as ``reshape``: the same elements, whatever the strides."""
    if node.target in (aten.flatten.using_ints, aten.unflatten.int):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        with node.graph.inserting_before(node):
            sizes = [
                size if isinstance(size, int) else _size_of(node, source, size)
                for size in tensor_type(node).shape
            ]
        if sum(size == -1 for size in sizes) > 1:
            return
        node.args = (source, sizes)
    node.target = aten.reshape.default


def _size_of(node: fx.Node, source: fx.Node, size: str) -> Any:
    """A symbolic size as a node where the source has it as an axis, else -1 (inferred)."""
    shape = tensor_type(source).shape
    if size not in shape:
        return -1
    return call(node.graph, aten.sym_size.int, (source, shape.index(size)), "scalar", node)


def _is_float_cast(node: fx.Node) -> bool:
    source = argument(node, 0)
    return (
        is_tensor(source)
        and tensor_type(source).dtype.is_floating_point
        and tensor_type(node).dtype.is_floating_point
    )


def _foldable(node: fx.Node) -> bool:
    """A pure operator on parameters alone, whose result is not larger than what it replaces."""
    if node.op != "call_function" or not is_tensor(node) or not node.all_input_nodes:
        return False
    if not all(value.op == "get_attr" for value in node.all_input_nodes):
        return False
    shape = tensor_type(node).shape
    return all(isinstance(size, int) for size in shape) and (
        math.prod(int(size) for size in shape) <= _FOLD_LIMIT
    )


def _fold(program: Program, node: fx.Node) -> None:
    def load(value: fx.Node) -> torch.Tensor:
        return program.params[str(value.target)]

    args = fx.map_arg(node.args, load)
    kwargs = fx.map_arg(node.kwargs, load)
    assert callable(node.target)
    value = node.target(*args, **kwargs)
    first = next(iter(node.all_input_nodes))
    with node.graph.inserting_before(node):
        replace(node, get_param(program, node.graph, str(first.target), value))
