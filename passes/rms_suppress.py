"""Rotation Magnitude Suppression: split off the few columns that a rotation made huge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, fx

from mqc.analysis.flow import is_linear
from mqc.analysis.head import find_head
from mqc.calib.samples import component_samples
from mqc.calib.walk import Values, walk
from mqc.ir import Component, Program, TensorType
from mqc.ir.edit import aten, call, get_param, set_param, tensor_type
from mqc.transform import Pass, PassContext, PassResult

if TYPE_CHECKING:
    from mqc.spec import Scheme

MAX_COLUMNS = 4
"""More columns than this are no outliers; a rank-k update of that size is no longer free."""


class RmsSuppress(Pass):
    """Split dominant weight columns into a float rank-k update (MQuant section 3.4, "RMS").

    A Hadamard transform turns the mean of a weight row into its first column, far above the rest,
    so that a row's int4 scale is wasted on it; the same channel of the activation carries the mean
    of the activations. Which columns dominate is measured, not assumed: columns are taken, largest
    first, while leaving them out shrinks the quantization scales (root mean square over rows of
    the weights; range of the activations, if there is calibration data) by ``threshold`` each.
    ``y = W x`` becomes ``y = W' x + w_c x_c`` with column c of W' zero.

    Postcondition: split columns of the remaining weight are exactly zero.
    """

    name = "rms-suppress"
    after = ("canonicalize", "fuse-norm", "hadamard-fuse", "hadamard-online")
    preserves = True

    def __init__(self, threshold: float = 1.25) -> None:
        self.threshold = threshold

    @classmethod
    def from_scheme(cls, scheme: Scheme) -> Self:
        return cls(scheme.rms_threshold)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            readers = _readers(component)
            ranges = _activation_ranges(program, component, readers, ctx)
            for value, linears in readers.items():
                weights = [program.params[str(n.args[1].target)] for n in linears]  # type: ignore[union-attr]
                columns = self.dominant(torch.cat(weights), ranges.get(value))
                if columns and ctx.take():
                    for node in linears:
                        _split(program, node, columns)
                    result.counts["layers"] += len(linears)
                    result.counts["columns"] += len(columns)
                    result.details.append(
                        {
                            "layers": [_base_name(node) for node in linears],
                            "component": component.name,
                            "columns": columns,
                        }
                    )
        return result

    def dominant(self, weight: Tensor, channel_range: Tensor | None = None) -> list[int]:
        """Dominant columns of a weight [N, K], given the largest activation per channel [K]."""
        magnitude = weight.abs().to(torch.float64)
        order = magnitude.square().sum(0).argsort(descending=True, stable=True)
        columns = order[: self._count(magnitude, order)].tolist()
        if channel_range is not None:
            values = channel_range.to(torch.float64).clone()
            values[columns] = 0.0
            order = values.argsort(descending=True, stable=True)
            columns += order[: self._count(values[None], order)].tolist()
        return sorted(columns[:MAX_COLUMNS])

    def _count(self, magnitude: Tensor, order: Tensor) -> int:
        """How many of the first columns in ``order`` to split off.

        Several equal outliers hide behind each other: the scale shrinks only when the last one is
        gone. So j more columns are taken as soon as together they earn ``threshold ** j``.
        """
        rest, scales = magnitude.clone(), []
        for column in (None, *order[: min(MAX_COLUMNS, len(order) - 1)].tolist()):
            if column is not None:
                rest[:, column] = 0.0
            scales.append(float(rest.amax(1).square().sum().sqrt()))
        count = 0
        for more in range(1, len(scales)):
            if scales[more] == 0.0:
                break
            if scales[count] / scales[more] >= self.threshold ** (more - count):
                count = more
        return count


def _readers(component: Component) -> dict[fx.Node, list[fx.Node]]:
    """Linears by the value they read, without the head (it is not quantized by default)."""
    head = find_head(component)
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node in component.graph.nodes:
        if is_linear(node) and node is not head and "keep_float" not in node.meta:
            value = node.args[0]
            assert isinstance(value, fx.Node)
            readers.setdefault(value, []).append(node)
    return readers


def _activation_ranges(
    program: Program,
    component: Component,
    readers: dict[fx.Node, list[fx.Node]],
    ctx: PassContext,
) -> dict[fx.Node, Tensor]:
    """Largest magnitude per channel of every value that a linear reads; empty without data."""
    ranges: dict[fx.Node, Tensor] = {}
    if not (ctx.calibration and readers):
        return ranges

    def visit(node: fx.Node, values: Values) -> None:
        if is_linear(node) and node.args[0] in readers and node.args[0] not in ranges:
            value = node.args[0]
            assert isinstance(value, fx.Node)
            peaks = [x.abs().reshape(-1, x.shape[-1]).amax(0) for x in values(value) if x.numel()]
            ranges[value] = torch.stack(peaks).amax(0)

    samples = component_samples(program, ctx.calibration, component.name)
    name = f"rms-suppress {component.name}"
    walk(program, component, samples, visit, lambda done, total: ctx.progress(name, done, total))
    return ranges


def _base_name(node: fx.Node) -> str:
    return str(node.args[1].target).partition("~")[0]  # type: ignore[union-attr]


def _split(program: Program, node: fx.Node, columns: list[int]) -> None:
    value = node.args[0]  # now: a linear in front may have been split already
    assert isinstance(value, fx.Node)
    weight = program.params[str(node.args[1].target)]  # type: ignore[union-attr]
    kept = weight.clone()
    kept[:, columns] = 0.0
    base = _base_name(node)
    set_param(program, node, 1, kept)
    graph, kind = node.graph, tensor_type(value)
    picked = TensorType((*kind.shape[:-1], len(columns)), kind.dtype)
    with graph.inserting_after(node):
        update = call(
            graph, torch.ops.mqc.rank_update.default, (node, None, None), tensor_type(node), node
        )
    node.replace_all_uses_with(update, delete_user_cb=lambda user: user is not update)
    with graph.inserting_before(update):
        index = get_param(program, graph, f"{base}.split_columns", torch.tensor(columns))
        part = call(graph, aten.index_select.default, (value, kind.rank - 1, index), picked, node)
        split = get_param(program, graph, f"{base}.split", weight[:, columns])
    update.args = (node, part, split)
