"""Operator calls that are wrong, or empty, through onnxruntime: errors, never a crash."""

from __future__ import annotations

import native_library as native
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from malformed_calls import check_malformed_shapes, without_rows
from operator_calls import arguments, feeds, model_of

pytestmark = native.needs_library

FUZZED = [
    "LinearW4A8_mask_bias_split_residual",
    "LinearW4A8_count_bias_group_s8",
    "LinearW4A8_odd",
    "LinearW8A8_split_group",
    "LinearW4A8_mask_bias_split_group_c16k4",
    "LinearW8A8_residual_s8_c16k4",
    "LinearW4A16_bias_split_residual_c16k4",
    "QuantizeStatic_mask",
    "QuantizeStatic_count_u8",
    "RmsNormQuantize_count_split",
    "ActivationQuantize_silu_gated_f2_mask_u8_split",
    "Hadamard_f2",
    "EmbeddingW8",
    "RankUpdate",
    "Attention_half",
    "Attention_packed_interleaved_partial",
    "AttentionInt8_half",
    "AttentionInt8_packed_interleaved_partial",
    "AttentionFull_mask",
    "AttentionFull_packed_mask_half_partial",
]
VALID = {
    # What a mutation may leave valid: other rows or columns where nothing else fixes their number,
    # other groups that divide 24 channels as well, and caches and masks with more rows.
    "LinearW4A8_count_bias_group_s8": ("xq", "w_scale"),
    "LinearW4A8_odd": ("xq",),
    "LinearW8A8_split_group": ("w_scale",),
    "QuantizeStatic_mask": ("x",),
    "QuantizeStatic_count_u8": ("x",),
    "RmsNormQuantize_count_split": ("x", "split"),
    "ActivationQuantize_silu_gated_f2_mask_u8_split": ("split",),
    "Hadamard_f2": ("x",),
    "EmbeddingW8": ("ids", "qweight"),
    "Attention_half": ("mask", "key_cache", "value_cache", "cos", "past"),
    "Attention_packed_interleaved_partial": ("mask", "key_cache", "value_cache", "cos", "past"),
    "AttentionInt8_half": ("mask", "cos", "past"),
    "AttentionInt8_packed_interleaved_partial": ("mask", "cos", "past"),
    "AttentionFull_mask": ("mask", "v"),
    "AttentionFull_packed_mask_half_partial": ("mask", "q"),
}


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    return native.session(model.SerializeToString(), native=True)


@pytest.mark.parametrize("op_type", FUZZED)
def test_malformed_shapes_are_errors(op_type: str, rng: np.random.Generator) -> None:
    valid = VALID.get(op_type, ())
    check_malformed_shapes(op_type, arguments(op_type, rng), session, valid)


@pytest.mark.parametrize("op_type", FUZZED)
def test_wrong_types_are_errors(op_type: str, rng: np.random.Generator) -> None:
    values = arguments(op_type, rng)
    for name, value in values.items():
        other = np.float64 if value.dtype == np.float32 else np.float32
        calls = {op_type: {**values, name: value.astype(other)}}
        with pytest.raises(Exception, match="(?i)type"):
            session(model_of(calls))


@pytest.mark.parametrize("axis", [0, 1], ids=["no sequences", "no tokens"])
@pytest.mark.parametrize("op_type", FUZZED)
def test_no_rows(op_type: str, axis: int, rng: np.random.Generator) -> None:
    calls = {op_type: without_rows(op_type, arguments(op_type, rng), axis)}
    assert session(model_of(calls)).run(None, feeds(calls))[0].size == 0


@pytest.mark.parametrize(
    ("op_type", "name", "value", "message"),
    [
        ("QuantizeStatic_count", "modality", np.array([1, -1]), "counts -1 visual rows of 3"),
        ("LinearW4A8_count", "modality", np.array([4, 1]), "counts 4 visual rows of 3"),
        ("RmsNormQuantize_split", "split", np.array([20]), "split names column 20 of 20"),
        ("RmsNormQuantize_split", "split", np.array([-1]), "split names column -1"),
        ("EmbeddingW8", "ids", np.array([[10]]), "id 10 is not one of 10"),
        ("Attention", "past", np.array([-1]), "past is -1"),
        ("Attention", "past", np.array([2**62]), "past is 46"),
        ("Attention", "past", np.array([5]), "columns"),
    ],
)
def test_values_out_of_range(
    op_type: str, name: str, value: np.ndarray, message: str, rng: np.random.Generator
) -> None:
    calls = {op_type: {**arguments(op_type, rng), name: value}}
    made = session(model_of(calls))
    with pytest.raises(Exception, match=message):
        made.run(None, feeds(calls))


def test_constants_must_be_constants(rng: np.random.Generator) -> None:
    calls = {"LinearW8A8": arguments("LinearW8A8", rng)}
    model = model_of(calls, constants=())
    with pytest.raises(Exception, match=r"qweight .* has to be an initializer"):
        session(model)


@pytest.mark.parametrize("bad", ["not orthogonal", "not sylvester", "scale", "not square"])
def test_wrong_factors(bad: str, rng: np.random.Generator) -> None:
    values = arguments("Hadamard_f2", rng)
    last = values["factor1"]
    if bad == "not orthogonal":
        values["factor0"] = values["factor0"] * np.float32(2) + np.eye(12, dtype=np.float32)
    elif bad == "not sylvester":
        values["factor1"] = last[::-1].copy()
    elif bad == "scale":
        values["factor1"] = last * np.float32(2)
    else:
        values["factor1"] = last[:1].copy()
    with pytest.raises(Exception, match="Hadamard_f2"):
        session(model_of({"Hadamard_f2": values}))
