"""Counts of leading visual rows as masks of rows."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

import mqc.ops  # noqa: F401  (registers the operators)
from mqc.ir import SCALAR, TensorType
from mqc.ir.edit import aten, call, tensor_type

_VISUAL = 3
"""Which result of mqc::token_order is the mask."""


def row_mask(graph: fx.Graph, count: fx.Node, source: fx.Node, tokens: Any) -> fx.Node:
    """bool [batch, tokens] at the insertion point: the first ``count[b]`` rows of each sequence.

    ``tokens`` is the size of axis 1 of ``source``, which tells a symbolic one.
    """
    made = count.args[0] if count.target is operator.getitem else None
    if isinstance(made, fx.Node) and made.target is torch.ops.mqc.token_order.default:
        rows = TensorType((tensor_type(count).shape[0], tokens), torch.bool)
        return call(graph, operator.getitem, (made, _VISUAL), rows, count)
    batch = tensor_type(count).shape[0]
    kind = TensorType((tokens,), torch.int64)
    size = tokens
    if not isinstance(tokens, int):
        size = call(graph, aten.sym_size.int, (source, 1), SCALAR, count)
    steps = call(graph, aten.arange.default, (size,), kind, count)
    column = call(graph, aten.unsqueeze.default, (count, 1), kind.with_shape(batch, 1), count)
    mask = TensorType((batch, tokens), torch.bool)
    return call(graph, aten.lt.Tensor, (steps, column), mask, count)
