"""The kernels behind torch's operators on CUDA tensors, for code that calls ``torch.ops.mqc.*``.

The engine calls kernels directly; this is for programs run through ``torch.fx`` on a device. They
are registered with ``Library.impl``: its dispatch costs a fifth of the decorator's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mqc.backends.cuda.ops  # noqa: F401  (defines mqc_cuda::linear and linear_a16)
from mqc.backends.cuda.kernels import Kernels
from mqc.backends.cuda.plan import row_stride
from mqc.errors import TargetError

_libraries: list[torch.library.Library] = []
_made: dict[torch.device, dict[str, Callable[..., Any]]] = {}


def empty_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a kernel's result, rows of int8 padded as the linear wants to read them."""
    wide = torch.empty(*shape[:-1], row_stride(shape[-1], dtype), dtype=dtype, device=device)
    return wide[..., : shape[-1]]


def implementations(kernels: Kernels) -> dict[str, Callable[..., Any]]:
    """Functional forms by qualified operator name."""

    def linear(
        xq: Tensor,
        weight: Tensor,
        w_scale: Tensor,
        x_scale: Tensor,
        modality: Tensor | None,
        bias: Tensor | None,
        x_split: Tensor | None,
        w_split: Tensor | None,
        residual: Tensor | None,
        layout: int,
        dtype: torch.dtype,
    ) -> Tensor:
        out = torch.empty(*xq.shape[:-1], w_scale.shape[0], dtype=dtype, device=xq.device)
        terms = (bias, x_split, w_split, residual)
        kernels.linear(out, xq, weight, w_scale, x_scale, modality, *terms, layout)
        return out

    def linear_a16(
        x: Tensor,
        weight: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        x_split: Tensor | None,
        w_split: Tensor | None,
        residual: Tensor | None,
        layout: int,
        dtype: torch.dtype,
    ) -> Tensor:
        out = torch.empty(*x.shape[:-1], w_scale.shape[0], dtype=dtype, device=x.device)
        kernels.linear_a16(out, x, weight, w_scale, bias, x_split, w_split, residual, layout)
        return out

    def columns(x: Tensor, split: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x_split, and where the kernel writes it: an operator returns a tensor always."""
        count = 0 if split is None else split.shape[0]
        found = torch.empty(*x.shape[:-1], count, dtype=x.dtype, device=x.device)
        return found, None if split is None else found

    def rms_norm_quantize(
        x: Tensor,
        eps: float,
        scale: Tensor,
        modality: Tensor | None,
        split: Tensor | None,
        unsigned: bool = False,
    ) -> tuple[Tensor, Tensor]:
        xq = empty_rows(tuple(x.shape), torch.int8, x.device)
        x_split, written = columns(x, split)
        kernels.rms_norm_quantize(xq, written, x, eps, scale, modality, _narrow(split))
        return _signed(xq, unsigned), x_split

    def activation_quantize(
        x: Tensor,
        activation: str,
        gated: bool,
        hadamard_block: int,
        scale: Tensor,
        modality: Tensor | None,
        split: Tensor | None,
        unsigned: bool = False,
    ) -> tuple[Tensor, Tensor]:
        width = x.shape[-1] // 2 if gated else x.shape[-1]
        xq = empty_rows((*x.shape[:-1], width), torch.int8, x.device)
        x_split, written = columns(x, split)
        how = (activation, gated, hadamard_block, scale, modality, _narrow(split))
        kernels.activation_quantize(xq, written, x, *how)
        return _signed(xq, unsigned), x_split

    def quantize_static(
        x: Tensor, scale: Tensor, modality: Tensor | None, unsigned: bool = False
    ) -> Tensor:
        return activation_quantize(x, "identity", False, 1, scale, modality, None, unsigned)[0]

    def hadamard(x: Tensor, block: int) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        kernels.hadamard(out, x, block)
        return out

    def embedding_w8(ids: Tensor, qweight: Tensor, scale: Tensor) -> Tensor:
        shape = (*ids.shape, qweight.shape[1])
        out = torch.empty(shape, dtype=scale.dtype, device=ids.device)
        kernels.embedding(out, ids, qweight, scale)
        return out

    return {
        "mqc_cuda::linear": linear,
        "mqc_cuda::linear_a16": linear_a16,
        "mqc::rms_norm_quantize": rms_norm_quantize,
        "mqc::activation_quantize": activation_quantize,
        "mqc::quantize_static": quantize_static,
        "mqc::hadamard": hadamard,
        "mqc::embedding_w8": embedding_w8,
    }


def register(kernels: Kernels) -> None:
    """Register the kernels of a device for dispatch key CUDA; the first ones of a device stay."""
    _made.setdefault(kernels.device, implementations(kernels))
    if _libraries:
        return
    made = {name: torch.library.Library(name, "IMPL") for name in ("mqc", "mqc_cuda")}
    for qualified in _made[kernels.device]:
        namespace, _, name = qualified.partition("::")
        made[namespace].impl(name, by_device(qualified), "CUDA")
    _libraries.extend(made.values())


def by_device(qualified: str) -> Callable[..., Any]:
    """The operator on the device of its first argument."""

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = _made.get(x.device)
        if found is None:
            raise TargetError(
                f"{qualified} has no kernels on {x.device}: none were opened there",
                hint=f"open them with device={x.device}",
            )
        return found[qualified](x, *args, **kwargs)

    return call


def _narrow(split: Tensor | None) -> Tensor | None:
    return None if split is None else split.to(torch.int32)


def _signed(xq: Tensor, unsigned: bool) -> Tensor:
    return (xq.to(torch.int16) + 128).to(torch.uint8) if unsigned else xq
