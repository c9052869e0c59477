"""Peak memory of the values of small graphs."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from mqc.analysis.liveness import peak_bytes
from mqc.ir import Component, Port, TensorType
from mqc.ir.edit import aten, call


def chain() -> Component:
    """x -> relu -> reshape -> relu -> out: the first relu lives through its view."""
    graph = fx.Graph()
    kind = TensorType(("n", 4), torch.float32)
    flat = TensorType(("4*n",), torch.float32)
    x = graph.placeholder("x")
    x.meta["type"] = kind
    a = call(graph, aten.relu.default, (x,), kind, x)
    b = call(graph, aten.reshape.default, (a, [-1]), flat, x)
    c = call(graph, aten.relu.default, (b,), flat, x)
    d = call(graph, aten.relu.default, (c,), flat, x)
    graph.output((d,))
    return Component("part", graph, [Port("x", kind, ("row", None))], [Port("y", flat, ("row",))])


def test_values_die_after_their_last_reader() -> None:
    tensor = 3 * 4 * 4  # bytes
    # the input, and at most two of the results at once
    assert peak_bytes(chain(), {"n": 3}) == 3 * tensor


def test_an_unknown_size_is_an_error() -> None:
    with pytest.raises(KeyError, match="n"):
        peak_bytes(chain(), {})
