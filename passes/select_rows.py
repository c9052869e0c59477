"""Rows that nobody asks for are not computed behind the last attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mqc.analysis.rows import MODALITY, picked_rows, row_operands, row_region
from mqc.errors import PassPostconditionError
from mqc.ir import TUPLE, Program, TensorType
from mqc.ir.edit import aten, call, eliminate_dead_code, replace, tensor_type
from mqc.transform import Pass, PassContext, PassResult


class SelectRows(Pass):
    """``gather(f(x), rows)`` -> ``f(gather(x, rows))``, for all row-wise ``f`` before a gather.

    The head asks for few rows of a prompt (``logit_index``): what only leads there, the last
    layer's output projection and MLP with it, is computed for these rows. The choice moves up to
    where rows are mixed, or read by something else too: the last attention and the residual
    stream. A modality travels along: its mask is gathered, a count of leading visual rows becomes
    the mask of the rows chosen.

    Postcondition: no gather of whole rows reads a row-wise operator whose result nothing else
    reads.
    """

    name = "select-rows"
    after = ("cleanup", "aifs-reorder", "fuse-quantize", "fuse-residual")
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            for node in list(
                component.graph.find_nodes(op="call_function", target=aten.gather.default)
            ):
                rows, inside = _match(node)
                if rows is not None and ctx.take():
                    _Move(node, rows, inside).run()
                    result.counts["gathers"] += 1
                    result.counts["operators"] += len(inside)
        eliminate_dead_code(program)
        return result

    def ensures(self, result: PassResult) -> None:
        for component in result.program:
            for node in component.graph.find_nodes(op="call_function", target=aten.gather.default):
                if _match(node)[0] is not None:
                    raise PassPostconditionError(f"%{node.name} picks rows of {node.args[0]}")


def _match(gather: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """(the rows that ``gather`` picks, the values that can be computed for these alone)."""
    rows = picked_rows(gather)
    inside: list[fx.Node] = []
    source = gather.args[0]
    if rows is not None and isinstance(source, fx.Node):
        inside = row_region(gather, tensor_type(source).shape[:2])
    # The rows must be known before the first of the values.
    return (rows, inside) if rows is not None and inside and rows < inside[0] else (None, [])


class _Move:
    def __init__(self, gather: fx.Node, rows: fx.Node, inside: list[fx.Node]) -> None:
        self.gather, self.rows, self.inside = gather, rows, inside
        self.graph = gather.graph
        self.chosen: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        known = set(self.inside)
        for node in self.inside:
            with self.graph.inserting_before(node):
                for value in list(row_operands(node)):
                    if value not in known:
                        node.replace_input_with(value, self._pick(value))
                place = MODALITY.get(node.target, len(node.args))
                modality = node.args[place] if place < len(node.args) else None
                if isinstance(modality, fx.Node):
                    node.update_arg(place, self._pick_modality(modality))
            kind = node.meta["type"]
            if kind != TUPLE:
                node.meta["type"] = self._chosen(kind)
        source = self.gather.args[0]
        assert isinstance(source, fx.Node)
        replace(self.gather, source)

    def _chosen(self, kind: TensorType) -> TensorType:
        batch, count = tensor_type(self.rows).shape
        return kind.with_shape(batch, count, kind.shape[-1])

    def _pick(self, value: fx.Node) -> fx.Node:
        """``rows`` of ``value`` [B, T, K], once for all readers."""
        if value not in self.chosen:
            kind = tensor_type(value)
            batch, count = tensor_type(self.rows).shape
            index = tensor_type(self.rows).with_shape(batch, count, 1)
            wide = index.with_shape(batch, count, kind.shape[2])
            column = self._call(aten.unsqueeze.default, (self.rows, 2), index)
            full = self._call(aten.expand.default, (column, [-1, -1, kind.shape[2]]), wide)
            self.chosen[value] = self._call(
                aten.gather.default, (value, 1, full), self._chosen(kind)
            )
        return self.chosen[value]

    def _pick_modality(self, modality: fx.Node) -> fx.Node:
        """The mask [B, R] of the rows chosen, of a mask [B, T] or counts [B] of leading rows."""
        if modality not in self.chosen:
            kind, index = tensor_type(modality), tensor_type(self.rows)
            mask = TensorType(index.shape, torch.bool)
            if kind.dtype == torch.bool:
                args = (modality, 1, self.rows)
                self.chosen[modality] = self._call(aten.gather.default, args, mask)
            else:
                column = kind.with_shape(index.shape[0], 1)
                limit = self._call(aten.unsqueeze.default, (modality, 1), column)
                self.chosen[modality] = self._call(aten.lt.Tensor, (self.rows, limit), mask)
        return self.chosen[modality]

    def _call(self, target: Any, args: tuple[Any, ...], kind: TensorType) -> fx.Node:
        return call(self.graph, target, args, kind, self.gather)
