"""A checkpoint that brings its own code: refused, or, where allowed, on the road of all others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny

import mqc
from mqc.capture import probe
from mqc.errors import CheckpointError
from mqc.models import embedded_model_path

CONFIGURATION = """\
from transformers import InternVLConfig


class RemoteConfig(InternVLConfig):
    model_type = "remote_internvl"
"""
MODEL = """\
from transformers import InternVLForConditionalGeneration

from .configuration_remote import RemoteConfig


class RemoteModel(InternVLForConditionalGeneration):
    config_class = RemoteConfig
"""


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiny-internvl under another model type, its classes in files of the checkpoint."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "remote"
    shutil.copytree(embedded_model_path("tiny-internvl"), folder)
    (folder / "configuration_remote.py").write_text(CONFIGURATION)
    (folder / "modeling_remote.py").write_text(MODEL)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "remote_internvl"
    config["auto_map"] = {
        "AutoConfig": "configuration_remote.RemoteConfig",
        "AutoModelForImageTextToText": "modeling_remote.RemoteModel",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_is_not_run_unasked(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        mqc.capture(checkpoint)
    assert "--trust-remote-code" in str(caught.value.hint)
    with pytest.raises(CheckpointError):
        probe(checkpoint)


def test_the_same_road_where_allowed(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    mqc.compile(checkpoint, target="onnx", scheme="float", out=out, trust_remote_code=True)
    messages = tiny.conversations()["images"]
    with pytest.raises(CheckpointError, match="brings its own code"):
        mqc.load(out)
    answer = mqc.load(out, trust_remote_code=True).generate(messages, max_new_tokens=6)
    expected = tiny.runnable("tiny-internvl").generate(messages, max_new_tokens=6)
    assert answer.tokens == expected.tokens
