"""Schemes: JSON round trips, validation, what they ask of a pipeline."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mqc.errors import UsageError
from mqc.spec import SCHEMES, ActivationSpec, ComponentScheme, Scheme, WeightSpec, named_scheme

WEIGHTS = st.builds(
    WeightSpec,
    bits=st.sampled_from([8, 4, 3, 2]),
    group_size=st.none() | st.integers(1, 512),
    method=st.sampled_from(["rtn", "gptq"]),
    clip=st.booleans(),
    act_order=st.booleans(),
    damping=st.floats(0.001, 0.5),
    blocksize=st.integers(1, 512),
)


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    msq = draw(st.booleans())
    activations = ActivationSpec(
        8, draw(st.sampled_from(["minmax", "percentile", "mse"])), 99.9, per_modality=msq
    )
    return Scheme(
        "drawn",
        {
            "vision": ComponentScheme(draw(WEIGHTS), draw(st.just(ActivationSpec()))),
            "decoder": ComponentScheme(draw(WEIGHTS), activations, draw(st.none() | WEIGHTS)),
        },
        rotate=draw(st.booleans()),
        online_hadamard=draw(st.booleans()),
        rms_suppress=draw(st.booleans()),
        aifs=msq and draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
    )


@given(schemes())
def test_json_round_trip(scheme: Scheme) -> None:
    text = json.dumps(scheme.to_json(), sort_keys=True)
    again = Scheme.from_json(json.loads(text))
    assert again == scheme
    assert json.dumps(again.to_json(), sort_keys=True) == text
    assert pickle.loads(pickle.dumps(scheme)) == scheme == copy.deepcopy(scheme)


@pytest.mark.parametrize("name", SCHEMES)
def test_named_schemes(name: str) -> None:
    scheme = named_scheme(name)
    assert scheme.name == name
    assert Scheme.from_json(scheme.to_json()) == scheme
    assert scheme.quantized == (name != "float")
    assert scheme.static_activations == name.endswith(("a8", "a8-all"))
    assert scheme.msq == scheme.aifs == scheme.static_activations
    assert not scheme.quantize_head
    assert not scheme.quantize_embeddings


def test_the_main_setting_is_the_papers() -> None:
    scheme = named_scheme("w4a8")
    assert scheme.component("vision").label == "W8A8"
    assert scheme.component("decoder").label == "W4A8"
    assert named_scheme("w4a8-all").component("vision").label == "W4A8"
    assert scheme.describe().startswith("vision W8A8, decoder W4A8, rotated")


def test_calibration_is_needed_for_static_scales_and_for_gptq() -> None:
    rtn = ComponentScheme(WeightSpec(4))
    assert not Scheme("x", {"decoder": rtn}).needs_calibration
    assert Scheme("x", {"decoder": ComponentScheme(WeightSpec(4, method="gptq"))}).needs_calibration
    static = ComponentScheme(WeightSpec(4), ActivationSpec(8))
    assert Scheme("x", {"decoder": static}).needs_calibration
    assert not named_scheme("float").needs_calibration


def test_scheme_is_frozen() -> None:
    scheme = named_scheme("w4a8")
    with pytest.raises(FrozenInstanceError):
        scheme.rotate = False  # type: ignore[misc]
    with pytest.raises(TypeError):
        scheme.components["vision"] = ComponentScheme()  # type: ignore[index]


def w4a8_with(path: str, value: Any) -> dict[str, Any]:
    data = named_scheme("w4a8").to_json()
    *parents, leaf = path.split(".")
    place = data
    for key in parents:
        place = place[key]
    place[leaf] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message", "hint"),
    [
        ("rotat", True, "unknown field 'rotat'", "did you mean 'rotate'?"),
        ("rotate", "yes", "rotate must be true or false, not 'yes'", None),
        ("seed", True, "seed must be a whole number, not True", None),
        ("seed", 1.5, "seed must be a whole number", None),
        ("rms_threshold", 0.5, "rms_threshold 0.5", "ratio above 1"),
        ("rms_threshold", float("nan"), "rms_threshold must be a number", None),
        ("components.decoder.weights.bits", 5, "weights.bits is 5", "8, 4, 3, 2"),
        ("components.decoder.weights.bits", True, "weights.bits is True", None),
        ("components.decoder.weights.bits", 4.0, "weights.bits is 4.0", None),
        ("components.decoder.weights.group_size", -1, "group size -1", "divisor"),
        ("components.decoder.weights.damping", 1, "damping 1", "0.01"),
        ("components.decoder.weights", 4, "components.decoder.weights must be a mapping", None),
        ("components.decoder.weights.metod", "rtn", "decoder.weights.metod'", "'method'"),
        ("components.decoder.activations.observer", "max", "observer is 'max'", "minmax"),
        ("components.decoder.activations.bits", 4, "activations.bits is 4", "8"),
        ("components.decoder.activations.per_modality", False, "aifs without msq", "aifs to false"),
        ("components.vision.weights.bits", None, "integer activations with float weights", None),
        ("components.vision.head", {"bits": 8}, "'vision' has no head", "decoder"),
        ("components.embed.weights.bits", 4, "embeddings as W4A16", "8-bit"),
        ("components.decodr", {}, "unknown component 'decodr'", "did you mean 'decoder'?"),
        ("format", 2, "scheme format 2", "newer"),
    ],
)
def test_wrong_values_are_named(path: str, value: Any, message: str, hint: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        Scheme.from_json(w4a8_with(path, value))
    assert message in caught.value.message
    if hint is not None:
        assert hint in (caught.value.hint or "")


def test_unknown_scheme_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown scheme 'w4a9'") as caught:
        named_scheme("w4a9")
    assert caught.value.hint == "did you mean 'w4a8'?"
    with pytest.raises(UsageError) as caught:
        named_scheme("zzz")
    assert "w8a8" in (caught.value.hint or "")
