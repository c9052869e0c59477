"""Attention without a cache: equal to plain loops, in torch and in stock onnxruntime."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from op_cases import call, run_body, turned

from mqc.errors import UsageError


def values_of(
    rotary: str,
    packed: bool,
    batch: int = 2,
    tokens: int = 5,
    keys: int | None = None,
    heads: tuple[int, int] = (3, 3),
    width: int = 8,
    value_width: int | None = None,
    angles: int | None = None,
    angle_batch: int | None = None,
    mask_batch: int | None = None,
) -> dict[str, Any]:
    """Arguments in float64; ``mask_batch`` None: no mask."""
    query, groups = heads
    seen = keys or tokens

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    values: dict[str, Any] = {
        "q": random(batch, tokens, query, width),
        "k": random(batch, seen, groups, width),
        "v": random(batch, seen, groups, value_width or width),
        "mask": None,
        "cos": None,
        "sin": None,
        "kv_heads": groups,
        "scale": 0.31,
        "rotary": rotary,
    }
    if mask_batch is not None:
        mask = torch.rand(mask_batch, 1, tokens, seen) > 0.6
        mask[..., 0] |= ~mask.any(-1)
        values["mask"] = mask
    if rotary != "none":
        for name in ("cos", "sin"):
            values[name] = random(angle_batch or batch, tokens, angles or width)
    if packed:
        values["q"] = torch.cat([values["q"], values["k"], values["v"]], dim=2)
        values["k"] = values["v"] = None
    return values


def loops(values: dict[str, Any]) -> torch.Tensor:
    """One head and one row at a time."""
    groups, q, k, v = values["kv_heads"], values["q"], values["k"], values["v"]
    if k is None:
        q, k, v = q[:, :, : -2 * groups], q[:, :, -2 * groups : -groups], q[:, :, -groups:]
    if values["rotary"] != "none":
        q, k = (turned(x, values["cos"], values["sin"], values["rotary"]) for x in (q, k))
    mask = values["mask"]
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b, s, h in itertools.product(*(range(size) for size in q.shape[:3])):
        group = h // (q.shape[2] // groups)
        seen = torch.arange(k.shape[1])
        if mask is not None:
            seen = mask[b % mask.shape[0], 0, s].nonzero()[:, 0]
        score = (k[b, seen, group] @ q[b, s, h]) * values["scale"]
        out[b, s, h] = score.softmax(0) @ v[b, seen, group]
    return out.flatten(2)


CASES: list[dict[str, Any]] = [
    {},
    {"tokens": 1, "batch": 1},
    {"heads": (6, 2), "mask_batch": 2},
    {"heads": (5, 1), "mask_batch": 1, "angle_batch": 1},
    {"angles": 6},
    {"mask_batch": 1, "batch": 3, "tokens": 7},
]
APART: list[dict[str, Any]] = [
    {"tokens": 3, "keys": 11},
    {"tokens": 3, "keys": 11, "heads": (4, 2), "mask_batch": 2},
    {"keys": 2, "mask_batch": 1, "value_width": 5},
]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rotary", ["none", "half", "interleaved"])
def test_attention_full(rotary: str, packed: bool) -> None:
    torch.manual_seed(0)
    for case in CASES + (APART if rotary == "none" and not packed else []):
        values = values_of(rotary, packed, **case)
        want = loops(values)
        torch.testing.assert_close(call("attention_full", values), want, rtol=1e-12, atol=1e-12)
        values = {
            name: value.float()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for name, value in values.items()
        }
        (made,) = run_body("attention_full", values)
        torch.testing.assert_close(made, want.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_shape_function(packed: bool) -> None:
    values = values_of("half", packed, heads=(6, 2))
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    found = torch.ops.mqc.attention_full.default(*meta.values())
    assert found.shape == loops(values).shape == (2, 5, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": None}, "come together"),
        ({"kv_heads": 2}, "do not fit kv_heads=2"),
        ({"rotary": "none"}, "does not fit the given angles"),
        ({"rotary": "spiral"}, "does not fit the given angles"),
        ({"k": torch.zeros(2, 4, 3, 8), "v": torch.zeros(2, 4, 3, 8)}, "cannot turn"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    values = values_of("half", False)
    with pytest.raises(UsageError, match=message):
        call("attention_full", values | change)
