"""Products with a parameter as ``aten.linear``: matrix products, convolutions over tiles."""

from __future__ import annotations

from torch import fx

from mqc.ir import Program
from mqc.ir.edit import argument, aten, call, get_param, param_value, replace, tensor_type


def is_by_matrix(node: fx.Node) -> bool:
    """Whether the right factor is a parameter with two axes, and the left one is not."""
    left, right = node.args[:2]
    return (
        isinstance(right, fx.Node)
        and right.op == "get_attr"
        and tensor_type(right).rank == 2
        and isinstance(left, fx.Node)
        and left.op != "get_attr"
    )


def matmul_to_linear(program: Program, node: fx.Node) -> None:
    """``x @ P`` as ``linear(x, P^T)``; see :func:`is_by_matrix`."""
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


def is_tiling(node: fx.Node) -> bool:
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


def conv_to_linear(program: Program, node: fx.Node) -> None:
    """A convolution over a tiling as reshapes around one linear; see :func:`is_tiling`."""
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
