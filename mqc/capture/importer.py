"""``torch.export`` programs as components: plain nodes, named parameters, readable shapes.

What is changed on the way, and nothing else: guards and assertions go; sizes are read from the
first input that has them; symbols get the names of the axes they come from; values that are lists
of views (``split``, ``chunk``, ``unbind``) become one ``slice`` or ``select`` per element, so that
every node yields one tensor or one size; the identities that tracing leaves (``detach``,
``lift_fresh_copy``, ``dropout`` outside training) go; devices are dropped.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind

from mqc.capture.export import Exported
from mqc.capture.functional import functionalize
from mqc.errors import CaptureError
from mqc.ir import SCALAR, Component, Port, TensorType
from mqc.ir.types import Dim

aten = torch.ops.aten

_PREFIX = "m."
_IDENTITIES = {
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
}
_DEVICE_ARGUMENTS = ("device", "layout", "pin_memory", "non_blocking")


@dataclass
class Imported:
    """A component and the names it reads: parameters of the model, and constants with values."""

    component: Component
    constants: dict[str, torch.Tensor] = field(default_factory=dict)


def import_component(exported: Exported, tied: dict[str, str]) -> Imported:
    """Turn an export into a component.

    ``tied`` maps parameter names to the one name that tied parameters share. Constants (buffers
    and lifted literals) are returned with their values. Raises :class:`CaptureError` for a graph
    that changes buffers or returns something other than tensors.
    """
    return _Importer(exported, tied).run()


class _Importer:
    def __init__(self, exported: Exported, tied: dict[str, str]) -> None:
        self.exported = exported
        self.tied = tied
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.symbols: dict[sympy.Expr, sympy.Symbol] = {}
        self.sizes: dict[str, fx.Node] = {}
        self.sources: dict[str, tuple[fx.Node, int]] = {}
        self.inputs: list[Port] = []
        self.result_constants: dict[str, torch.Tensor] = {}

    def run(self) -> Imported:
        program = self.exported.program
        functionalize(program.graph)
        kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        nodes = list(program.graph.nodes)
        used = _live(nodes)
        user = [n for n in nodes if n.op == "placeholder" and _is_user(kinds[n.name])]
        self._add_inputs(user)
        for node in nodes:
            if node.op == "placeholder":
                if not _is_user(kinds[node.name]) and node in used:
                    self._add_param(node, kinds[node.name])
            elif node.op == "call_function":
                if node in used:
                    self._add_call(node)
            elif node.op != "output":
                raise self._error(f"%{node.name} is a {node.op}")
        outputs = self._add_outputs(nodes[-1])
        component = Component(self.exported.name, self.graph, self.inputs, outputs)
        _erase_unused(self.graph)
        return Imported(component, self.result_constants)

    # -- inputs ----------------------------------------------------------------------------------

    def _add_inputs(self, nodes: Sequence[fx.Node]) -> None:
        self._name_symbols(nodes)
        for node, (name, axes) in zip(nodes, self.exported.inputs, strict=True):
            new = self.graph.placeholder(name)
            kind = self._type(node.meta["val"])
            assert isinstance(kind, TensorType)
            new.meta = {"type": kind}
            self.values[node] = new
            self.inputs.append(Port(name, kind, axes))
            for axis, size in enumerate(kind.shape):
                if isinstance(size, str):
                    self.sources.setdefault(size, (new, axis))

    def _name_symbols(self, nodes: Sequence[fx.Node]) -> None:
        for (position, axis), name in self.exported.symbols.items():
            size = nodes[position].meta["val"].shape[axis]
            if not isinstance(size, torch.SymInt):
                raise self._error(f"size {name!r} became the constant {size}")
            (symbol,) = size.node.expr.free_symbols
            self.symbols[symbol] = sympy.Symbol(name, integer=True, nonnegative=True)

    def _add_param(self, node: fx.Node, spec: Any) -> None:
        target = str(spec.target)
        name = target.removeprefix(_PREFIX)
        if spec.kind is InputKind.PARAMETER:
            name = self.tied.get(name, name)
        elif spec.kind is InputKind.BUFFER:
            program = self.exported.program
            store = program.state_dict if spec.persistent else program.constants
            self.result_constants[name] = store[target].detach()
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            name = f"{self.exported.name}.{name}"
            self.result_constants[name] = self.exported.program.constants[target].detach()
        else:
            raise self._error(f"input {target!r} is a {spec.kind.name}")
        new = self.graph.create_node("get_attr", name)
        new.meta = {"type": self._type(node.meta["val"])}
        self.values[node] = new

    # -- calls -----------------------------------------------------------------------------------

    def _add_call(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.target in _IDENTITIES or _is_idle_dropout(node):
            self.values[node] = self.values[node.args[0]]  # type: ignore[index]
        elif node.target is aten.sym_size.int:
            self.values[node] = self._size(value, node)
        elif node.target in (aten.slice_scatter.default, aten.select_scatter.default):
            self.values[node] = self._scatter(node)
        elif isinstance(value, (list, tuple)):
            self.values[node] = None  # a list of views: its elements are made where they are read
        elif node.target is operator.getitem and self._is_list(node.args[0]):
            self.values[node] = self._element(node)
        else:
            self.values[node] = self._call(node, *self._translate(node))

    def _call(self, like: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Any) -> fx.Node:
        new = self.graph.call_function(target, args, kwargs)
        new.meta = {"type": self._type(like.meta["val"])}
        module = _module_path(like)
        if module:
            new.meta["module"] = module
        return new

    def _translate(self, node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """Target and arguments of the new call, without devices."""
        args = self._args(node)
        if node.target in (aten.to.device, aten.to.dtype_layout, aten.to.other):
            return aten.to.dtype, (args[0], node.meta["val"].dtype), {}
        kwargs = fx.map_arg(node.kwargs, lambda n: self.values[n])
        return node.target, args, {k: v for k, v in kwargs.items() if k not in _DEVICE_ARGUMENTS}

    def _args(self, node: fx.Node) -> tuple[Any, ...]:
        return tuple(fx.map_arg(node.args, lambda n: self.values[n]))

    def _size(self, value: Any, node: fx.Node) -> Any:
        """The size node for ``value``: one per distinct size, read from the first input it has."""
        size = self._dim(value)
        if isinstance(size, int):
            return size
        if size not in self.sizes:
            source = self.sources.get(size)
            if source is None:
                args = self._args(node)
                self.sizes[size] = self._call(node, aten.sym_size.int, args, {})
            else:
                self.sizes[size] = self._call(node, aten.sym_size.int, source, {})
                self.sizes[size].meta = {"type": SCALAR}
        return self.sizes[size]

    def _is_list(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), (list, tuple))

    def _element(self, node: fx.Node) -> fx.Node:
        """Element ``i`` of a list of views, as a view of its own."""
        source, index = node.args
        assert isinstance(source, fx.Node) and isinstance(index, int)
        args = self._args(source)
        pieces = source.meta["val"]
        index %= len(pieces)
        if source.target is aten.topk.default:
            return self._top(node, source, index)
        axis_at = 1 if source.target is aten.unbind.int else 2
        axis = int(args[axis_at]) if len(args) > axis_at else source.kwargs.get("dim", 0)
        assert isinstance(axis, int)
        if source.target is aten.unbind.int:
            return self._call(node, aten.select.int, (args[0], axis, index), {})
        views = (aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default)
        widths = [piece.shape[axis] for piece in pieces]
        if source.target not in views or not all(isinstance(width, int) for width in widths):
            raise self._error(f"%{source.name} ({source.target}) yields several values")
        start = sum(widths[:index])
        return self._call(
            node, aten.slice.Tensor, (args[0], axis, start, start + widths[index]), {}
        )

    def _scatter(self, node: fx.Node) -> fx.Node:
        """``slice_scatter``, ``select_scatter``: both tensors side by side, picked by a list."""
        whole, part = node.args[:2]
        assert isinstance(whole, fx.Node) and isinstance(part, fx.Node)
        shape = whole.meta["val"].shape
        axis = node.args[2] if len(node.args) > 2 else 0
        assert isinstance(axis, int)
        axis %= len(shape)
        size = shape[axis]
        if not isinstance(size, int):
            raise self._error(f"%{node.name} writes along an axis of a size that may change")
        places = torch.arange(size)
        old, new = self.values[whole], self.values[part]
        kind = self._type(whole.meta["val"])
        assert isinstance(kind, TensorType)
        if node.target is aten.select_scatter.default:
            places = places[node.args[3]].reshape(1)  # type: ignore[index]
            new = self._call(part, aten.unsqueeze.default, (new, axis), {})
            new.meta["type"] = kind.with_shape(*kind.shape[:axis], 1, *kind.shape[axis + 1 :])
        else:
            start, stop, step = (*node.args[3:], None, None, None)[:3]
            places = places[start:stop:step]
        index = torch.arange(size)
        index[places] = size + torch.arange(len(places))
        both = self._call(node, aten.cat.default, ([old, new], axis), {})
        wide = (*kind.shape[:axis], size + len(places), *kind.shape[axis + 1 :])
        both.meta["type"] = kind.with_shape(*wide)
        name = f"{self.exported.name}.{node.name}.places"
        self.result_constants[name] = index
        picked = self.graph.create_node("get_attr", name)
        picked.meta = {"type": TensorType((size,), torch.int64)}
        return self._call(node, aten.index_select.default, (both, axis, picked), {})

    def _top(self, node: fx.Node, source: fx.Node, index: int) -> fx.Node:
        """Values (0) or indices (1) of ``topk``: the front of a sorting order, what it picks."""
        args, kinds = self._args(source), source.meta["val"]
        count, axis = args[1], args[2] if len(args) > 2 else -1
        largest = args[3] if len(args) > 3 else True
        order = self._call(node, aten.argsort.default, (args[0], axis, largest), {})
        order.meta["type"] = self._type(source.args[0].meta["val"]).with_dtype(torch.int64)  # type: ignore[union-attr]
        top = self._call(node, aten.slice.Tensor, (order, axis, 0, count), {})
        top.meta["type"] = self._type(kinds[1])
        if index == 1:
            return top
        return self._call(node, aten.gather.default, (args[0], axis, top), {})

    # -- outputs ---------------------------------------------------------------------------------

    def _add_outputs(self, output: fx.Node) -> list[Port]:
        specs = self.exported.program.graph_signature.output_specs
        if any(spec.kind is not OutputKind.USER_OUTPUT for spec in specs):
            raise self._error("it changes its buffers")
        values = output.args[0]
        assert isinstance(values, (tuple, list))
        result = self.graph.output(tuple(self.values[v] for v in values))  # type: ignore[index]
        result.meta = {}
        ports = []
        for value, (name, axes) in zip(values, self.exported.outputs, strict=True):
            assert isinstance(value, fx.Node)
            kind = self._type(value.meta["val"])
            if not isinstance(kind, TensorType):
                raise self._error(f"output {name!r} is not a tensor")
            ports.append(Port(name, kind, axes))
        return ports

    # -- types -----------------------------------------------------------------------------------

    def _type(self, value: Any) -> TensorType | str:
        if isinstance(value, torch.Tensor):
            return TensorType(tuple(self._dim(size) for size in value.shape), value.dtype)
        return SCALAR

    def _dim(self, size: Any) -> Dim:
        if isinstance(size, int):
            return size
        expression = size.node.expr.subs(self.symbols)
        return int(expression) if expression.is_Integer else str(expression)

    def _error(self, reason: str) -> CaptureError:
        return CaptureError(
            f"the {self.exported.name} graph cannot be imported: {reason}",
            hint="report the model family with the output of `mqc probe`",
        )


def _live(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Nodes that an output depends on (assertions are not outputs)."""
    live: set[fx.Node] = set()
    pending = [nodes[-1]]
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending.extend(node.all_input_nodes)
    return live


def _erase_unused(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)


def _is_user(spec: Any) -> bool:
    return spec.kind is InputKind.USER_INPUT


def _is_idle_dropout(node: fx.Node) -> bool:
    return node.target is aten.dropout.default and not node.args[2]


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path.removeprefix("m").removeprefix(".") if path.startswith("m") else path
