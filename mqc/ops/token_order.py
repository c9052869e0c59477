"""mqc::token_order, take_tokens, take_keys: the reordering of AIFS (MQuant section 3.3).

Visual tokens come first, then text tokens, both in their order. What passes/aifs_reorder.py writes
in a few dozen index operators is what these three compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mqc.ops._library import Arguments, OnnxForm, OpDef, register

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body


def reference(modality: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The order of each sequence's tokens.

    Args:
        modality: bool [B, S], True = visual token.

    Returns:
        order int64 [B, S], the old place of each new row; place int64 [B, S], the new place of each
        token; count int64 [B], visual tokens; visual bool [B, S], the modality of the new rows.
    """
    order = torch.argsort((~modality).to(torch.int8), dim=1, stable=True)
    return order, torch.argsort(order, dim=1), modality.sum(1), modality.gather(1, order)


def fake(modality: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shape function."""
    order, count = (modality.new_empty(shape, dtype=torch.int64) for shape in (
        modality.shape, modality.shape[:1]))  # fmt: skip
    return order, torch.empty_like(order), count, torch.empty_like(modality)


def _body(body: Body, flags: Sequence[str]) -> tuple[str, ...]:
    one, axis = body.axes(1), body.axes(0)
    visual = body.cast("modality", "INT64")
    count = body("ReduceSum", visual, one, keepdims=0)
    total = body("Unsqueeze", count, one)
    along = body("Squeeze", one, axis)
    first = body("CumSum", visual, along)
    second = body("Add", body("CumSum", body("Sub", one, visual), along), total)
    place = body("Sub", body("Where", "modality", first, second), one)
    zero = body("Squeeze", axis, axis)
    tokens = body("Squeeze", body.dim("modality", 1), axis)
    steps = body("Range", zero, tokens, along)
    every = body("Expand", steps, body("Shape", "modality"))
    order = body("ScatterElements", every, place, every, axis=1)
    return order, place, count, body("Less", steps, total)


OP = register(
    OpDef(
        "token_order",
        "(Tensor modality) -> (Tensor order, Tensor place, Tensor count, Tensor visual)",
        reference,
        fake,
        OnnxForm(
            "TokenOrder",
            lambda arguments: (),
            lambda flags: ("modality",),
            _body,
            {"modality": "bool", "visual": "bool"}
            | dict.fromkeys(("order", "place", "count"), "int64"),
            outputs=lambda flags: ("order", "place", "count", "visual"),
        ),
    )
)


def take_tokens(x: Tensor, order: Tensor, axis: int) -> Tensor:
    """y[.., b, s, ..] = x[.., b, order[b, s], ..]; tokens are axis ``axis`` of x, sequences the
    one before.

    Args:
        x: [.., B, S, ..], any dtype.
        order: int64 [B, S].
    """
    shape = [1] * x.dim()
    shape[axis - 1 : axis + 1] = order.shape
    return x.gather(axis, order.reshape(shape).expand(x.shape))


def _take_flags(arguments: Arguments) -> tuple[str, ...]:
    """``last``: int64 [.., B, S]; else float [B, S, K]."""
    return ("last",) if arguments["axis"] == len(arguments["x"].shape) - 1 else ()


def _take_body(body: Body, flags: Sequence[str]) -> str:
    if "last" in flags:
        wide = body("Expand", "order", body("Shape", "x"))
        return body("GatherElements", "x", wide, axis=-1)
    return body("GatherND", "x", body("Unsqueeze", "order", body.axes(-1)), batch_dims=1)


TAKE_TOKENS = register(
    OpDef(
        "take_tokens",
        "(Tensor x, Tensor order, int axis) -> Tensor",
        take_tokens,
        lambda x, order, axis: torch.empty_like(x),
        OnnxForm(
            "TakeTokens",
            _take_flags,
            lambda flags: ("x", "order"),
            _take_body,
            {"order": "int64", "x": "float|int64", "y": "float|int64"},
        ),
    )
)


def take_keys(mask: Tensor, order: Tensor, past: Tensor) -> Tensor:
    """A mask in the new order: rows, and the columns of the new tokens.

    y[b, w, s, past + t] = mask[b, w, order[b, s], past + order[b, t]]; columns before ``past`` are
    the cache's and stay, as do those behind the new tokens.

    Args:
        mask: bool [B, W, S, M], M >= past + S.
        order: int64 [B, S].
        past: int64 [1].
    """
    batch, tokens = order.shape
    keys = mask.shape[3]
    columns = torch.arange(keys, device=mask.device).expand(batch, -1)
    places = torch.arange(tokens, device=mask.device).expand(batch, -1) + past
    columns = columns.scatter(1, places, order + past)
    rows = mask.gather(2, order[:, None, :, None].expand(-1, mask.shape[1], -1, keys))
    return rows.gather(3, columns[:, None, None, :].expand_as(rows))


def _keys_body(body: Body, flags: Sequence[str]) -> str:
    axis = body.axes(0)
    zero, one = body("Squeeze", axis, axis), body("Squeeze", body.axes(1), axis)
    shape = body("Shape", "mask")
    rows = body("Expand", body("Unsqueeze", "order", body.axes(1, 3)), shape)
    turned = body("GatherElements", "mask", rows, axis=2)
    keys = body("Squeeze", body.dim("mask", 3), axis)
    wide = body("Concat", body.dim("mask", 0), body.dim("mask", 3), axis=0)
    every = body("Expand", body("Range", zero, keys, one), wide)
    tokens = body("Squeeze", body.dim("order", 1), axis)
    natural = body("Expand", body("Range", zero, tokens, one), body("Shape", "order"))
    places, new = body("Add", natural, "past"), body("Add", "order", "past")
    columns = body("ScatterElements", every, places, new, axis=1)
    columns = body("Expand", body("Unsqueeze", columns, body.axes(1, 2)), shape)
    return body("GatherElements", turned, columns, axis=3)


TAKE_KEYS = register(
    OpDef(
        "take_keys",
        "(Tensor mask, Tensor order, Tensor past) -> Tensor",
        take_keys,
        lambda mask, order, past: torch.empty_like(mask),
        OnnxForm(
            "TakeKeys",
            lambda arguments: (),
            lambda flags: ("mask", "order", "past"),
            _keys_body,
            {"mask": "bool", "y": "bool", "order": "int64", "past": "int64"},
        ),
    )
)
