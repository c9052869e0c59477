"""Target cuda: registered, lowers, and says clearly what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx_cases import float_program

from mqc.artifact import ArtifactWriter
from mqc.backends.registry import Target, get_target
from mqc.errors import ArtifactError, TargetError
from mqc.ir import verify


def test_registered() -> None:
    target = get_target("cuda")
    assert isinstance(target, Target)
    assert "not available in this build" in str(target.available())
    assert "--target onnx" in str(target.available())


def test_lowering_gives_a_legal_copy() -> None:
    target, program = get_target("cuda"), float_program("llava")
    lowered = target.lower(program)
    assert lowered is not program
    lowered.dialect = target.dialect
    verify(lowered)


def test_emit_and_load_say_what_to_do(tmp_path: Path) -> None:
    target, program = get_target("cuda"), float_program("llava")
    with pytest.raises((TargetError, ArtifactError)) as caught, ArtifactWriter(tmp_path / "a") as w:
        target.emit(target.lower(program), w)
    assert isinstance(caught.value, TargetError)
    assert "not available in this build" in caught.value.message
    assert not (tmp_path / "a").exists()
    with pytest.raises(TargetError, match="not available in this build") as caught:
        target.load(tmp_path)
    assert caught.value.hint == "use --target onnx or --target reference"
