"""A norm, or an activation with its product and transform, is computed where it is quantized."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mqc.errors import PassPostconditionError
from mqc.ir import Program, TensorType
from mqc.ir.edit import (
    aten,
    call,
    call_several,
    eliminate_dead_code,
    get_param,
    replace,
    tensor_type,
)
from mqc.ops.activation_quantize import QUICK_GELU
from mqc.transform import Pass, PassContext, PassResult, Skip

_mqc = torch.ops.mqc
_QUANTIZE = _mqc.quantize_static.default


@dataclass(frozen=True)
class _Source:
    """A fused call without its quantizing arguments: ``target(*head, scale, modality, ...)``."""

    kind: str
    target: Any
    head: tuple[Any, ...]


class FuseQuantize(Pass):
    """RMSNorm and quantize_static -> rms_norm_quantize; activation (times the other half of a
    merged linear), Hadamard transform and quantize_static -> activation_quantize.

    Only a value that nothing but its quantization and its float columns (``index_select`` by a
    constant) reads is fused; what does not fit is a skip with its reason.

    Postcondition: no quantize_static that could be fused is left.
    """

    name = "fuse-quantize"
    after = ("cleanup", "merge-linears")
    preserves = True

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        result = PassResult(program)
        for component in program:
            for node in list(component.graph.find_nodes(op="call_function", target=_QUANTIZE)):
                source = _source(node)
                if source is None:
                    continue
                if isinstance(source, str):
                    result.skips.append(Skip(f"{component.name}: %{node.name}", source))
                elif ctx.take():
                    _fuse(program, node, source)
                    result.counts[source.kind] += 1
            eliminate_dead_code(program)
        return result

    def ensures(self, result: PassResult) -> None:
        for component in result.program:
            for node in component.graph.find_nodes(op="call_function", target=_QUANTIZE):
                if isinstance(_source(node), _Source):
                    raise PassPostconditionError(f"%{node.name} could have been fused")


def _source(node: fx.Node) -> _Source | str | None:
    """What ``node`` quantizes: something to fuse, why not, or None for any other value."""
    value = node.args[0]
    assert isinstance(value, fx.Node)
    found = _norm(value) if value.target is aten.rms_norm.default else _activation(value)
    if isinstance(found, _Source):
        reason = _other_reader(node, value)
        return found if reason is None else reason
    return found


def _norm(value: fx.Node) -> _Source | str:
    gain = value.args[2] if len(value.args) > 2 else value.kwargs.get("weight")
    eps = value.args[3] if len(value.args) > 3 else value.kwargs.get("eps")
    shape = value.args[1]
    if gain is not None:
        return "the norm has a gain"
    if not isinstance(shape, (list, tuple)) or len(shape) != 1 or not isinstance(eps, float):
        return "the norm is over several axes, or its epsilon is not given"
    return _Source("norms", _mqc.rms_norm_quantize.default, (value.args[0], eps))


def _activation(value: fx.Node) -> _Source | str | None:
    """The chain linear -> activation [-> product] [-> transform] behind ``value``."""
    block = 1
    y: Any = value
    if y.target is _mqc.hadamard.default:
        block, y = int(y.args[1]), y.args[0]
        if len(y.users) > 1:
            return "another operator reads the value before its transform"
    named = _named(y)
    target = _mqc.activation_quantize.default
    if named is not None:
        name, x = named
        return _Source("activations", target, (x, name, False, block))
    if y.target is aten.mul.Tensor:
        for act, other in (y.args[:2], y.args[1::-1]):
            named = _named(act)
            if named is None or not isinstance(other, fx.Node):
                continue
            if len(act.users) > 1:
                return "another operator reads the activation"
            whole = joined([named[1], other])
            if whole is None:
                return "gate and up are not the halves of one linear's result"
            return _Source("gated", target, (whole, named[0], True, block))
    if block != 1:
        return _Source("transforms", target, (y, "identity", False, block))
    return None


def _named(y: Any) -> tuple[str, fx.Node] | None:
    """(name of the activation, its input) where ``y`` is one."""
    if not isinstance(y, fx.Node) or y.op != "call_function":
        return None
    x = y.args[0] if y.args else None
    if not isinstance(x, fx.Node):
        return None
    if y.target is aten.silu.default:
        return "silu", x
    if y.target is aten.relu.default:
        return "relu", x
    if y.target is aten.gelu.default:
        tanh = (y.args[1] if len(y.args) > 1 else y.kwargs.get("approximate")) == "tanh"
        return "gelu_tanh" if tanh else "gelu", x
    return _quick_gelu(y)


def _quick_gelu(y: Any) -> tuple[str, fx.Node] | None:
    """``x * sigmoid(x * 1.702)``."""
    if y.target is not aten.mul.Tensor:
        return None
    for x, gate in (y.args[:2], y.args[1::-1]):
        if not isinstance(gate, fx.Node) or gate.target is not aten.sigmoid.default:
            continue
        inner = gate.args[0]
        if not isinstance(inner, fx.Node) or inner.target is not aten.mul.Tensor:
            continue
        if isinstance(x, fx.Node) and inner.args[0] is x and len(gate.users) == 1:
            factor = inner.args[1]
            if isinstance(factor, float) and math.isclose(factor, QUICK_GELU, abs_tol=0.0):
                return "quick_gelu", x
    return None


def joined(parts: list[fx.Node]) -> fx.Node | tuple[fx.Node, int, int] | None:
    """The value of which ``parts`` are adjacent slices of the last axis.

    The value itself where the parts are all of it, else (value, start, end); None where they are
    not slices of one value, one after the other.
    """
    base: fx.Node | None = None
    first = end = 0
    for part in parts:
        if part.target is not aten.slice.Tensor or len(part.args) != 4:
            return None
        source, axis, start, stop = part.args
        assert isinstance(source, fx.Node) and isinstance(axis, int)
        kind = tensor_type(source)
        if axis % kind.rank != kind.rank - 1 or not (
            isinstance(start, int) and isinstance(stop, int)
        ):
            return None
        if base is None:
            base, first, end = source, start, start
        if source is not base or start != end:
            return None
        end = stop
    assert base is not None
    return base if (first, end) == (0, tensor_type(base).shape[-1]) else (base, first, end)


def whole_value(graph: fx.Graph, found: Any) -> fx.Node:
    """The node of what :func:`joined` found, sliced at the insertion point if need be."""
    if isinstance(found, fx.Node):
        return found
    base, start, end = found
    kind = tensor_type(base)
    shape = kind.with_shape(*kind.shape[:-1], end - start)
    return call(graph, aten.slice.Tensor, (base, kind.rank - 1, start, end), shape, base)


def _other_reader(node: fx.Node, value: fx.Node) -> str | None:
    """Why ``value`` cannot disappear: somebody but ``node`` and float columns reads it."""
    user: Any
    for user in value.users:
        if user is node:
            continue
        if user.target is not aten.index_select.default or user.args[2].op != "get_attr":
            return f"{user.target} reads the value in float"
        if any(reader < node for reader in user.users):
            return "its float columns are read before it is quantized"
    return None


def _fuse(program: Program, node: fx.Node, source: _Source) -> None:
    graph, value = node.graph, node.args[0]
    assert isinstance(value, fx.Node)
    args = [*node.args, *[None] * (4 - len(node.args))]
    unsigned = bool(node.kwargs.get("unsigned", args[3]))
    selects: list[Any] = [user for user in value.users if user is not node]
    columns = [program.params[str(select.args[2].target)].tolist() for select in selects]
    union = sorted({column for chosen in columns for column in chosen})
    kind = tensor_type(value)
    with graph.inserting_before(node):
        split = None
        if selects:
            hint = str(selects[0].args[2].target)
            split = get_param(program, graph, hint, torch.tensor(union))
        head = (whole_value(graph, source.head[0]), *source.head[1:])
        part = TensorType((*kind.shape[:-1], len(union)), kind.dtype) if selects else None
        call_args = (*head, args[1], args[2], split, unsigned)
        xq, kept = call_several(graph, source.target, call_args, [tensor_type(node), part], node)
        assert xq is not None
        for select, chosen in zip(selects, columns, strict=True):
            assert kept is not None
            picked = kept
            if chosen != union:
                places = torch.tensor([union.index(column) for column in chosen])
                index = get_param(program, graph, f"{hint}.places", places)
                axis = kind.rank - 1
                kinds = tensor_type(select)
                picked = call(graph, aten.index_select.default, (kept, axis, index), kinds, select)
            replace(select, picked)
    replace(node, xq)
