"""Recipes, overrides and component flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mqc.config import apply, component_override, make_recipe, parse_override, shipped_recipes
from mqc.errors import UsageError
from mqc.spec import named_scheme


def test_without_anything_it_is_w4a8() -> None:
    assert make_recipe().scheme == named_scheme("w4a8")
    assert make_recipe("float").scheme == named_scheme("float")


def test_later_sources_win(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: w8a8\nname: mine\ndecoder: {weights: {bits: 4, group_size: 32}}\n")
    plain = make_recipe(recipe=path).scheme
    assert (plain.name, plain.component("decoder").label) == ("mine", "W4g32A8")
    assert plain.component("vision") == named_scheme("w8a8").component("vision")
    forced = make_recipe("w4a8-all", path, ["decoder.weights.bits=3", "seed=7"]).scheme
    assert forced.component("vision").label == "W4A8"
    assert forced.component("decoder").label == "W3g32A8"
    assert forced.seed == 7


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid(name: str) -> None:
    assert make_recipe(recipe=name).scheme.name == name


def test_the_baseline_recipe_turns_everything_off() -> None:
    scheme = make_recipe(recipe="rtn-static").scheme
    assert scheme.describe() == "vision W8A8, decoder W4A8"
    assert {c.weights.method for c in scheme.components.values()} == {"rtn"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("decoder.weights.bits=3", {"decoder": {"weights": {"bits": 3}}}),
        ("rotate=false", {"rotate": False}),
        ("decoder.head=null", {"decoder": {"head": None}}),
        ("decoder.weights.group_size=none", {"decoder": {"weights": {"group_size": None}}}),
        ("name=a=b", {"name": "a=b"}),
        ("vision.weights={bits: 4}", {"vision": {"weights": {"bits": 4}}}),
    ],
)
def test_overrides_are_parsed(text: str, expected: dict[str, Any]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["rotate", "=3", "a..b=3", "a.=1", "x=["])
def test_malformed_overrides(text: str) -> None:
    with pytest.raises(UsageError, match="override"):
        parse_override(text)


def test_short_forms() -> None:
    scheme = make_recipe(
        overrides=[
            "quantize_head=true",
            "decoder.head.bits=4",
            "quantize_embeddings=true",
            "weights.method=rtn",
            "activations.observer=mse",
        ]
    ).scheme
    head = scheme.component("decoder").head
    assert head is not None
    assert head.bits == 4
    assert scheme.quantize_embeddings
    for name in ("vision", "decoder"):
        assert scheme.component(name).weights.method == "rtn"
        assert scheme.component(name).activations.observer == "mse"
    off = apply(scheme, {"quantize_head": False, "msq": False, "aifs": False})
    assert not off.quantize_head
    assert not off.msq


@pytest.mark.parametrize(
    ("label", "expected"),
    [("w3g64a8", "W3g64A8"), ("W4A8", "W4A8"), ("w4a16", "W4A16"), ("float", "float")],
)
def test_component_labels(label: str, expected: str) -> None:
    for component in ("vision", "decoder"):
        scheme = make_recipe(overrides=[component_override(component, label)]).scheme
        assert scheme.component(component).label == expected
        assert scheme.aifs == (component == "vision" or label.lower().endswith("a8"))


@pytest.mark.parametrize("label", ["w5a8", "w4", "4", "w4a4", "w4ga8"])
def test_wrong_component_labels(label: str) -> None:
    with pytest.raises(UsageError, match="is no bit setting"):
        component_override("vision", label)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[1]", "must be a mapping", "base: w4a8"),
        ("base: [", "not valid YAML", None),
        ("base: w4a9", "unknown scheme 'w4a9'", "'w4a8'"),
        ("decodr: {}", "unknown key 'decodr'", "'decoder'"),
        ("decoder: {weight: {}}", "decoder.weight'", "'weights'"),
        ("decoder: 4", "components.decoder must be a mapping", None),
        ("passes: a:B", "'passes' must be a list", "MyPass"),
        ("msq: 3", "per_modality must be true or false", None),
        ("quantize_head: 8", "quantize_head must be true or false", None),
        ("", "must be a mapping", None),
    ],
)
def test_wrong_recipes(tmp_path: Path, text: str, message: str, hint: str | None) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        make_recipe(recipe=path)
    assert message in caught.value.message
    if hint is not None:
        assert hint in (caught.value.hint or "")


def test_missing_and_binary_recipes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file") as caught:
        make_recipe(recipe="nowhere.yaml")
    assert "rtn-static" in (caught.value.hint or "")
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a text file"):
        make_recipe(recipe=path)


def test_recipe_passes(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("passes: [my_pkg.my_mod:MyPass]\n")
    assert make_recipe(recipe=path).passes == ("my_pkg.my_mod:MyPass",)
