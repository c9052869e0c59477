"""Which values hold visual rows, text rows, or both?

The domain of a value is a set of modalities. Values made from an image are visual; embeddings of
token ids are text; the host merges both into the decoder's input, whose rows are mixed. Rows keep
their modality through the decoder: attention rows follow their query (or, where that is a
parameter, what it reads).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from torch import fx

from mqc.analysis.attention import SDPA
from mqc.ir import Component, Program
from mqc.ir.edit import is_tensor, tensor_type


class Modality(Enum):
    """What a row of a value was made from. The value is its index in a scale tensor."""

    TEXT = 0
    VISUAL = 1


Domain = frozenset[Modality]
TEXT: Domain = frozenset((Modality.TEXT,))
VISUAL: Domain = frozenset((Modality.VISUAL,))
MIXED: Domain = TEXT | VISUAL


def find_domains(program: Program) -> dict[fx.Node, Domain]:
    """The domain of every floating-point value that depends on a component's input."""
    domains: dict[fx.Node, Domain] = {}
    for component in program:
        inputs = _input_domains(program, component, domains)
        asked = {
            component.placeholder(port.name)
            for port in component.inputs
            if port.axis("row") is not None
        }
        for node in component.graph.nodes:
            if node.op == "placeholder":
                domain = inputs.get(str(node.target))
            elif node.op == "call_function":
                # Rows picked for the head are where the next text token is asked for.
                domain = TEXT if _gathers(node, asked) else _join(node, domains)
            else:
                domain = None
            if domain is not None:
                domains[node] = domain
    return domains


def _input_domains(
    program: Program, component: Component, known: Mapping[fx.Node, Domain]
) -> dict[str, Domain]:
    linked: dict[str, Domain] = {}
    for link in program.links:
        if link.target[0] == component.name:
            value = program.components[link.source[0]].output_value(link.source[1])
            domain = known.get(value, TEXT)
            linked[link.target[1]] = linked.get(link.target[1], frozenset()) | domain
    if linked:
        return linked
    visual = any(port.type.dtype.is_floating_point for port in component.inputs)
    return {
        port.name: VISUAL if visual else TEXT
        for port in component.inputs
        if port.type.dtype.is_floating_point or not visual
    }


def _gathers(node: fx.Node, asked: set[fx.Node]) -> bool:
    """Whether ``node`` selects rows by an input that names the wanted rows."""
    seen: set[fx.Node] = set()
    stack = list(node.all_input_nodes)[1:]
    if not is_tensor(node) or not tensor_type(node).dtype.is_floating_point:
        return False
    while stack:
        value = stack.pop()
        if value in asked:
            return True
        if value in seen or not is_tensor(value) or tensor_type(value).dtype.is_floating_point:
            continue
        seen.add(value)
        stack += value.all_input_nodes
    return False


def _join(node: fx.Node, domains: Mapping[fx.Node, Domain]) -> Domain | None:
    inputs = list(node.all_input_nodes)
    if node.target == SDPA and inputs[0] in domains:
        inputs = inputs[:1]  # queries that are parameters are what they attend to
    found = [domains[value] for value in inputs if value in domains]
    return frozenset().union(*found) if found else None
