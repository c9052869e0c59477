"""Fused operators: equal to what they replace, in torch and in stock onnxruntime."""

from __future__ import annotations

import itertools
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import ATTENTION_CASES, attention_values, call, run_body, turned

from mqc.errors import UsageError
from mqc.numerics.packing import pack_int4
from mqc.ops.onnx_functions import (
    attach_functions,
    translation_table,
)

OPS, aten = torch.ops.mqc, torch.ops.aten
ACTIVATIONS = ["identity", "silu", "gelu", "gelu_tanh", "quick_gelu", "relu"]
MODALITIES = [None, "mask", "count"]


def modality_of(form: str | None, batch: int, tokens: int) -> torch.Tensor | None:
    if form == "mask":
        return torch.randint(0, 2, (batch, tokens)).bool()
    return torch.randint(0, tokens + 1, (batch,)) if form == "count" else None


def scale_of(form: str | None) -> torch.Tensor:
    return torch.tensor([0.037, 0.0113] if form else [0.029])


def assert_quantized_alike(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal but for values within an ulp of a step's boundary."""
    assert got.dtype == want.dtype and got.shape == want.shape
    apart = (got.int() - want.int()).abs()
    assert apart.max() <= 1 and (apart > 0).double().mean() <= 2e-3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("split", [None, [2], [0, 5, 22]])
@pytest.mark.parametrize("form", MODALITIES)
def test_rms_norm_quantize(form: str | None, split: list[int] | None, unsigned: bool) -> None:
    for batch, tokens in ((1, 1), (2, 5)):
        values: dict[str, Any] = {
            "x": torch.randn(batch, tokens, 23) * 3,
            "eps": 1e-5,
            "scale": scale_of(form),
            "modality": modality_of(form, batch, tokens),
            "split": None if split is None else torch.tensor(split),
            "unsigned": unsigned,
        }
        normal = aten.rms_norm.default(values["x"], [23], None, 1e-5)
        xq = OPS.quantize_static(normal, values["scale"], values["modality"], unsigned)
        got = call("rms_norm_quantize", values)
        assert torch.equal(got[0], xq)
        assert torch.equal(got[1], normal[..., split or []])
        made = run_body("rms_norm_quantize", values)
        assert_quantized_alike(made[0], xq)
        assert len(made) == (1 if split is None else 2)
        if split is not None:
            torch.testing.assert_close(made[1], got[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_quantize(activation: str, gated: bool) -> None:
    cases = itertools.product(MODALITIES, (1, 4, 12, 24), (None, [1], [0, 23]), (False, True))
    for form, block, split, unsigned in list(cases)[:: 1 if activation == "silu" else 5]:
        x = torch.randn(2, 3, 48 if gated else 24) * 3
        values: dict[str, Any] = {
            "x": x,
            "activation": activation,
            "gated": gated,
            "hadamard_block": block,
            "scale": scale_of(form),
            "modality": modality_of(form, 2, 3),
            "split": None if split is None else torch.tensor(split),
            "unsigned": unsigned,
        }
        gate = x[..., :24]
        y = {
            "identity": lambda z: z,
            "silu": aten.silu.default,
            "gelu": aten.gelu.default,
            "gelu_tanh": lambda z: aten.gelu.default(z, approximate="tanh"),
            "quick_gelu": lambda z: z * aten.sigmoid.default(aten.mul.Tensor(z, 1.702)),
            "relu": aten.relu.default,
        }[activation](gate)
        y = y * x[..., 24:] if gated else y
        y = OPS.hadamard(y, block)
        xq = OPS.quantize_static(y, values["scale"], values["modality"], unsigned)
        got = call("activation_quantize", values)
        assert torch.equal(got[0], xq)
        assert torch.equal(got[1], y[..., split or []])
        made = run_body("activation_quantize", values)
        # Different erf and exp: half a step of 127 is the most that such a difference may decide.
        apart = (made[0].int() - xq.int()).abs()
        assert apart.max() <= 1 and (apart > 0).double().mean() <= 0.02
        if split is not None:
            torch.testing.assert_close(made[1], got[1], rtol=1e-4, atol=1e-5)


def plain_attention(values: dict[str, Any]) -> list[torch.Tensor]:
    """What models compute, one head and one row at a time, in loops."""
    groups = values["key_cache"].shape[1]
    q, k, v = values["q"], values["k"], values["v"]
    if k is None:
        q, k, v = q[:, :, : -2 * groups], q[:, :, -2 * groups : -groups], q[:, :, -groups:]
    past = int(values["past"])
    if values["rotary"] != "none":
        q, k = (turned(x, values["cos"], values["sin"], values["rotary"]) for x in (q, k))
    rows = max(values["key_cache"].shape[2], values["mask"].shape[3])
    caches = []
    for cache, new in ((values["key_cache"], k), (values["value_cache"], v)):
        grown = torch.zeros(*cache.shape[:2], rows, cache.shape[3], dtype=cache.dtype)
        grown[:, :, : cache.shape[2]] = cache
        grown[:, :, past : past + q.shape[1]] = new.transpose(1, 2)
        caches.append(grown)
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b, s, h in itertools.product(range(q.shape[0]), range(q.shape[1]), range(q.shape[2])):
        group = h // (q.shape[2] // groups)
        seen = values["mask"][b, 0, s, : past + q.shape[1]].nonzero()[:, 0]
        score = (caches[0][b, group, seen] @ q[b, s, h]) * values["scale"]
        out[b, s, h] = score.softmax(0) @ caches[1][b, group, seen]
    return [out.flatten(2), *caches]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rotary", ["none", "half", "interleaved"])
def test_attention(rotary: str, packed: bool) -> None:
    for case in ATTENTION_CASES:
        values = attention_values(rotary, packed, dtype=torch.float64, **case)
        want, got = plain_attention(values), call("attention", values)
        for left, right in zip(got, want, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
        values = {
            k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in values.items()
        }
        made, got = run_body("attention", values), call("attention", values)
        for left, right in zip(made, got, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_attention_with_other_value_widths_and_more_mask_columns() -> None:
    values = attention_values("half", False, value_width=5)
    wide = values | {
        "mask": torch.cat([values["mask"], torch.ones(2, 1, 3, 2, dtype=torch.bool)], 3)
    }
    want = plain_attention(values)
    for given_values in (values, wide):
        for got in (call("attention", given_values), run_body("attention", given_values)):
            for left, right in zip(got, want, strict=True):
                torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(0, 6), st.integers(1, 3), st.integers(0, 5), st.booleans())
def test_chunks_fill_the_cache_as_one_call_does(
    tokens: int, past: int, chunk: int, spare: int, buffer: bool
) -> None:
    """Any chunks, growing or in a buffer: the same output and the same rows of the cache."""
    whole = attention_values("half", False, 1, tokens, past, spare if buffer else None)
    whole["mask"] = (torch.arange(past + tokens) <= torch.arange(tokens)[:, None] + past)[
        None, None
    ]
    want = call("attention", whole)
    cache = [whole["key_cache"], whole["value_cache"]]
    outs = []
    for start in range(0, tokens, chunk):
        part, end = slice(start, start + chunk), min(start + chunk, tokens)
        piece = {n: whole[n][:, part] for n in ("q", "k", "v", "cos", "sin")}
        mask = whole["mask"][:, :, part, : past + end]
        rest = {"past": torch.tensor([past + start]), "mask": mask}
        caches = dict(zip(("key_cache", "value_cache"), cache, strict=True))
        out, *cache = call("attention", whole | piece | rest | caches)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs, 1), want[0], rtol=1e-5, atol=1e-6)
    for got, rows in zip(cache, want[1:], strict=True):
        assert torch.equal(got, rows)


def test_residuals_are_added_last() -> None:
    """The linears' residual is one addition more, bit by bit, and a variant of the body."""
    q = torch.randint(-8, 8, (6, 12), dtype=torch.int8)
    common: dict[str, Any] = {
        "w_scale": torch.exp2(torch.randint(-3, 3, (6,)).float()),
        "x_scale": torch.tensor([0.5]),
        "modality": None,
        "bias": torch.randint(-9, 9, (6,)).float(),
        "x_split": torch.randint(-9, 9, (2, 3, 1)).float(),
        "w_split": torch.randint(-9, 9, (6, 1)).float(),
    }
    residual = torch.randn(2, 3, 6).round(decimals=2)
    for name in ("linear_w4a8", "linear_w8a8", "linear_w4a16", "linear_w8a16"):
        values = common | {"qweight": pack_int4(q) if "w4" in name else q}
        values |= {"xq": torch.randint(1, 256, (2, 3, 12), dtype=torch.uint8)}
        values |= {"x": torch.randint(-9, 9, (2, 3, 12)).float()}
        plain = call(name, values)
        got = call(name, values | {"residual": residual})
        assert torch.equal(got, residual + plain)
        (made,) = run_body(name, values | {"residual": residual})
        torch.testing.assert_close(made, got, rtol=1e-6, atol=1e-5)
        with pytest.raises(UsageError, match="residual"):
            call(name, values | {"residual": residual[:1]})


@pytest.mark.parametrize("split", [None, [0, 3]])
def test_operators_with_several_results_pass_through_torch_onnx(split: list[int] | None) -> None:
    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            columns = None if split is None else torch.tensor(split)
            xq, kept = OPS.rms_norm_quantize(x, 1e-5, torch.tensor([0.02]), None, columns)
            return (xq,) if split is None else (xq, kept)

    x = torch.randn(2, 3, 8)
    exported = torch.export.export(Norm(), (x,))
    table = translation_table()
    program = torch.onnx.export(
        exported, dynamo=True, opset_version=21, custom_translation_table=table, verbose=False
    )
    model = program.model_proto
    attach_functions(model)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    made = [
        torch.from_numpy(v) for v in session.run(None, {session.get_inputs()[0].name: x.numpy()})
    ]
    want = Norm()(x)
    assert len(made) == len(want)
    assert_quantized_alike(made[0], want[0])
    for left, right in zip(made[1:], want[1:], strict=True):
        torch.testing.assert_close(left, right)


def test_shape_functions_and_schemas() -> None:
    form, split = modality_of("mask", 2, 3), torch.tensor([1, 2])
    for chosen in (None, split):
        args = (torch.randn(2, 3, 24), 1e-6, scale_of("mask"), form, chosen, True)
        torch.library.opcheck(OPS.rms_norm_quantize.default, args)
        more = (torch.randn(2, 3, 48), "silu", True, 12, scale_of("mask"), form, chosen)
        torch.library.opcheck(OPS.activation_quantize.default, more)
    for packed, spare in ((False, None), (True, 3)):
        values = attention_values("half", packed, spare=spare)
        torch.library.opcheck(
            OPS.attention.default,
            tuple(values.values()),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_errors_name_the_argument() -> None:
    x, scale = torch.randn(2, 3, 9), torch.tensor([0.1])
    with pytest.raises(UsageError, match="unknown activation 'swish'"):
        OPS.activation_quantize(x, "swish", False, 1, scale, None, None)
    with pytest.raises(UsageError, match="even last axis"):
        OPS.activation_quantize(x, "silu", True, 1, scale, None, None)
    values = attention_values("half", False)
    for change, message in (
        ({"rotary": "none"}, "rotary"),
        ({"k": None}, "come together"),
        ({"q": values["q"][:, :, :5]}, "divide the query heads"),
        ({"past": torch.tensor([40]), "mask": torch.ones(2, 1, 3, 43).bool()}, "past rows"),
        ({"mask": values["mask"][..., :5]}, "mask of 5 columns"),
    ):
        with pytest.raises(UsageError, match=message):
            call("attention", values | change)
