"""Runs one lowered component: kernels write into a planned arena, the rest goes through torch."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

import mqc.ops  # noqa: F401  (registers the operators that graphs call)
from mqc.backends.cuda.kernels import Attention, CacheTensor, FullAttention, Kernels
from mqc.backends.cuda.ops import LINEAR, LINEAR_A16
from mqc.backends.cuda.plan import Layout, Value, row_stride, solve, tensor_bytes
from mqc.ir import Component
from mqc.ir.dialect import CREATE_OPS
from mqc.ir.edit import aten

_mqc = torch.ops.mqc
_NEEDS_DEVICE = {
    name
    for name in CREATE_OPS | {"aten.arange.default", "aten.arange.start", "aten.arange.start_step"}
    if "_like" not in name and ".new_" not in name
}


class Arena:
    """Memory for one component's planned values at one set of sizes."""

    def __init__(
        self, values: Sequence[Value], sizes: Mapping[str, int], device: torch.device
    ) -> None:
        self.sizes = dict(sizes)
        self.layout: Layout = solve(values, sizes)
        self.memory = torch.empty(self.layout.nbytes, dtype=torch.uint8, device=device)
        self._views: OrderedDict[Any, Tensor] = OrderedDict()

    def holds(self, sizes: Mapping[str, int]) -> bool:
        """Whether values of these sizes fit their places."""
        return all(self.sizes.get(name, 0) >= size for name, size in sizes.items())

    def view(self, node: str, index: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The memory of a value; from torch where the plan has no place that is large enough."""
        key = (node, index, shape, dtype)
        found = self._views.get(key)
        if found is None:
            found = self._make(node, index, shape, dtype)
            if found is None:
                return _allocate(shape, dtype, self.memory.device)
            self._views[key] = found
            if len(self._views) > 8192:
                self._views.popitem(last=False)
        return found

    def _make(
        self, node: str, index: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor | None:
        offset, size = self.layout.places.get((node, index), (0, 0))
        needed = tensor_bytes(shape, dtype)
        if needed > size:
            return None
        flat = self.memory[offset : offset + needed].view(dtype)
        return _shaped(flat, shape, dtype)


def _shaped(flat: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    rows = flat.reshape(*shape[:-1], row_stride(shape[-1], dtype))
    return rows[..., : shape[-1]]


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    count = tensor_bytes(shape, dtype) // dtype.itemsize
    return _shaped(torch.empty(count, dtype=dtype, device=device), shape, dtype)


class Call:
    """What one run of an executor knows beside the graph's inputs."""

    def __init__(self, arena: Arena, end: int | None = None, causal: bool = False) -> None:
        self.arena = arena
        self.end = end
        self.causal = causal


Step = Callable[[Call, dict[fx.Node, Any]], Any]


class Executor:
    """A component bound to parameters and kernels.

    Args:
        component: in dialect ``cuda``.
        params: its parameters on the kernels' device, by name.
        kernels: of the device.
    """

    def __init__(
        self, component: Component, params: Mapping[str, Tensor], kernels: Kernels
    ) -> None:
        self.component = component
        self.kernels = kernels
        self._names = [port.name for port in component.inputs]
        self._start: dict[fx.Node, Any] = {}
        self._inputs: list[fx.Node] = []
        self._steps: list[tuple[fx.Node, Step, list[fx.Node]]] = []
        dying = _last_readers(component)
        for node in component.graph.nodes:
            if node.op == "get_attr":
                self._start[node] = params[str(node.target)]
            elif node.op == "placeholder":
                self._inputs.append(node)
            elif node.op == "call_function":
                self._steps.append((node, self._step(node), dying.get(node, [])))
        self._outputs = component.output_node.args[0]

    def constants(self, inputs: Mapping[str, Any], call: Call) -> dict[fx.Node, Any]:
        """What follows from these inputs and the parameters alone, kernels' results apart.

        A run that is to be recorded takes it as ``known``: a number that the host reads, as of the
        rows of an expert, could not be recorded.
        """
        names = dict(zip(self._names, self._inputs, strict=True))
        values = {**self._start, **{names[name]: value for name, value in inputs.items()}}
        found: dict[fx.Node, Any] = {}
        for node, step, _ in self._steps:
            if node.target not in _HANDLERS and all(n in values for n in node.all_input_nodes):
                values[node] = found[node] = step(call, values)
        return found

    def run(
        self, inputs: Mapping[str, Any], call: Call, known: Mapping[fx.Node, Any] | None = None
    ) -> list[Any]:
        """The outputs. Inputs by port name; cache ports take :class:`CacheTensor`.

        Results may lie in the arena only where they alias an input. ``known``: values that
        :meth:`constants` gave for some of the inputs.
        """
        values = {**self._start, **(known or {})}
        for node, name in zip(self._inputs, self._names, strict=True):
            values[node] = inputs[name]
        for node, step, dead in self._steps:
            if known and node in known:
                continue
            values[node] = step(call, values)
            for value in dead:
                del values[value]
        assert isinstance(self._outputs, (tuple, list))
        return [values[node] for node in self._outputs]  # type: ignore[index]

    def _step(self, node: fx.Node) -> Step:
        handler = _HANDLERS.get(node.target) or _PLAIN.get(node.target)
        if handler is not None:
            made = handler(self.kernels, node)
            if made is not None:
                return made
        return _torch_step(self.kernels, node)


def _last_readers(component: Component) -> dict[fx.Node, list[fx.Node]]:
    """Step -> values that nobody reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in component.graph.nodes:
        for value in node.all_input_nodes:
            last[value] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last.items():
        if value.op != "get_attr":
            found.setdefault(node, []).append(value)
    return found


def _torch_step(kernels: Kernels, node: fx.Node) -> Step:
    target: Any = node.target
    kwargs = dict(node.kwargs)
    if str(target) in _NEEDS_DEVICE:
        kwargs["device"] = kernels.device

    read = [_argument(value) for value in node.args]
    named = {name: _argument(value) for name, value in kwargs.items()}
    if not named:
        return lambda call, values: target(*[item(values) for item in read])
    return lambda call, values: target(
        *[item(values) for item in read], **{name: item(values) for name, item in named.items()}
    )


def _argument(value: Any) -> Callable[[dict[fx.Node, Any]], Any]:
    """Reads an argument with the values that it names; a run does this thousands of times."""
    if isinstance(value, fx.Node):
        return operator.itemgetter(value)
    if isinstance(value, (list, tuple)) and not all(isinstance(part, int) for part in value):
        parts = [_argument(part) for part in value]
        return lambda values: [part(values) for part in parts]
    return lambda values: value


def _gather(kernels: Kernels, node: fx.Node) -> Step:
    """The only row of each sequence, as in a decode step, is the one that is wanted: no launch."""
    read = _readers(node, 3)

    def step(call: Call, values: dict[fx.Node, Any]) -> Tensor:
        x, axis, index = (item(values) for item in read)
        if x.shape[axis] == 1 and index.shape == x.shape:
            return x  # type: ignore[no-any-return]
        return aten.gather.default(x, axis, index)  # type: ignore[no-any-return]

    return step


def _reader(node: fx.Node, index: int) -> Callable[[dict[fx.Node, Any]], Any]:
    return _argument(node.args[index] if index < len(node.args) else None)


def _readers(node: fx.Node, count: int) -> list[Callable[[dict[fx.Node, Any]], Any]]:
    return [_reader(node, index) for index in range(count)]


def _linear(kernels: Kernels, node: fx.Node) -> Step:
    """Of int8 and of float rows: their first and third arguments are the rows and N scales."""
    method, name = "linear" if node.target is LINEAR else "linear_a16", node.name
    read = _readers(node, len(node.args) - 1)
    dtype = node.args[-1]
    assert isinstance(dtype, torch.dtype)

    def step(call: Call, values: dict[fx.Node, Any]) -> Tensor:
        args = [item(values) for item in read]
        out = call.arena.view(name, 0, (*args[0].shape[:-1], args[2].shape[0]), dtype)
        getattr(kernels, method)(out, *args)
        return out

    return step


def _split_out(call: Call, name: str, x: Tensor, split: Tensor | None) -> Tensor | None:
    if split is None:
        return None
    return call.arena.view(name, 1, (*x.shape[:-1], split.shape[0]), x.dtype)


def _norm_quantize(kernels: Kernels, node: fx.Node) -> Step:
    read, name = _readers(node, 5), node.name

    def step(call: Call, values: dict[fx.Node, Any]) -> tuple[Tensor, Tensor | None]:
        x, eps, scale, modality, split = (item(values) for item in read)
        xq = call.arena.view(name, 0, tuple(x.shape), torch.int8)
        columns = _split_out(call, name, x, split)
        kernels.rms_norm_quantize(xq, columns, x, eps, scale, modality, split)
        return xq, columns

    return step


def _activation_quantize(kernels: Kernels, node: fx.Node) -> Step:
    read, name = _readers(node, 7), node.name

    def step(call: Call, values: dict[fx.Node, Any]) -> tuple[Tensor, Tensor | None]:
        x, activation, gated, block, scale, modality, split = (item(values) for item in read)
        width = x.shape[-1] // 2 if gated else x.shape[-1]
        xq = call.arena.view(name, 0, (*x.shape[:-1], width), torch.int8)
        columns = _split_out(call, name, x, split)
        kernels.activation_quantize(
            xq, columns, x, activation, gated, block, scale, modality, split
        )
        return xq, columns

    return step


def _quantize(kernels: Kernels, node: fx.Node) -> Step:
    read, name = _readers(node, 3), node.name

    def step(call: Call, values: dict[fx.Node, Any]) -> Tensor:
        x, scale, modality = (item(values) for item in read)
        xq = call.arena.view(name, 0, tuple(x.shape), torch.int8)
        kernels.activation_quantize(xq, None, x, "identity", False, 1, scale, modality, None)
        return xq

    return step


def _hadamard(kernels: Kernels, node: fx.Node) -> Step:
    read, name = _readers(node, 2), node.name

    def step(call: Call, values: dict[fx.Node, Any]) -> Tensor:
        x, block = (item(values) for item in read)
        out = call.arena.view(name, 0, tuple(x.shape), x.dtype)
        kernels.hadamard(out, x, block)
        return out

    return step


def _gated_delta(kernels: Kernels, node: fx.Node) -> Step:
    read = _readers(node, 6)
    return lambda call, values: kernels.gated_delta(*(item(values) for item in read))


def _rms_norm(kernels: Kernels, node: fx.Node) -> Step | None:
    gain = node.args[2] if len(node.args) > 2 else node.kwargs.get("weight")
    eps = node.args[3] if len(node.args) > 3 else node.kwargs.get("eps")
    shape = node.args[1]
    if gain is not None or not isinstance(eps, float) or len(shape) != 1:  # type: ignore[arg-type]
        return None
    source = node.args[0]
    return lambda call, values: kernels.rms_norm(values[source], eps)  # type: ignore[index]


def _embedding(kernels: Kernels, node: fx.Node) -> Step:
    read, name = _readers(node, 3), node.name
    dtype = node.meta["type"].dtype

    def step(call: Call, values: dict[fx.Node, Any]) -> Tensor:
        ids, table, scale = (item(values) for item in read)
        out = call.arena.view(name, 0, (*ids.shape, table.shape[1]), dtype)
        kernels.embedding(out, ids, table, scale)
        return out

    return step


def _attention(kernels: Kernels, node: fx.Node) -> Step:
    read, name = _readers(node, 11), node.name
    mask = node.args[6]
    plain = isinstance(mask, fx.Node) and mask.op == "placeholder"

    def step(call: Call, values: dict[fx.Node, Any]) -> tuple[Tensor, CacheTensor, CacheTensor]:
        given: list[Any] = [item(values) for item in read]
        q, k, _, keys, caches = given[:5]
        causal = call.causal and plain
        asked = replace(Attention(*given), end=call.end, causal=causal)
        heads = q.shape[2] - (2 * keys.data.shape[1] if k is None else 0)
        shape = (*q.shape[:2], heads * caches.data.shape[3])
        out = call.arena.view(name, 0, shape, q.dtype)
        return kernels.attention(asked, out), keys, caches

    return step


def _attention_full(kernels: Kernels, node: fx.Node) -> Step:
    read = _readers(node, 9)

    def step(call: Call, values: dict[fx.Node, Any]) -> Tensor:
        given: list[Any] = [item(values) for item in read]
        return kernels.attention_full(FullAttention(*given))

    return step


_HANDLERS: dict[Any, Callable[[Kernels, fx.Node], Step | None]] = {
    LINEAR: _linear,
    LINEAR_A16: _linear,
    _mqc.rms_norm_quantize.default: _norm_quantize,
    _mqc.activation_quantize.default: _activation_quantize,
    _mqc.quantize_static.default: _quantize,
    _mqc.hadamard.default: _hadamard,
    _mqc.embedding_w8.default: _embedding,
    _mqc.attention.default: _attention,
    _mqc.attention_full.default: _attention_full,
    _mqc.gated_delta.default: _gated_delta,
    aten.rms_norm.default: _rms_norm,
}
_PLAIN: dict[Any, Callable[[Kernels, fx.Node], Step]] = {aten.gather.default: _gather}
"""What torch computes, but for cases where there is nothing to do."""
