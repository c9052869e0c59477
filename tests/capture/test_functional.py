"""Writes into tensors become values: the rewritten graph computes what the model does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from mqc.capture.export import Exported
from mqc.capture.functional import functionalize
from mqc.capture.importer import import_component
from mqc.errors import CaptureError


class Module(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.table = nn.Buffer(torch.arange(6.0).reshape(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def strided(x: torch.Tensor) -> torch.Tensor:
    """A slice of a selection, written twice, then read through the tensor it belongs to."""
    y = x * 2
    row = y[0]
    row[..., 1:6:3] = x[1, :, 1:6:3]
    row[..., 2:6:3] = x[2, :, 2:6:3]
    return torch.cat([y[0], row, y[1]], dim=-1)


def aliases(x: torch.Tensor) -> torch.Tensor:
    """Views made before a write see it."""
    y = x + 1
    first, turned = y[0], y.transpose(1, 2)
    y[:, :, 0] = 7.0
    y[1].mul_(3.0)
    return first.sum() + turned


def rebound(x: torch.Tensor) -> torch.Tensor:
    """An augmented assignment, as routers use it."""
    y = x.softmax(-1)
    y /= y.sum(dim=-1, keepdim=True)
    return y


def scattered(x: torch.Tensor) -> torch.Tensor:
    values, index = x.topk(2, dim=-1)
    return torch.zeros_like(x).scatter_(-1, index, 1.0) * values.sum()


def exported(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Any:
    return torch.export.export(Module(function), (x,), strict=False)


@pytest.mark.parametrize("function", [strided, aliases, rebound, scattered])
def test_writes_become_values(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    program = exported(function, x)
    form = Exported("part", program, [("x", (None,) * 3)], [("y", (None,) * function(x).ndim)])
    item = import_component(form, {})
    names = [str(node.target) for node in item.component.graph.nodes]
    assert not [name for name in names if name.split(".")[-2:-1] and "_." in name]
    values = {}
    for node in item.component.graph.nodes:
        if node.op == "placeholder":
            values[node] = x
        elif node.op == "get_attr":
            values[node] = item.constants[str(node.target)]
        elif node.op == "call_function":
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
        else:
            (result,) = (values[n] for n in node.args[0])
    torch.testing.assert_close(result, function(x), rtol=0, atol=0)


def test_a_write_to_an_input_is_refused() -> None:
    def into_input(x: torch.Tensor) -> torch.Tensor:
        x[0] = 0.0
        return x + 1

    program = exported(into_input, torch.randn(2, 3))
    with pytest.raises(CaptureError, match="in place"):
        functionalize(program.graph)


def test_a_write_through_a_transposition_is_refused() -> None:
    def turned(x: torch.Tensor) -> torch.Tensor:
        y = x * 1.5
        y.transpose(0, 1)[0] = 1.0
        return y

    with pytest.raises(CaptureError, match=r"transpose.*in place"):
        functionalize(exported(turned, torch.randn(2, 3)).graph)
