"""Attention blocks: which rows of which linear make the value heads, and which columns read them.

``softmax(QK^T) V`` mixes tokens, never head channels, so an orthogonal matrix on the head axis can
be written by the value projection and undone by the output projection. The two may be separate
linears or slices of a fused one, with grouped or repeated heads and a cache in between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from mqc.analysis.flow import is_linear
from mqc.analysis.index_trace import IndexTrace, channels_of, is_choice, is_view
from mqc.ir import Component, Program
from mqc.ir.edit import aten, tensor_type
from mqc.ir.symbols import ExampleSizes, evaluate_shape

SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class ValueOutputPair:
    """One attention: value rows [kv_heads, head_dim] and output columns [heads, head_dim].

    ``value_rows[h, d]`` is the output channel of every linear of ``values`` that holds channel d
    of head h; ``output_columns[h, d]`` is the input channel of every linear of ``outputs`` that
    reads it. There are several where rows choose among experts.
    """

    component: str
    attention: fx.Node
    values: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    value_rows: torch.Tensor
    output_columns: torch.Tensor

    @property
    def head_dim(self) -> int:
        return int(self.value_rows.shape[1])


@dataclass(frozen=True)
class Unpaired:
    """An attention whose value and output projections could not be paired, and why."""

    component: str
    attention: fx.Node
    reason: str


def find_attention(program: Program) -> list[ValueOutputPair | Unpaired]:
    """Every attention of the program in graph order."""
    sizes = ExampleSizes(2, batch=1, past=0)
    found: list[ValueOutputPair | Unpaired] = []
    for component in program:
        for node in component.graph.find_nodes(op="call_function", target=SDPA):
            try:
                found.append(_pair(component, node, sizes))
            except _UnpairedError as reason:
                found.append(Unpaired(component.name, node, str(reason)))
    return found


class _UnpairedError(Exception):
    """Why an attention cannot be paired."""


def _pair(component: Component, node: fx.Node, sizes: dict[str, int]) -> ValueOutputPair:
    head_value = node.args[2]
    assert isinstance(head_value, fx.Node)
    sources, path = _walk_back(head_value)
    trace = IndexTrace(sizes)
    for source in sources:
        trace.seed_channels(source)
    rows = _per_head(trace.get(head_value), "value")
    _check_private(component, trace, path, channels_of(rows))
    sinks = _walk_forward(node)
    heads, width = evaluate_shape(tensor_type(node).shape, sizes)[-3::2]
    back = IndexTrace(sizes)
    shape = back.shape(node)
    marks = torch.arange(heads * width).reshape(heads, 1, width).expand(shape)
    back.seed(node, marks.clone())
    reader = sinks[0].args[0]
    assert isinstance(reader, fx.Node)
    columns = back.get(reader)
    order = columns.reshape(-1, columns.shape[-1])
    if not bool((order == order[:1]).all()) or sorted(order[0].tolist()) != list(
        range(heads * width)
    ):
        raise _UnpairedError("the output projection does not read whole heads of one token")
    inverse = torch.argsort(order[0]).reshape(heads, width)
    return ValueOutputPair(component.name, node, sources, sinks, rows, inverse)


def _walk_back(value: fx.Node) -> tuple[tuple[fx.Node, ...], list[fx.Node]]:
    """The linears behind a head tensor, and the nodes between: views, cache joins, choices."""
    path: list[fx.Node] = []
    sources: list[fx.Node] = []
    stack = [value]
    while stack:
        node = stack.pop()
        if node in path or node in sources:
            continue
        if is_linear(node):
            sources.append(node)
        elif is_choice(node):
            path.append(node)
            stack += [n for n in node.args[1:] if isinstance(n, fx.Node)]
        elif is_view(node):
            path.append(node)
            stack += [n for n in node.all_input_nodes if not isinstance(n.meta.get("type"), str)]
        elif node.op != "placeholder":
            raise _UnpairedError(f"the values pass through {node.target}")
    if len(sources) != 1 and not any(is_choice(node) for node in path):
        raise _UnpairedError(f"the values come from {len(sources)} linears")
    if len({tensor_type(node).shape for node in sources}) != 1:
        raise _UnpairedError("the values come from linears of several widths")
    return tuple(sources), path


def _walk_forward(node: fx.Node) -> tuple[fx.Node, ...]:
    """The linears that read an attention's output through views: one value, one or more readers."""
    sinks: list[fx.Node] = []
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if is_linear(user):
            sinks.append(user)
        elif is_view(user):
            stack += list(user.users)
        elif user.target != aten.sym_size.int:
            raise _UnpairedError(f"the output passes through {user.target}")
    if len({sink.args[0] for sink in sinks}) != 1:
        raise _UnpairedError(f"{len(set(sinks))} linears read the output")
    return tuple(dict.fromkeys(sinks))


def _per_head(indices: torch.Tensor, what: str) -> torch.Tensor:
    """[1, heads, tokens, head_dim] indices, equal for every token, as unique [heads, head_dim]."""
    heads = indices.reshape(-1, *indices.shape[-3:])[0]
    if heads.shape[1] == 0 or not bool((heads == heads[:, :1]).all()) or bool((heads < 0).any()):
        raise _UnpairedError(f"the {what} heads are not whole slices of one linear")
    rows: torch.Tensor = torch.unique(heads[:, 0], dim=0)
    if len(set(rows.flatten().tolist())) != rows.numel():
        raise _UnpairedError(f"the {what} heads overlap")
    return rows


def _check_private(
    component: Component, trace: IndexTrace, path: list[fx.Node], rows: set[int]
) -> None:
    """Nothing but this attention (and the cache) may read the value rows."""
    caches = {
        component.output_value(p.name) for p in component.outputs if p.axis("key") is not None
    }
    known = set(path)
    stack = [(node, user) for node in path for user in node.users if user not in known]
    while stack:
        node, user = stack.pop()
        if user.target in (SDPA, aten.sym_size.int) or (user.op == "output" and node in caches):
            continue
        if is_view(user) or is_choice(user):
            if user not in known and channels_of(trace.get(user)) & rows:
                known.add(user)
                stack += [(user, other) for other in user.users if other not in known]
        elif channels_of(trace.get(node)) & rows:
            raise _UnpairedError(f"the values are also read by {user.target}")
