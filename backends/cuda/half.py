"""Activations of a lowered program in a half type; scales, biases, angles and sums in float32.

The row values that the decoder and the tower carry from layer to layer become half; what is
computed from integers alone (positions, angles, masks) stays float32 until it meets them. Pictures
enter in float32: they are quantized before anything else. The memory that a recurrence carries from
token to token is float32, and so is the recurrence: in a half type each token would round it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mqc.backends.cuda.ops import LINEAR, LINEAR_A16
from mqc.ir import Component, Port, Program, TensorType
from mqc.ir.edit import aten, call, is_tensor, tensor_type

_mqc = torch.ops.mqc
_QUANTIZERS = (
    _mqc.quantize_static.default,
    _mqc.rms_norm_quantize.default,
    _mqc.activation_quantize.default,
)
_ATTENTION = _mqc.attention.default
_RECURRENCE = _mqc.gated_delta.default
_STATE = 5
"""Its argument that is the memory."""
_HEADS = (_ATTENTION, _mqc.attention_full.default)
"""Their first three arguments are heads; angles stay in float32, and turn heads of any type."""
_ROWS = frozenset({"inputs_embeds", "embeddings", "image_embeds"})
"""Ports of the host's interface that carry rows; caches are found by their axes."""


def to_half(program: Program, dtype: torch.dtype) -> None:
    """Rewrite ``program`` in place; ``dtype``: torch.bfloat16 or torch.float16."""
    for component in program:
        _Component(program, component, dtype).run()
    program.dtype = dtype


def _is_float(value: Any) -> bool:
    return is_tensor(value) and tensor_type(value).dtype.is_floating_point


def _before(port: Port) -> str:
    """The input that a recurrent layer's output is in the next call."""
    return port.name.replace("present_", "past_", 1) if port.axis("memory") is not None else ""


class _Component:
    def __init__(self, program: Program, component: Component, dtype: torch.dtype) -> None:
        self.program = program
        self.component = component
        self.graph = component.graph
        self.dtype = dtype
        self.casts: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        self.component.inputs = [self._port(port) for port in self.component.inputs]
        for port in self.component.inputs:
            self.component.placeholder(port.name).meta["type"] = port.type
        for node in list(self.graph.nodes):
            if node.op == "call_function":
                self._visit(node)
        output = self.component.output_node
        values = output.args[0]
        assert isinstance(values, (tuple, list))
        kinds = {port.name: port.type.dtype for port in self.component.inputs}
        new = [
            self._as(v, kinds.get(_before(port), self.dtype)) if _is_float(v) else v
            for port, v in zip(self.component.outputs, values, strict=True)
        ]
        output.args = (tuple(new),)
        self.component.outputs = [
            Port(port.name, tensor_type(value), port.axes)
            for port, value in zip(self.component.outputs, new, strict=True)
        ]

    def _port(self, port: Port) -> Port:
        cached = "past" in port.axes or "capacity" in port.axes or port.name.startswith("deepstack")
        readers = self.component.placeholder(port.name).users
        if any(user.target is _RECURRENCE for user in readers):
            return port
        if port.type.dtype.is_floating_point and (cached or self._carries_rows(port)):
            return Port(port.name, port.type.with_dtype(self.dtype), port.axes)
        return port

    def _carries_rows(self, port: Port) -> bool:
        return port.name in _ROWS or self.component.name == "decoder"

    def _visit(self, node: fx.Node) -> None:
        if node.target is LINEAR:
            self._linear(node, (6, 8))  # x_split, residual
        elif node.target is LINEAR_A16:
            self._linear(node, (0, 4, 6))  # x too
        elif node.target in _QUANTIZERS:
            pass  # they read any float type; the type of float columns follows
        elif node.target in _HEADS:
            for index in range(3):
                if is_tensor(node.args[index]):
                    node.update_arg(index, self._half(node.args[index], node))
        elif node.target is _RECURRENCE:
            for index in range(_STATE):
                node.update_arg(index, self._as(node.args[index], torch.float32))
        elif node.target is _mqc.rotary_angles.default:
            return  # of positions: float32
        elif node.target is _mqc.embedding_w8.default:
            node.meta["type"] = tensor_type(node).with_dtype(torch.float32)
            for index in (1, 2):
                assert isinstance(node.args[index], fx.Node)
            return
        elif node.target is aten.to.dtype:
            self._cast(node)
            return
        else:
            self._unify(node)
        self._retype(node)

    def _linear(self, node: fx.Node, floats: tuple[int, ...]) -> None:
        for index in floats:
            value = node.args[index]
            if value is not None:
                node.update_arg(index, self._half(value, node))
        node.update_arg(len(node.args) - 1, self.dtype)
        node.meta["type"] = tensor_type(node).with_dtype(self.dtype)

    def _cast(self, node: fx.Node) -> None:
        """Casts of rows stay what they are: no cast. Casts of integers give float32."""
        source, wanted = node.args[0], node.args[1]
        if _is_float(source) and isinstance(wanted, torch.dtype) and wanted.is_floating_point:
            node.replace_all_uses_with(source)  # type: ignore[arg-type]
            self.graph.erase_node(node)

    def _unify(self, node: fx.Node) -> None:
        """Float operands of one type: half where any computed one is half, else float32."""
        floats = [value for value in node.all_input_nodes if _is_float(value)]
        computed = [value for value in floats if value.op != "get_attr"]
        if any(tensor_type(value).dtype == self.dtype for value in computed) or (
            not computed and node.target is aten.embedding.default
        ):
            for value in floats:
                node.replace_input_with(value, self._half(value, node))

    def _retype(self, node: fx.Node) -> None:
        """The result's type from the operands'."""
        kind = node.meta.get("type")
        if node.target in (LINEAR, LINEAR_A16) or not isinstance(kind, TensorType):
            return
        if not kind.dtype.is_floating_point:
            return
        floats = [value for value in node.all_input_nodes if _is_float(value)]
        source = node.args[0]
        if isinstance(source, fx.Node) and source.meta.get("type") == "tuple":
            caller = source
            if caller.target is _mqc.rotary_angles.default:
                pass
            elif caller.target is _ATTENTION:
                node.meta["type"] = kind.with_dtype(self.dtype)
            else:
                node.meta["type"] = kind.with_dtype(tensor_type(caller.args[0]).dtype)  # type: ignore[arg-type]
        elif floats:
            node.meta["type"] = kind.with_dtype(tensor_type(floats[0]).dtype)

    def _half(self, value: Any, user: fx.Node) -> fx.Node:
        """``value`` in the half type: a cast parameter, or a cast node, made once."""
        return self._as(value, self.dtype)

    def _as(self, value: Any, dtype: torch.dtype) -> fx.Node:
        """``value`` in that type."""
        assert isinstance(value, fx.Node)
        kind = tensor_type(value)
        if kind.dtype == dtype:
            return value
        if value not in self.casts:
            wanted = kind.with_dtype(dtype)
            if value.op == "get_attr":
                self.casts[value] = self._half_param(value, wanted)
            else:
                with self.graph.inserting_after(value):
                    cast = call(self.graph, aten.to.dtype, (value, dtype), wanted, value)
                self.casts[value] = cast
        return self.casts[value]

    def _half_param(self, value: fx.Node, kind: TensorType) -> fx.Node:
        name = f"{value.target}.half"
        if name not in self.program.params:
            source, old = self.program.params.copy(), str(value.target)
            self.program.params[name] = lambda: source[old].to(self.dtype)
        with self.graph.inserting_after(value):
            node = self.graph.create_node("get_attr", name)
        node.meta = {"type": kind}
        return node
