"""The rows of a buffered cache become int8, each with a scale of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mqc.errors import PassPostconditionError, PassPreconditionError
from mqc.ir import Component, Port, Program, TensorType
from mqc.ir.edit import call_several, tensor_type
from mqc.transform import Pass, PassContext, PassResult

_mqc = torch.ops.mqc
_ATTENTION = _mqc.attention.default
_SIDES = ("key", "value")


class QuantizeCache(Pass):
    """mqc::attention -> mqc::attention_int8, over caches of int8 rows with a scale each.

    The decoder's inputs change: ``key_cache_i`` and ``value_cache_i`` become int8, and beside them
    stand ``key_scale_i`` and ``value_scale_i``, float32 [batch, kv_heads, capacity]; outputs alike.

    Postcondition: no attention reads a cache of floats.
    """

    name = "quantize-cache"
    after = ("fuse-attention", "fuse-order", "fuse-angles", "select-rows")

    def requires(self, program: Program) -> None:
        if not any(_calls(component) for component in program):
            raise PassPreconditionError(
                "this program's caches grow, and only buffers can be int8",
                hint="use kv_cache=float; mqc inspect shows why attention was not fused",
            )

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            for node in _calls(component):
                if ctx.take():
                    _rewrite(component, node)
                    result.counts["layers"] += 1
        return result

    def ensures(self, result: PassResult) -> None:
        for component in result.program:
            for node in _calls(component):
                raise PassPostconditionError(f"%{node.name} reads a cache of floats")


def _calls(component: Component) -> list[fx.Node]:
    return list(component.graph.find_nodes(op="call_function", target=_ATTENTION))


def _rewrite(component: Component, node: fx.Node) -> None:
    graph = component.graph
    q, k, v, *caches = node.args[:5]
    made: dict[int, fx.Node] = {int(user.args[1]): user for user in node.users}  # type: ignore[arg-type]
    scales = []
    for cache in caches:
        assert isinstance(cache, fx.Node)
        port = component.input(str(cache.target))
        narrow = Port(port.name, port.type.with_dtype(torch.int8), port.axes)
        cache.meta["type"] = narrow.type
        kind = TensorType(port.type.shape[:3], torch.float32)
        name = port.name.replace("_cache", "_scale")
        place = [p.name for p in component.inputs].index(port.name)
        component.inputs[place] = narrow
        component.inputs.append(Port(name, kind, port.axes[:3]))
        last = [n for n in graph.nodes if n.op == "placeholder"][-1]
        with graph.inserting_after(last):
            scale = graph.placeholder(name)
        scale.meta = {"type": kind}
        scales.append(scale)
    grown = [tensor_type(made[index]).with_dtype(torch.int8) for index in (1, 2)]
    rows = [TensorType(kind.shape[:3], torch.float32) for kind in grown]
    kinds = [tensor_type(made[0]) if 0 in made else None, *grown, *rows]
    with graph.inserting_before(node):
        args: tuple[Any, ...] = (q, k, v, *caches, *scales, *node.args[5:])
        results = call_several(graph, _mqc.attention_int8.default, args, kinds, node)
    for index, old in made.items():
        new = results[index]
        assert new is not None
        old.replace_all_uses_with(new)
        graph.erase_node(old)
    graph.erase_node(node)
    _outputs(component, results)


def _outputs(component: Component, results: list[fx.Node | None]) -> None:
    """The new caches' ports, and the scales behind all other outputs."""
    values = list(component.output_node.args[0])  # type: ignore[arg-type]
    ports = list(component.outputs)
    for cache, scale in zip(results[1:3], results[3:5], strict=True):
        assert cache is not None and scale is not None
        place = values.index(cache)
        port = ports[place]
        ports[place] = Port(port.name, tensor_type(cache), port.axes)
        name = port.name.replace("_cache", "_scale")
        ports.append(Port(name, tensor_type(scale), port.axes[:3]))
        values.append(scale)
    component.outputs = ports
    component.output_node.args = (tuple(values),)
