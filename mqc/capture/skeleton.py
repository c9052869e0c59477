"""A model without weights: real modules and buffers, fake parameters.

``torch.export`` needs a live module, but a graph needs only shapes. :func:`build_skeleton` runs
the model's own constructor, drops every parameter the moment it is registered, and puts a fake
tensor (shape and dtype, no storage) in its place. Buffers that the constructor computes, such as
rotary frequencies, are small and stay real, so the graph's constants have their true values. A
model of any size is built in well under a second and a few megabytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights


@dataclass
class Skeleton:
    """``model`` has fake parameters that belong to ``mode``; example inputs are made in it too."""

    model: PreTrainedModel
    mode: FakeTensorMode

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A fake tensor for an example input."""
        with self.mode:
            return torch.empty(*shape, dtype=dtype)

    def tied(self) -> dict[str, str]:
        """Every parameter name -> the first name of the same parameter (itself if not tied)."""
        first: dict[int, str] = {}
        names: dict[str, str] = {}
        for name, value in self.model.named_parameters(remove_duplicate=False):
            names[name] = first.setdefault(id(value), name)
        return names


def build_skeleton(build: Callable[[], PreTrainedModel], dtype: torch.dtype) -> Skeleton:
    """Run ``build`` (a model constructor) without allocating its parameters.

    Floating-point parameters get ``dtype``; buffers keep what the constructor gives them (rotary
    frequencies stay float32).
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _parameters_on_meta(), no_init_weights():
            model = build()
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    _fake_parameters(model, mode, dtype)
    return Skeleton(model.eval(), mode)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Replace each parameter by a storage-free one as soon as a module registers it."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        if param is not None and param.device.type != "meta":
            self._parameters[name] = nn.Parameter(param.detach().to("meta"), requires_grad=False)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _fake_parameters(model: nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> None:
    """Give every meta parameter a fake CPU tensor; tied parameters stay one object."""
    fakes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None:
                continue
            if id(param) not in fakes:
                kind = dtype if param.is_floating_point() else param.dtype
                with mode:
                    fake = torch.empty(param.shape, dtype=kind)
                fakes[id(param)] = nn.Parameter(fake, requires_grad=False)
            module._parameters[name] = fakes[id(param)]
