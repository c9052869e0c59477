"""AIFS: put visual tokens first, once, so that each modality is one contiguous slice."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mqc.errors import PassPreconditionError
from mqc.ir import SCALAR, Component, Port, Program, TensorType
from mqc.ir.edit import aten, call, eliminate_dead_code, tensor_type
from mqc.ir.serialize import target_name
from mqc.passes.modality_split import INPUT
from mqc.transform import Pass, PassContext, PassResult, Skip

AIFS = "aifs"
"""``facts["kv_order"]`` of a program whose cache holds each call's keys visual-first."""


class AifsReorder(Pass):
    """Attention-Invariant Flexible Switching (MQuant section 3.3).

    All inputs with a token axis are permuted where they enter: visual rows first, both groups in
    their order. Positions travel with their tokens, and so do the rows and the new columns of the
    mask, so attention is unchanged: ``M'[i, j] = M[pi(i), pi(j)]``. The rows that the head is
    asked for are looked up in the new order; nothing else has to be undone. Operators that took
    the row mask take the number of visual rows instead. The cache keeps the new order, for all of
    a later call's tokens follow it anyway.

    Works per sequence: several images, interleaved text, text only and batches are all the same.

    Postcondition: the row mask is read by the permutation alone, and ``facts["kv_order"]`` says so;
    or a skip says why not, and operators keep reading the row mask.
    """

    name = "aifs-reorder"
    after = ("modality-split", "static-scales", "quantize-weights")
    preserves = True

    def requires(self, program: Program) -> None:
        if not any(component.has_input(INPUT) for component in program):
            raise PassPreconditionError(
                "aifs-reorder finds no component with the input 'modality'",
                hint="run the pass modality-split first",
            )
        if program.facts.get("kv_order") == AIFS:
            raise PassPreconditionError("the program is already reordered")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            if component.has_input(INPUT) and _recurrent(component):
                reason = "a recurrent layer reads tokens one after the other, in their order"
                result.skips.append(Skip(component.name, reason))
            elif component.has_input(INPUT) and ctx.take():
                _Reorder(component).run(result)
                program.facts["kv_order"] = AIFS
        eliminate_dead_code(program)
        return result


def _counts(reader: fx.Node) -> bool:
    """Whether a reader of the row mask takes the number of visual rows as well."""
    return target_name(reader.target).startswith("mqc.")


def _recurrent(component: Component) -> bool:
    """Whether the order of tokens matters to a memory that the component keeps."""
    return any(port.axis("memory") is not None for port in component.inputs)


class _Reorder:
    def __init__(self, component: Component) -> None:
        self.component = component
        self.graph = component.graph
        self.mask = component.placeholder(INPUT)
        self.like = self.mask

    def _call(self, target: Any, args: tuple[Any, ...], kind: TensorType | str) -> fx.Node:
        return call(self.graph, target, args, kind, self.like)

    def run(self, result: PassResult) -> None:
        readers = list(self.mask.users)
        ports = [(p, self.component.placeholder(p.name)) for p in self.component.inputs]
        users = {node: list(node.users) for _, node in ports}
        last = ports[-1][1]
        anchor = last.next
        while anchor.op == "placeholder":
            anchor = anchor.next
        with self.graph.inserting_before(anchor):
            place, order, count = self._permutation()
            for port, node in ports:
                moved = self._move(port, node, place, order)
                if moved is None:
                    continue
                for user in users[node]:
                    if user.target != aten.sym_size.int:
                        user.replace_input_with(node, moved)
                result.counts["inputs"] += 1
            if not all(map(_counts, readers)):
                first = self._visual_first(count)
        for reader in readers:
            reader.replace_input_with(self.mask, count if _counts(reader) else first)
            result.counts["readers"] += 1

    def _permutation(self) -> tuple[fx.Node, fx.Node, fx.Node]:
        """(new place of each token, old place of each row, visual rows per sequence)."""
        kind = TensorType(tensor_type(self.mask).shape, torch.int64)
        column, per_sequence = kind.with_shape(kind.shape[0], 1), kind.with_shape(kind.shape[0])
        visual = self._call(aten.to.dtype, (self.mask, torch.int64), kind)
        text = self._call(aten.rsub.Scalar, (visual, 1), kind)
        count = self._call(aten.sum.dim_IntList, (visual, [1]), per_sequence)
        offset = self._call(aten.unsqueeze.default, (count, 1), column)
        first = self._call(aten.cumsum.default, (visual, 1), kind)
        rank = self._call(aten.cumsum.default, (text, 1), kind)
        second = self._call(aten.add.Tensor, (rank, offset), kind)
        one_based = self._call(aten.where.self, (self.mask, first, second), kind)
        place = self._call(aten.sub.Scalar, (one_based, 1), kind)
        every = self._steps(self.mask, 1, kind.shape[1])
        order = self._call(aten.scatter.src, (every, 1, place, every), kind)
        return place, order, count

    def _visual_first(self, count: fx.Node) -> fx.Node:
        """The row mask in the new order: bool [batch, tokens], for readers that are no operators
        of mqc (rows that choose among weights)."""
        kind = tensor_type(self.mask)
        size = self._call(aten.sym_size.int, (self.mask, 1), SCALAR)
        steps = TensorType((kind.shape[1],), torch.int64)
        places = self._call(aten.arange.default, (size,), steps)
        column = TensorType((kind.shape[0], 1), torch.int64)
        limit = self._call(aten.unsqueeze.default, (count, 1), column)
        return self._call(aten.lt.Tensor, (places, limit), kind)

    def _batch(self) -> fx.Node:
        return self._call(aten.sym_size.int, (self.mask, 0), SCALAR)

    def _move(self, port: Port, node: fx.Node, place: fx.Node, order: fx.Node) -> fx.Node | None:
        """``node`` in the new order, or None where it has no token axis."""
        if port.name == INPUT:
            return None
        value = node
        axis = port.axis("token")
        if axis is not None:
            value = self._gather(value, axis, port, order)
        if port.axis("key") is not None:
            key_order = self._key_order(port, order)
            value = self._gather(value, port.axes.index("key"), port, key_order)
        if port.axis("row") is not None:
            value = self._call(aten.gather.default, (place, 1, value), port.type)
        return None if value is node else value

    def _key_order(self, port: Port, order: fx.Node) -> fx.Node:
        """Columns [batch, keys] as they are, but those of the new tokens in the new order.

        The number of past keys is only added to things, so that a later pass may put an input in
        its place, and columns after the new tokens' are left alone.
        """
        kind = tensor_type(order)
        cache = next(p for p in self.component.inputs if p.axes.count("past") and p != port)
        source = self.component.placeholder(cache.name)
        past = self._call(aten.sym_size.int, (source, cache.axes.index("past")), SCALAR)
        keys = port.type.shape[port.axes.index("key")]
        mask = self.component.placeholder(port.name)
        every = self._steps(mask, port.axes.index("key"), keys)
        new = self._call(aten.add.Tensor, (order, past), kind)
        natural = self._steps(self.mask, 1, kind.shape[1])
        place = self._call(aten.add.Tensor, (natural, past), kind)
        wide = kind.with_shape(kind.shape[0], keys)
        return self._call(aten.scatter.src, (every, 1, place, new), wide)

    def _steps(self, value: fx.Node, axis: int, size: Any) -> fx.Node:
        """0, 1, ... for each sequence: int64 [batch, size], as long as an axis of ``value``."""
        kind = TensorType((size,), torch.int64)
        count = self._call(aten.sym_size.int, (value, axis), SCALAR)
        steps = self._call(aten.arange.default, (count,), kind)
        lined = self._call(aten.unsqueeze.default, (steps, 0), kind.with_shape(1, size))
        batch = tensor_type(self.mask).shape[0]
        every = (lined, [self._batch(), -1])
        return self._call(aten.expand.default, every, kind.with_shape(batch, size))

    def _gather(self, value: fx.Node, axis: int, port: Port, index: fx.Node) -> fx.Node:
        """Pick ``index`` [batch, n] along ``axis``, the same for all other axes."""
        kind = tensor_type(value)
        batch = port.axes.index("batch")
        length = tensor_type(index).shape[1]
        shape: list[Any] = [1] * kind.rank
        sizes: list[Any] = [1] * kind.rank
        shape[batch], shape[axis] = tensor_type(index).shape
        sizes[batch], sizes[axis] = self._batch(), -1
        flat = self._call(
            aten.reshape.default, (index, sizes), TensorType(tuple(shape), torch.int64)
        )
        target = list(kind.shape)
        target[axis] = length
        wide: list[Any] = []
        for dim, size in enumerate(target):
            if dim in (batch, axis):
                wide.append(-1)
            elif isinstance(size, int):
                wide.append(size)
            else:
                wide.append(self._call(aten.sym_size.int, (value, dim), SCALAR))
        full = self._call(aten.expand.default, (flat, wide), TensorType(tuple(target), torch.int64))
        return self._call(aten.gather.default, (value, axis, full), kind.with_shape(*target))
