"""MSQ: let quantization tell visual rows from text rows."""

from __future__ import annotations

import torch

from mqc.analysis.experts import MASK
from mqc.analysis.flow import is_linear
from mqc.analysis.modality import MIXED, find_domains
from mqc.ir import Component, Port, Program, TensorType
from mqc.transform import Pass, PassContext, PassResult, Skip

INPUT = MASK
"""Name of the input that says which rows are visual."""


class ModalitySplit(Pass):
    """Give components with rows of both modalities an input that tells them apart (MSQ).

    Visual and text activations differ in range by an order of magnitude, so one static scale for
    both wastes most of the integer range on one of them (MQuant section 3.2). The component gets
    the input ``modality`` (bool [batch, tokens], True = visual); ``static-scales`` then calibrates
    two scales where both occur, with one copy of the weights.

    Postcondition: a component has the input exactly if a linear in it reads mixed rows.
    """

    name = "modality-split"
    after = ("canonicalize",)
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        domains = find_domains(program)
        for component in program:
            mixed = [
                node
                for node in component.graph.nodes
                if is_linear(node) and domains.get(node) == MIXED
            ]
            if not mixed or component.has_input(INPUT):
                continue
            rows = _row_port(component)
            if rows is None:
                reason = "mixed rows, but no input has a batch axis followed by a token axis"
                result.skips.append(Skip(component.name, reason))
            elif ctx.take():
                _add_input(component, rows)
                result.counts["inputs"] += 1
                result.counts["mixed_linears"] += len(mixed)
        return result


def _row_port(component: Component) -> Port | None:
    """An input whose leading axes are batch and token."""
    return next((p for p in component.inputs if p.axes[:2] == ("batch", "token")), None)


def _add_input(component: Component, rows: Port) -> None:
    kind = TensorType(rows.type.shape[:2], torch.bool)
    first = component.placeholder(component.inputs[0].name)
    with component.graph.inserting_after(first):
        node = component.graph.placeholder(INPUT)
    node.meta = {"type": kind}
    component.inputs.insert(1, Port(INPUT, kind, ("batch", "token")))
