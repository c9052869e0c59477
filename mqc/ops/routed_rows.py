"""mqc::route_rows, split_rows, join_rows: each expert of a mixture computes its own rows.

A router gives every row its choice of experts. The pairs of row and expert are sorted by expert;
an expert then reads one piece of them, which may be empty, and what all of them give is weighted
and added up at the rows it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mqc.ops._library import Arguments, OnnxForm, OpDef, register

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body


def route_rows(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs (row, expert) in the order of the experts, rows of one expert in their order.

    Args:
        index: int64 [B, S, k], the experts that each row chose, in [0, experts).
        experts: how many there are.

    Returns:
        rows int64 [B * S * k], the row in 0 .. B * S of each pair; place int64 [B, S, k], where in
        that order the pair of each choice stands; counts int64 [experts], pairs of each expert.
    """
    flat = index.flatten()
    order = torch.argsort(flat, stable=True)
    every = torch.arange(flat.numel(), device=flat.device)
    place = torch.empty_like(order).scatter_(0, order, every)
    counts = torch.zeros(experts, dtype=torch.int64, device=flat.device)
    counts = counts.scatter_add(0, flat, torch.ones_like(flat))
    return order // index.shape[-1], place.reshape(index.shape), counts


def _route_fake(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = index.new_empty(index.numel())
    return rows, torch.empty_like(index), index.new_empty(experts)


def _number(flags: Sequence[str], letter: str) -> int:
    """The number in the flag that starts with ``letter``."""
    return next(int(flag[1:]) for flag in flags if flag[0] == letter)


def _route_body(body: Body, flags: Sequence[str]) -> tuple[str, ...]:
    flat = body("Reshape", "index", body.axes(-1))
    size, zero, one = body.dim(flat, 0), body.axes(0), body.axes(1)
    body("TopK", flat, size, axis=0, largest=0, sorted=1)  # ties by the lower place
    order = f"{body.nodes[-1].output[0]}_order"
    body.nodes[-1].output.append(order)
    first, step = body("Squeeze", zero, zero), body("Squeeze", one, zero)
    every = body("Range", first, body("Squeeze", size, zero), step)
    place = body("ScatterElements", every, order, every, axis=0)
    none = body.constant(np.zeros(_number(flags, "n"), np.int64))
    ones = body("Expand", one, size)
    counts = body("ScatterElements", none, flat, ones, axis=0, reduction="add")
    rows = body("Div", order, body.dim("index", -1))
    return rows, body("Reshape", place, body("Shape", "index")), counts


ROUTE_ROWS = register(
    OpDef(
        "route_rows",
        "(Tensor index, int experts) -> (Tensor rows, Tensor place, Tensor counts)",
        route_rows,
        _route_fake,
        OnnxForm(
            "RouteRows",
            lambda arguments: (f"n{arguments['experts']}",),
            lambda flags: ("index",),
            _route_body,
            dict.fromkeys(("index", "rows", "place", "counts"), "int64"),
            outputs=lambda flags: ("rows", "place", "counts"),
        ),
    )
)


def split_rows(x: Tensor, rows: Tensor, counts: Tensor, experts: int) -> list[Tensor]:
    """The rows of each expert, as one sequence.

    Args:
        x: [B, S, K], or bool [B, S].
        rows, counts: see :func:`route_rows`.
        experts: how many there are.

    Returns:
        For every expert its rows [1, n, K], or [1, n]; n = counts[expert] may be 0.
    """
    flat, bounds = x.flatten(0, 1), [0, *counts.cumsum(0).tolist()]
    pieces = [rows[start:end] for start, end in pairwise(bounds)]
    return [flat[piece].unsqueeze(0) for piece in pieces]


def _split_fake(x: Tensor, rows: Tensor, counts: Tensor, experts: int) -> list[Tensor]:
    context = torch.library.get_ctx()
    return [x.new_empty(1, context.new_dynamic_size(), *x.shape[2:]) for _ in range(experts)]


def _split_flags(arguments: Arguments) -> tuple[str, ...]:
    """``mask``: bool [B, S]; ``n<experts>``."""
    mask = ("mask",) if len(arguments["x"].shape) == 2 else ()
    return (*mask, f"n{arguments['experts']}")


def _split_body(body: Body, flags: Sequence[str]) -> tuple[str, ...]:
    if "mask" in flags:
        flat = body("Reshape", "x", body.axes(-1))
    else:
        flat = body("Flatten", "x", axis=2)
    picked = body("Unsqueeze", body("Gather", flat, "rows", axis=0), body.axes(0))
    body("Split", picked, "counts", axis=1)
    parts = [f"{body.nodes[-1].output[0]}_{part}" for part in range(_number(flags, "n"))]
    body.nodes[-1].output[:] = parts
    return tuple(parts)


SPLIT_ROWS = register(
    OpDef(
        "split_rows",
        "(Tensor x, Tensor rows, Tensor counts, int experts) -> Tensor[]",
        split_rows,
        _split_fake,
        OnnxForm(
            "SplitRows",
            _split_flags,
            lambda flags: ("x", "rows", "counts"),
            _split_body,
            {"rows": "int64", "counts": "int64", "*": "float|bool"},
            outputs=lambda flags: tuple(f"y{part}" for part in range(_number(flags, "n"))),
        ),
    )
)


def join_rows(y: Tensor, weights: Tensor, place: Tensor) -> Tensor:
    """z[b, s] = sum over the row's choices, in the order of the experts, of weight times y.

    Args:
        y: [1, B * S * k, N], the pairs' values in the order of :func:`route_rows`.
        weights: [B, S, k], of each choice.
        place: int64 [B, S, k].

    Returns:
        [B, S, N].
    """
    place, choice = place.sort(-1)
    scale = weights.gather(-1, choice)
    total = y[0, place[..., 0]] * scale[..., :1]
    for n in range(1, place.shape[-1]):
        total = total + y[0, place[..., n]] * scale[..., n : n + 1]
    return total


def _join_body(body: Body, flags: Sequence[str]) -> str:
    count = _number(flags, "k")
    sorted_place = body("TopK", "place", body.axes(count), axis=-1, largest=0, sorted=1)
    choice = f"{sorted_place}_choice"
    body.nodes[-1].output.append(choice)
    scale = body("Unsqueeze", body("GatherElements", "weights", choice, axis=-1), body.axes(-1))
    picked = body("Gather", body("Squeeze", "y", body.axes(0)), sorted_place, axis=0)
    weighted = body("Mul", picked, scale)
    if count == 1:
        return body("Squeeze", weighted, body.axes(2))
    body("Split", weighted, axis=2, num_outputs=count)
    parts = [f"{body.nodes[-1].output[0]}_{part}" for part in range(count)]
    body.nodes[-1].output[:] = parts
    total = parts[0]
    for part in parts[1:]:  # one after the other: a reduction may add in another order
        total = body("Add", total, part)
    return body("Squeeze", total, body.axes(2))


JOIN_ROWS = register(
    OpDef(
        "join_rows",
        "(Tensor y, Tensor weights, Tensor place) -> Tensor",
        join_rows,
        lambda y, weights, place: y.new_empty(*place.shape[:2], y.shape[-1]),
        OnnxForm(
            "JoinRows",
            lambda arguments: (f"k{arguments['weights'].shape[-1]}",),
            lambda flags: ("y", "weights", "place"),
            _join_body,
            {"place": "int64"},
            outputs=lambda flags: ("z",),
        ),
    )
)
