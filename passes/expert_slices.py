"""Experts by modality as slices: each computes the rows that take its value, and no others."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from mqc.analysis.experts import MASK, Choice, find_choices, visual_count
from mqc.errors import PassPostconditionError
from mqc.ir import SCALAR, Component, Program
from mqc.ir.edit import aten, call, eliminate_dead_code, is_tensor, replace, tensor_type
from mqc.ir.serialize import target_name
from mqc.passes.aifs_reorder import AIFS
from mqc.transform import Pass, PassContext, PassResult

MOST, SPREAD, TEXT = "visual_most", "visual_spread", "text_most"
LEAST, REST = "visual_least", "text_least"


class ExpertSlices(Pass):
    """Let visual and text experts compute their own rows only, once visual rows stand first.

    Models with weights of their own for visual tokens (arXiv 2311.03079) are captured with
    both experts over all rows and a choice behind them. Under AIFS the rows of each modality are a
    contiguous slice per sequence: the visual expert computes the first ``most`` rows, ``most`` the
    largest number of visual rows in the batch, and the text expert all from the smallest such
    number on. Between the two, where sequences of a batch differ, both are computed and chosen
    from; a single sequence has nothing in between, a decode step no visual rows.

    Postcondition: in a reordered component every choice by modality joins slices.
    """

    name = "expert-slices"
    after = ("aifs-reorder", "static-scales", "quantize-weights")
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        if program.facts.get("kv_order") != AIFS:
            return result
        for component in program:
            slicer: _Slicer | None = None
            for choice in find_choices(component):
                if choice.visual and choice.text and ctx.take():
                    slicer = slicer or _Slicer(component, choice)
                    slicer.run(choice)
                    result.counts["choices"] += 1
                    result.counts["nodes"] += len(choice.visual) + len(choice.text)
        eliminate_dead_code(program)
        return result

    def ensures(self, result: PassResult) -> None:
        if result.program.facts.get("kv_order") != AIFS:
            return
        for component in result.program:
            for choice in find_choices(component):
                if choice.visual and choice.text:
                    raise PassPostconditionError(f"%{choice.node.name} still takes whole values")


class _Slicer:
    """Slices the sides of choices; bounds and sliced operands are shared by all of a component."""

    def __init__(self, component: Component, first: Choice) -> None:
        self.graph = component.graph
        self.mask = component.placeholder(MASK)
        condition = first.node.args[0]
        while isinstance(condition, fx.Node) and visual_count(condition, self.mask) is None:
            condition = condition.args[0]
        count = visual_count(condition, self.mask)
        assert count is not None and isinstance(condition, fx.Node)
        self.count = count
        self.sliced: dict[tuple[fx.Node, str], fx.Node] = {}
        kind = tensor_type(count)
        with self.graph.inserting_before(condition.next):
            least = self._call(aten.amin.default, (count,), kind.with_shape())
            most = self._call(aten.amax.default, (count,), kind.with_shape())
            self.low = self._call(aten.item.default, (least,), SCALAR)
            self.high = self._call(aten.item.default, (most,), SCALAR)
            self.spread = self._call(operator.sub, (self.high, self.low), SCALAR)
            self.text_count = self._call(aten.sub.Tensor, (count, least), kind)

    def _call(self, target: Any, args: tuple[Any, ...], kind: Any) -> fx.Node:
        return call(self.graph, target, args, kind, self.mask)

    def run(self, choice: Choice) -> None:
        for nodes, size in ((choice.visual, MOST), (choice.text, TEXT)):
            inside = set(nodes)
            for node in nodes:
                self._narrow(node, inside, size)
        node = choice.node
        condition, visual, text = node.args
        with self.graph.inserting_before(node):
            pieces = [
                self._slice(visual, 0, self.low, LEAST),
                self._middle(condition, visual, text),
                self._slice(text, self.spread, None, REST),
            ]
            joined = self._call(aten.cat.default, (pieces, 1), tensor_type(node))
        replace(node, joined)

    def _middle(self, condition: Any, visual: Any, text: Any) -> fx.Node:
        """Rows that are visual in some sequences of the batch and text in others."""
        chosen = (
            self._slice(condition, self.low, self.high, SPREAD),
            self._slice(visual, self.low, None, SPREAD),
            self._slice(text, 0, self.spread, SPREAD),
        )
        return self._call(aten.where.self, chosen, tensor_type(chosen[1]))

    def _narrow(self, node: fx.Node, inside: set[fx.Node], size: str) -> None:
        """Let ``node`` read and give the rows of its side only."""
        kind = tensor_type(node)
        rows = kind.shape[:2]

        def operand(value: fx.Node) -> fx.Node:
            if value is self.count and size == TEXT and target_name(node.target)[:4] == "mqc.":
                return self.text_count
            own = value in inside or not is_tensor(value)
            if own or tensor_type(value).rank != 3 or tensor_type(value).shape[:2] != rows:
                return value
            return self._side(value, size)

        with self.graph.inserting_before(node):
            node.args = fx.map_arg(node.args, operand)
        node.meta["type"] = kind.with_shape(kind.shape[0], size, *kind.shape[2:])

    def _side(self, value: fx.Node, size: str) -> fx.Node:
        """The visual or the text rows of a value that both sides may read."""
        if (value, size) not in self.sliced:
            start, end = (0, self.high) if size == MOST else (self.low, None)
            with self.graph.inserting_after(max(value, self.spread)):
                self.sliced[value, size] = self._slice(value, start, end, size)
        return self.sliced[value, size]

    def _slice(self, value: Any, start: Any, end: Any, size: str) -> fx.Node:
        kind = tensor_type(value)
        shape = (kind.shape[0], size, *kind.shape[2:])
        return self._call(aten.slice.Tensor, (value, 1, start, end), kind.with_shape(*shape))
