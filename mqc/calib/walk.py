"""Run a component on many samples at once, one node at a time.

This is how calibration sees a model layer by layer: when the walk arrives at a layer, the inputs
of that layer are there for every sample, computed by everything in front of it as it is *now*
(already quantized, if a visitor rewrote it). Values are freed after their last reader, so memory
holds one layer's activations, not the model's; where even these are large, they go to the
program's scratch. Nothing is assumed about the model: a layer is a node.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

import mqc.ops  # noqa: F401  (graphs may call mqc's operators)
from mqc.ir import Component, Program, Scratch

Sample = Mapping[str, torch.Tensor]
"""Inputs of a component by port name."""

Values = Callable[[fx.Node], list[torch.Tensor]]
"""``values(node)``: the value of a live node for every sample."""

Visitor = Callable[[fx.Node, Values], Sequence[fx.Node] | None]
"""Called before a call node runs. Returns None, or the nodes it put in the node's place (in order,
the last one carrying the value); the graph must already be rewired."""


def walk(
    program: Program,
    component: Component,
    samples: Sequence[Sample],
    visit: Visitor,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Execute ``component`` on ``samples`` and call ``visit`` at every call node."""
    walker = _Walker(program, samples)
    nodes = list(component.graph.nodes)
    for index, node in enumerate(nodes):
        if progress is not None:
            progress(index, len(nodes))
        if node.op == "placeholder":
            walker.values[node] = [sample[str(node.target)] for sample in samples]
        elif node.op == "call_function":
            placed = visit(node, walker.get)
            for item in (node,) if placed is None else placed:
                walker.run(item)
    if progress is not None:
        progress(len(nodes), len(nodes))


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _Walker:
    def __init__(self, program: Program, samples: Sequence[Sample]) -> None:
        self.program = program
        self.count = len(samples)
        self.values: dict[fx.Node, list[Any]] = {}
        self.done: set[fx.Node] = set()
        self.limit = _memory() // 4
        """Bytes of live values from which new ones are kept in the scratch."""

    def get(self, node: fx.Node) -> list[Any]:
        if node.op == "get_attr":
            return [self.program.params[str(node.target)]] * self.count
        return self.values[node]

    def run(self, node: fx.Node) -> None:
        self.done.add(node)
        if node.op == "call_function":
            assert callable(node.target)
            inputs = {value: self.get(value) for value in node.all_input_nodes}
            scratch = self._scratch()
            results = []
            with torch.inference_mode():
                for index in range(self.count):
                    now = {value: each[index] for value, each in inputs.items()}
                    args, kwargs = fx.map_arg((node.args, node.kwargs), now.__getitem__)
                    result = node.target(*args, **kwargs)
                    if scratch is not None and isinstance(result, torch.Tensor):
                        result = scratch.keep(result)
                    results.append(result)
            self.values[node] = results
        for value in node.all_input_nodes:
            # Inputs are kept: a visitor may let a later node read one that has no reader yet.
            if value.op == "call_function" and set(value.users) <= self.done:
                self.values.pop(value, None)

    def _scratch(self) -> Scratch | None:
        """The scratch if values do not fit into memory well, else None."""
        live = sum(
            value.nbytes
            for values in self.values.values()
            for value in values
            if isinstance(value, torch.Tensor)
        )
        return self.program.params.scratch if live > self.limit else None
