"""Experts of a mixture compute the rows that chose them, and no others."""

from __future__ import annotations

import torch
from torch import fx

from mqc.analysis.mixtures import Branch, Mixture, find_mixtures, masks_rows
from mqc.analysis.rows import MODALITY, row_operands
from mqc.errors import PassPostconditionError
from mqc.ir import TUPLE, Program, TensorType
from mqc.ir.edit import aten, call, call_several, eliminate_dead_code, replace, tensor_type
from mqc.passes.row_masks import row_mask
from mqc.transform import Pass, PassContext, PassResult, Skip

_mqc = torch.ops.mqc


class RouteExperts(Pass):
    """Sums of experts over all rows -> each expert over the rows that chose it.

    Mixtures are captured with every expert applied to every row and weighted by 0 where the router
    did not choose it: E experts are computed for the k that count. Here the pairs of row and choice
    are sorted by expert (mqc::route_rows); each expert reads its piece of the rows as one sequence
    of its own length, which may be 0 (mqc::split_rows), and the results are weighted and added up
    where they came from, in the order of the experts (mqc::join_rows). What is left out are
    additions of 0. The rows' modality travels along, as a mask.

    Postcondition: no mixture adds up experts over all rows, or a skip says why.
    """

    name = "route-experts"
    after = ("cleanup", "aifs-reorder", "fuse-quantize", "fuse-residual", "select-rows")
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            for number, mixture in enumerate(find_mixtures(component)):
                if not _movable(mixture):
                    reason = "an expert's values are read elsewhere, or made before the choice"
                    result.skips.append(Skip(f"{component.name}: %{mixture.node.name}", reason))
                elif ctx.take():
                    _Route(mixture, number).run()
                    result.counts["mixtures"] += 1
                    result.counts["experts"] += len(mixture.branches)
        eliminate_dead_code(program)
        return result

    def ensures(self, result: PassResult) -> None:
        for component in result.program:
            for mixture in find_mixtures(component):
                if _movable(mixture):
                    raise PassPostconditionError(f"%{mixture.node.name} adds up whole experts")


def _movable(mixture: Mixture) -> bool:
    """Whether every expert has something to compute for its rows alone."""
    return all(item.inside for item in mixture.branches)


class _Route:
    def __init__(self, mixture: Mixture, number: int) -> None:
        self.mixture, self.number = mixture, number
        self.graph = mixture.node.graph
        self.experts = len(mixture.branches)
        kind = tensor_type(mixture.chosen)
        self.pairs = "*".join(str(size) for size in kind.shape)
        kinds = [kind.with_shape(self.pairs), kind, kind.with_shape(self.experts)]
        args = (mixture.chosen, self.experts)
        with self.graph.inserting_before(min(item.inside[0] for item in mixture.branches)):
            made = call_several(self.graph, _mqc.route_rows.default, args, kinds, mixture.node)
        self.rows, self.place, self.counts = (item for item in made if item is not None)
        self.pieces: dict[fx.Node, list[fx.Node]] = {}

    def run(self) -> None:
        node, weights = self.mixture.node, self.mixture.weights
        for branch in self.mixture.branches:
            self._narrow(branch)
        kind = tensor_type(node)
        with self.graph.inserting_before(node):
            values = [branch.value for branch in self.mixture.branches]
            wide = kind.with_shape(1, self.pairs, kind.shape[-1])
            joined = call(self.graph, aten.cat.default, (values, 1), wide, node)
            args = (joined, weights, self.place)
            total = call(self.graph, _mqc.join_rows.default, args, kind, node)
        replace(node, total)

    def _narrow(self, branch: Branch) -> None:
        """Let the nodes of one expert read and give its own rows."""
        expert, own = branch.expert, set(branch.inside)

        def piece(value: fx.Node) -> fx.Node:
            return value if value in own else self._pieces(value)[expert]

        for node in branch.inside:
            masked = masks_rows(node, expert, self.mixture.chosen)
            if masked is not None:  # in rows that chose the expert the mask is 1
                kept = piece(masked)
                own.add(kept)
                node.replace_all_uses_with(kept)
                continue
            for value in list(row_operands(node)):
                node.replace_input_with(value, piece(value))
            place = MODALITY.get(node.target, len(node.args))
            modality = node.args[place] if place < len(node.args) else None
            if isinstance(modality, fx.Node):
                node.update_arg(place, piece(modality))
            kind = node.meta["type"]
            if kind != TUPLE:
                node.meta["type"] = self._own(kind, expert)

    def _pieces(self, value: fx.Node) -> list[fx.Node]:
        """Each expert's rows of ``value`` [B, S, K], or of a modality; split once for all."""
        if value not in self.pieces:
            with self.graph.inserting_before(max(value, self.counts).next):
                source, kind = value, tensor_type(value)
                if kind.dtype == torch.int64:  # a count of leading visual rows
                    tokens = tensor_type(self.mixture.chosen).shape[1]
                    source = row_mask(self.graph, value, self.mixture.chosen, tokens)
                    kind = tensor_type(source)
                kinds = [self._own(kind, expert) for expert in range(self.experts)]
                args = (source, self.rows, self.counts, self.experts)
                made = call_several(self.graph, _mqc.split_rows.default, args, kinds, value)
            self.pieces[value] = [item for item in made if item is not None]
        return self.pieces[value]

    def _own(self, kind: TensorType, expert: int) -> TensorType:
        """The type of one expert's rows of a value."""
        return kind.with_shape(1, f"rows_{self.number}_{expert}", *kind.shape[2:])
