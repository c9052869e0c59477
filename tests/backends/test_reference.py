"""The reference target: an artifact of a program answers as the program does."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from mqc.artifact import ArtifactWriter, check_files
from mqc.backends.reference import ReferenceTarget
from mqc.backends.reference.target import parameter_bytes
from mqc.backends.registry import load_artifact
from mqc.errors import ArtifactError, VerificationError
from mqc.host import prefill
from mqc.models import embedded_model_path


def emit(name: str, path: Path) -> None:
    target, program = ReferenceTarget(), tiny.program(name)
    with ArtifactWriter(path) as writer:
        target.emit(target.lower(program), writer)
        writer.copy_model_files(embedded_model_path(name))
        writer.describe(target=target.name, facts=program.facts, history=program.history)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_artifact_answers_as_the_program(name: str, tmp_path: Path) -> None:
    emit(name, tmp_path / "a")
    loaded, direct = load_artifact(tmp_path / "a"), tiny.runnable(name)
    assert loaded.manifest == check_files(tmp_path / "a")
    prompts = [direct.prompt(messages) for messages in tiny.conversations().values()]
    again = [loaded.prompt(messages) for messages in tiny.conversations().values()]
    for one, other in zip(prompts, again, strict=True):
        assert one.input_ids.equal(other.input_ids)
    expected = prefill(direct.engine, prompts).logits
    assert prefill(loaded.engine, again).logits.equal(expected)
    messages = tiny.conversations()["images"]
    answer = direct.generate(messages, max_new_tokens=4)
    assert loaded.generate(messages, max_new_tokens=4).tokens == answer.tokens


def test_twice_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        emit("tiny-llava", tmp_path / name)
    assert check_files(tmp_path / "one") == check_files(tmp_path / "two")


def test_a_damaged_artifact_is_not_loaded(tmp_path: Path) -> None:
    emit("tiny-llava", tmp_path / "a")
    file = tmp_path / "a/program/params.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"params\.safetensors .* has changed"):
        load_artifact(tmp_path / "a")


def test_engine_names_an_input_it_is_not_given() -> None:
    engine = tiny.runnable("tiny-llava").engine
    with pytest.raises(VerificationError, match="'vision' has input 'pixel_values'"):
        engine.vision({"pixels": torch.zeros(1)})


def test_parameter_bytes(tmp_path: Path) -> None:
    emit("tiny-llava", tmp_path / "a")
    written = (tmp_path / "a/program/params.safetensors").stat().st_size
    estimate = parameter_bytes(tiny.program("tiny-llava"))
    assert estimate <= written < estimate + 100_000
