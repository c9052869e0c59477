"""Targets by name, and targets of other packages."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from mqc.artifact import ArtifactWriter
from mqc.backends import registry
from mqc.backends.reference import ReferenceTarget
from mqc.backends.registry import Target, get_target, load_artifact, target_names
from mqc.errors import TargetError, UsageError


class Absent(ReferenceTarget):
    """A target that cannot run here."""

    name = "absent"

    def available(self) -> str | None:
        return "its device is missing"


def plugin(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = EntryPoint(name, value, registry.GROUP)
    monkeypatch.setattr(registry, "_plugins", lambda: {name: point})


def test_reference_is_there() -> None:
    target = get_target("reference")
    assert isinstance(target, Target) and target.name == "reference"
    assert target.available() is None and target.description
    assert {"reference", "onnx", "cuda"} <= set(target_names())


def test_every_built_in_target_is_complete() -> None:
    for name in registry.BUILTIN:
        target = get_target(name)
        assert target.name == name and target.description and target.dialect


def test_unknown_target() -> None:
    with pytest.raises(UsageError, match="unknown target 'tpu'") as caught:
        get_target("tpu")
    assert "reference, onnx, cuda" in str(caught.value.hint)


def test_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(monkeypatch, "absent", f"{ReferenceTarget.__module__}:ReferenceTarget")
    assert get_target("absent").dialect == "quantized" and target_names()[-1] == "absent"
    for value in ("no.such.module:Thing", "pathlib:NoSuchName"):
        plugin(monkeypatch, "broken", value)
        with pytest.raises(TargetError, match=r"'broken' .*cannot be imported"):
            get_target("broken")
    plugin(monkeypatch, "wrong", "pathlib:Path")
    with pytest.raises(TargetError, match="lacks a part"):
        get_target("wrong")


def test_artifact_of_an_absent_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ArtifactWriter(tmp_path / "a") as writer:
        writer.describe(target="absent")
    with pytest.raises(UsageError, match="unknown target 'absent'"):
        load_artifact(tmp_path / "a")
    monkeypatch.setattr(registry, "get_target", lambda name: Absent())
    with pytest.raises(TargetError, match="'absent': its device is missing"):
        load_artifact(tmp_path / "a")
