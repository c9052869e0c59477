"""Columns kept in float beside a quantized value: what the fused quantizing operators return.

They return ``(xq, x_split)``: ``x_split = y[..., split]`` are the columns that a linear's rank-k
update reads, in y's dtype; without ``split`` it is ``y[..., :0]``, and in ONNX it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mqc.ops._library import Arguments

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body


def split_columns(y: Tensor, split: Tensor | None) -> Tensor:
    """y[..., split], or no columns; ``split``: int64 [k]."""
    return y[..., :0].clone() if split is None else y.index_select(y.dim() - 1, split)


def split_fake(y: Tensor, split: Tensor | None) -> Tensor:
    """Shape function of :func:`split_columns`; ``y`` gives rows and dtype."""
    return y.new_empty((*y.shape[:-1], 0 if split is None else split.shape[0]))


def split_flag(arguments: Arguments) -> tuple[str, ...]:
    """("split",) where columns are asked for."""
    return ("split",) if arguments.get("split") is not None else ()


def split_inputs(flags: Sequence[str]) -> tuple[str, ...]:
    """The input ``split`` of a variant, or nothing."""
    return ("split",) if "split" in flags else ()


def split_outputs(flags: Sequence[str]) -> tuple[str, ...]:
    """Outputs of a variant."""
    return ("xq", "x_split") if "split" in flags else ("xq",)


def with_split(body: Body, xq: str, y: str, flags: Sequence[str]) -> tuple[str, ...]:
    """The results of a variant's body from the quantized and the float value."""
    return (xq, body("Gather", y, "split", axis=-1)) if "split" in flags else (xq,)
