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
    param_value,
    replace,
    tensor_type,
)
from mqc.passes.keep_rows import keep_rows
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
    """

    name = "canonicalize"
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        program = program.to(program.dtype)  # all float literals and types: the compute dtype
        result = PassResult(program)
        for component in program:
            for node in list(component.graph.nodes):
                if _is_copy(node) and ctx.take():
                    replace(node, node.args[0])
                    result.counts["copies"] += 1
                elif node.target in _RESHAPES and ctx.take():
                    _to_reshape(node)
                    result.counts["views"] += 1
                elif node.target in _CASTS and _is_float_cast(node) and ctx.take():
                    replace(node, node.args[0])
                    result.counts["casts"] += 1
            for node in list(component.graph.nodes):
                if _foldable(node) and ctx.take():
                    _fold(program, node)
                    result.counts["constants"] += 1
            for node in list(
                component.graph.find_nodes(op="call_function", target=aten.rsqrt.default)
            ):
                result.counts["rms_norms"] += _match_rms_norm(node, ctx)
            for node in list(component.graph.nodes):
                if node.target in _UNPADDED and argument(node, 4) in (None, "valid"):
                    node.args = (*node.args[:4], 0, *node.args[5:])
                    node.target = _UNPADDED[node.target]
                if node.target == aten.matmul.default and _by_matrix(node) and ctx.take():
                    _matmul_to_linear(program, node)
                    result.counts["linears"] += 1
                elif node.target in _CONVS and _tiles(node) and ctx.take():
                    _conv_to_linear(program, node)
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


# ---- views, casts, constants ---------------------------------------------------------------


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


# ---- x * rsqrt(mean(x^2) + eps) [* gain]  ->  rms_norm --------------------------------------


def _match_rms_norm(rsqrt: fx.Node, ctx: PassContext) -> int:
    add = rsqrt.args[0]
    if not (isinstance(add, fx.Node) and add.target == aten.add.Tensor):
        return 0
    mean, eps = add.args[0], add.args[1]
    if not (isinstance(mean, fx.Node) and mean.target == aten.mean.dim and not is_tensor(eps)):
        return 0
    square = mean.args[0]
    if mean.args[1] != [-1] or not isinstance(square, fx.Node):
        return 0
    source = _squared(square)
    width = None if source is None else tensor_type(source).shape[-1]
    if source is None or not isinstance(width, int):
        return 0
    count = 0
    for product in list(rsqrt.users):
        if product.target != aten.mul.Tensor or set(product.args) != {source, rsqrt}:
            continue
        if not ctx.take():
            continue
        last, gain = _with_gain(product, width)
        with last.graph.inserting_before(last):
            args = (source, [width], gain, eps)
            norm = call(last.graph, aten.rms_norm.default, args, tensor_type(last), last)
        replace(last, norm)
        count += 1
    return count


def _squared(node: fx.Node) -> fx.Node | None:
    value = node.args[0]
    if node.target == aten.pow.Tensor_Scalar and node.args[1] == 2:
        return value if isinstance(value, fx.Node) else None
    if node.target == aten.mul.Tensor and node.args[1] is value:
        return value if isinstance(value, fx.Node) else None
    return None


def _with_gain(product: fx.Node, width: int) -> tuple[fx.Node, fx.Node | None]:
    """The multiplication by a gain parameter that follows, if it is the only reader."""
    users = list(product.users)
    if len(users) == 1 and users[0].target == aten.mul.Tensor:
        for gain in users[0].args:
            if not (isinstance(gain, fx.Node) and gain.op == "get_attr"):
                continue
            if tensor_type(gain).shape == (width,):
                return users[0], gain
    return product, None


# ---- product with a parameter -> linear --------------------------------------------------------


def _by_matrix(node: fx.Node) -> bool:
    """Whether the right factor is a parameter with two axes, and the left one is not."""
    left, right = node.args[:2]
    return (
        isinstance(right, fx.Node)
        and right.op == "get_attr"
        and tensor_type(right).rank == 2
        and isinstance(left, fx.Node)
        and left.op != "get_attr"
    )


def _matmul_to_linear(program: Program, node: fx.Node) -> None:
    left, right = node.args[:2]
    assert isinstance(right, fx.Node)
    matrix = param_value(program.params, right)
    assert matrix is not None
    with node.graph.inserting_before(node):
        weight = get_param(program, node.graph, str(right.target), matrix.T)
        linear = call(
            node.graph, aten.linear.default, (left, weight, None), tensor_type(node), node
        )
    replace(node, linear)


# ---- convolution over disjoint windows -> linear ---------------------------------------------


def _tiles(node: fx.Node) -> bool:
    """Whether windows neither overlap nor leave gaps, so that patches are just a reshape."""
    source, weight = node.args[0], node.args[1]
    assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
    kernel = tensor_type(weight).shape[2:]
    spatial = tensor_type(source).shape[2:]
    rank = len(kernel)

    def setting(index: int, default: int) -> list[int]:
        value = argument(node, index)
        items = [default] if value is None else value
        values = list(items) if isinstance(items, (list, tuple)) else [items]
        return values * rank if len(values) == 1 else values

    if setting(3, 1) != list(kernel) and spatial != kernel:
        return False
    if any(setting(4, 0)) or setting(5, 1) != [1] * rank or (argument(node, 6) or 1) != 1:
        return False
    return weight.op == "get_attr" and all(
        isinstance(size, int) and size % int(window) == 0
        for size, window in zip(spatial, kernel, strict=True)
    )


def _conv_to_linear(program: Program, node: fx.Node) -> None:
    source, weight, bias = node.args[0], node.args[1], argument(node, 2)
    assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
    values = param_value(program.params, weight)
    assert values is not None
    shape = tensor_type(source)
    window = [int(size) for size in tensor_type(weight).shape[2:]]
    grid = [int(size) // step for size, step in zip(shape.shape[2:], window, strict=True)]
    rank, channels, patch = len(grid), int(shape.shape[1]), values[0].numel()
    rows = shape.shape[0]
    graph = node.graph
    with graph.inserting_before(node):
        count = call(graph, aten.sym_size.int, (source, 0), "scalar", node)
        batch = rows if isinstance(rows, int) else count
        split = [item for pair in zip(grid, window, strict=True) for item in pair]
        tiles = call(
            graph,
            aten.reshape.default,
            (source, [batch, channels, *split]),
            shape.with_shape(rows, channels, *split),
            node,
        )
        # [batch, C, g0, w0, g1, w1, ..] -> [batch, g0, g1, .., w0, w1, .., C]: channels stay
        # side by side, so that analyses can follow them into the linear.
        order = [0, *range(2, 2 + 2 * rank, 2), *range(3, 3 + 2 * rank, 2), 1]
        moved_shape = [tensor_type(tiles).shape[dim] for dim in order]
        moved = call(
            graph, aten.permute.default, (tiles, order), shape.with_shape(*moved_shape), node
        )
        flat = call(
            graph,
            aten.reshape.default,
            (moved, [batch, *grid, patch]),
            shape.with_shape(rows, *grid, patch),
            node,
        )
        columns = values.movedim(1, -1).reshape(values.shape[0], patch)
        matrix = get_param(program, graph, str(weight.target), columns)
        kind = shape.with_shape(rows, *grid, values.shape[0])
        linear = call(graph, aten.linear.default, (flat, matrix, bias), kind, node)
        last = call(
            graph,
            aten.permute.default,
            (linear, [0, rank + 1, *range(1, rank + 1)]),
            tensor_type(node),
            node,
        )
    replace(node, last)
