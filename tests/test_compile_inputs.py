"""What is wrong in a user's files is said before a compile does anything that takes time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mqc
from mqc.errors import MqcError
from mqc.models import embedded_model_path


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def not_yet(*args: Any, **options: Any) -> None:
        pytest.fail("the model was captured first")

    monkeypatch.setattr("mqc.compiler.capture", not_yet)
    return Path(shutil.copytree(embedded_model_path("tiny-llava"), tmp_path / "mine"))


def refused(checkpoint: Path, cause: str, **options: Any) -> None:
    out = checkpoint.parent / "artifact"
    with pytest.raises(MqcError, match=cause) as info:
        mqc.compile(checkpoint, out=out, **options)
    assert info.value.hint
    assert not out.exists()


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer or processor"),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer"),
        (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template"),
        (
            lambda f: [path.unlink() for path in f.glob("*processor_config.json")],
            "has no image processor",
        ),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "'bert' is not an"),
    ],
)
def test_files_of_the_model(checkpoint: Path, damage: Callable[[Path], Any], cause: str) -> None:
    damage(checkpoint)
    refused(checkpoint, cause, scheme="float")


def test_calibration_data(checkpoint: Path) -> None:
    refused(checkpoint, "needs calibration data")
    refused(checkpoint, "does not exist", calibration="nowhere.jsonl")
    (checkpoint / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n[')
    refused(checkpoint, "line 2 of rows.jsonl is not JSON", calibration=checkpoint / "rows.jsonl")


def test_schemes_by_name() -> None:
    for call in (mqc.compile, mqc.plan):
        with pytest.raises(MqcError, match="unknown scheme 'w4a9'"):
            call("tiny-llava", scheme="w4a9")
