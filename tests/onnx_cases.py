"""Programs, inputs and sessions for the tests of the onnx target."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from programs import captured
from torch import fx

from mqc.backends.onnx.builder import evaluate_size
from mqc.ir import Component, ParamStore, Port, Program, TensorType
from mqc.ir.edit import call, eliminate_dead_code, get_param, replace, tensor_type
from mqc.numerics.packing import pack_int4
from mqc.passes.canonicalize import Canonicalize
from mqc.transform import PassContext

aten, ops = torch.ops.aten, torch.ops.mqc
LENGTHS = [(5, 7), (1, 12), (9, 0), (1, 0)]
"""(tokens, past): a chunk, a decode step, prefill, one token alone."""


@cache
def float_program(family: str) -> Program:
    """A canonical float program of a family's tiny random model; do not change it."""
    return Canonicalize().run(captured(family).copy(), PassContext()).program


def inputs_of(component: Component, seed: int = 0, **sizes: int) -> dict[str, torch.Tensor]:
    """Random inputs of a component, by port name; the decoder's mask is causal."""
    generator = torch.Generator().manual_seed(seed)
    return {
        port.name: _input(
            port, [evaluate_size(n, sizes) for n in port.type.shape], sizes, generator
        )
        for port in component.inputs
    }


def _input(
    port: Port, shape: list[int], sizes: dict[str, int], generator: torch.Generator
) -> torch.Tensor:
    if port.name == "mask":
        past, tokens = sizes["past"], sizes["tokens"]
        row = torch.arange(tokens)[:, None] + past
        return (torch.arange(past + tokens) <= row).expand(shape).contiguous()
    if port.name == "modality":
        return (torch.arange(shape[1]) < shape[1] // 2).expand(shape).contiguous()
    if port.name == "logit_index":
        return torch.randint(0, sizes["tokens"], shape, generator=generator)
    if port.name == "position_ids" and "tokens" in sizes:
        first, tokens = sizes["past"], sizes["tokens"]
        return torch.arange(first, first + tokens).expand(shape).contiguous()
    if port.type.dtype.is_floating_point:
        return torch.randn(shape, generator=generator)
    return torch.randint(0, 8, shape, generator=generator)


def expected(program: Program, name: str, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(program.module(name)(*inputs.values()))


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def actual(path: Path, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    feeds = {name: value.numpy() for name, value in inputs.items()}
    return [torch.from_numpy(np.asarray(o)) for o in session(path).run(None, feeds)]


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    assert left.shape == right.shape
    return float((left - right).abs().max() / right.abs().max().clamp_min(1e-30))


# ---- quantizing by hand ------------------------------------------------------------------------


def quantize(
    program: Program,
    name: str = "decoder",
    form: str | None = "mask",
    rewrite: Callable[..., fx.Node] | None = None,
) -> Program:
    """``program`` with every linear of component ``name`` (the last left out) quantized.

    ``form`` of the modality: "mask", "count" or None. ``rewrite(program, node, x, modality)``
    makes the replacement; :func:`w4a8` by default. The activations' scales come from one run.
    """
    result = program.copy()
    component = result.components[name]
    scales = _ranges(program, name)
    modality = _add_modality(component, form)
    linears = list(component.graph.find_nodes(op="call_function", target=aten.linear.default))
    for node in linears[:-1]:
        with component.graph.inserting_before(node):
            new = (rewrite or w4a8)(result, node, scales[node.name], modality)
        replace(node, new)
    eliminate_dead_code(result)
    result.dialect = "quantized"
    return result


def w4a8(program: Program, node: fx.Node, top: float, modality: fx.Node | None) -> fx.Node:
    """linear -> hadamard-free W4A8: channel 0 split off, text and visual scales apart."""
    graph, (x, weight) = node.graph, node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else None
    w = program.params[str(weight.target)]
    kind = tensor_type(node)
    levels = [top / 127, top / 90] if modality is not None else [top / 127]
    step = (w.abs().amax(1) / 7).clamp_min(1e-8)
    q = (w / step[:, None]).round().clamp(-8, 7).to(torch.int8)
    params = {
        "q": pack_int4(q),
        "s": step,
        "x": torch.tensor(levels),
        "c": (w - q * step[:, None])[:, :1].contiguous(),
    }
    p = {key: get_param(program, graph, f"{weight.target}.{key}", v) for key, v in params.items()}
    xtype = tensor_type(x)
    xq = call(
        graph,
        ops.quantize_static.default,
        (x, p["x"], modality),
        xtype.with_dtype(torch.int8),
        node,
    )
    first = call(
        graph, aten.slice.Tensor, (x, -1, 0, 1), xtype.with_shape(*xtype.shape[:-1], 1), node
    )
    args = (xq, p["q"], p["s"], p["x"], modality, bias, first, p["c"])
    return call(graph, ops.linear_w4a8.default, args, kind, node)


def w8a8(program: Program, node: fx.Node, top: float, modality: fx.Node | None) -> fx.Node:
    """linear -> W8A8."""
    graph, (x, weight) = node.graph, node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else None
    w = program.params[str(weight.target)]
    step = (w.abs().amax(1) / 127).clamp_min(1e-8)
    q = (w / step[:, None]).round().clamp(-127, 127).to(torch.int8)
    params = {"q": q, "s": step, "x": torch.tensor([top / 127])}
    p = {key: get_param(program, graph, f"{weight.target}.{key}", v) for key, v in params.items()}
    kind = tensor_type(x).with_dtype(torch.int8)
    xq = call(graph, ops.quantize_static.default, (x, p["x"], None), kind, node)
    args = (xq, p["q"], p["s"], p["x"], None, bias, None, None)
    return call(graph, ops.linear_w8a8.default, args, tensor_type(node), node)


def _ranges(program: Program, name: str) -> dict[str, float]:
    """Largest input magnitude of every linear in one run."""
    component, found = program.components[name], {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.target is aten.linear.default:
                found[n.name] = float(self.env[n.args[0]].abs().max())
            return super().run_node(n)

    sizes = {"batch": 2, "tokens": 8, "past": 3, "rows": 1, "blocks": 6, "images": 2}
    with torch.no_grad():
        Recorder(program.module(name)).run(*inputs_of(component, **sizes).values())
    return found


def _add_modality(component: Component, form: str | None) -> fx.Node | None:
    if form is None:
        return None
    graph, kind = component.graph, TensorType(("batch", "tokens"), torch.bool)
    last = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last):
        node = graph.placeholder("modality")
    node.meta = {"type": kind}
    component.inputs.append(Port("modality", kind, ("batch", "token")))
    if form == "mask":
        return node
    with graph.inserting_after(node):
        count = TensorType(("batch",), torch.int64)
        return call(graph, aten.sum.dim_IntList, (node, [1]), count, node)


def single_op(
    params: dict[str, torch.Tensor],
    columns: int,
    rows: int,
    form: str | None,
    bias: bool,
    hadamard: int = 0,
    floats: bool = False,
) -> Program:
    """Component "layer": x [batch, tokens, columns] -> quantize -> linear_w4a8 (q, s, a, b).

    With ``hadamard``, x goes through the transform twice before; with ``floats``, it is not
    quantized: linear_w4a16.
    """
    graph, store = fx.Graph(), ParamStore()
    kind = TensorType(("batch", "tokens", columns), torch.float32)
    ports = [Port("x", kind, ("batch", "token", None))]
    if form == "mask":
        mask = TensorType(("batch", "tokens"), torch.bool)
        ports.append(Port("modality", mask, ("batch", "token")))
    elif form == "count":
        ports.append(Port("modality", TensorType(("batch",), torch.int64), ("batch",)))
    nodes = {}
    for port in ports:
        nodes[port.name] = graph.placeholder(port.name)
        nodes[port.name].meta = {"type": port.type}
    values = {}
    for name, value in params.items():
        store[name] = value
        values[name] = graph.create_node("get_attr", name)
        values[name].meta = {"type": TensorType.of(value)}
    x, modality = nodes["x"], nodes.get("modality")
    for _ in range(2 if hadamard else 0):
        x = call(graph, ops.hadamard.default, (x, hadamard), kind, x)
    made = kind.with_shape("batch", "tokens", rows)
    last = values["b"] if bias else None
    if floats:
        args = (x, values["q"], values["s"], last, None, None)
        y = call(graph, ops.linear_w4a16.default, args, made, x)
    else:
        args = (x, values["a"], modality)
        xq = call(graph, ops.quantize_static.default, args, kind.with_dtype(torch.int8), x)
        args = (xq, values["q"], values["s"], values["a"], modality, last, None, None)
        y = call(graph, ops.linear_w4a8.default, args, made, x)
    graph.output((y,))
    outputs = [Port("y", made, ("batch", "token", None))]
    component = Component("layer", graph, ports, outputs)
    eliminate_dead_code(program := Program({"layer": component}, store, [], {}))
    program.dialect = "quantized"
    return program
