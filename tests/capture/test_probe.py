"""``probe`` reports what was found, and why something could not be captured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from mqc.capture import probe
from mqc.capture.adapters.features import FeatureLayers
from mqc.commands.inspect import fold_skips
from mqc.probing import probe as analysed_probe
from mqc.testing.families import build_family


def test_report() -> None:
    model, _ = build_family("qwen2_vl")
    report = probe(model)
    assert report.captured
    assert report.layers == {"vision": 2, "language": 2}
    assert report.modalities == ["text", "image", "video"]
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert [item.name for item in report.components] == ["vision", "embed", "decoder"]
    vision, embed, decoder = report.components
    assert "pixel_values: f32[4*blocks, 96]" in vision.inputs
    assert embed.parameters == 96 * 48
    assert decoder.operators["aten.scaled_dot_product_attention.default"] == 2
    assert json.loads(json.dumps(report.to_json()))["captured"] is True


def test_what_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def depends_on_data(
        self: FeatureLayers, model: PreTrainedModel, *inputs: torch.Tensor
    ) -> torch.Tensor:
        return inputs[0][: int(inputs[0].sum())]

    monkeypatch.setattr(FeatureLayers, "image_embeds", depends_on_data)
    report = probe(build_family("llava")[0])
    assert not report.captured
    assert [item.captured for item in report.components] == [False, True, True]
    assert "vision component" in str(report.components[0].reason)


def test_incomplete_weights(tmp_path: Path) -> None:
    build_family("internvl")[0].save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("lm_head.weight"))]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    report = probe(tmp_path)
    assert all(item.captured for item in report.components)
    assert "lm_head.weight" in str(report.weights)


def test_damaged_weights_are_reported(tmp_path: Path) -> None:
    build_family("internvl")[0].save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    report = probe(tmp_path)
    assert all(item.captured for item in report.components) and not report.captured
    assert "truncated or damaged" in str(report.weights)
    path.unlink()
    report = probe(tmp_path)
    assert report.captured and report.weights is None and not report.weights_here


def test_probe_downloads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_family("internvl")[0].save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    asked: list[list[str]] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("mqc.capture.locate.snapshot_download", download)
    assert probe("owner/name").captured
    assert asked and all("*.safetensors" not in patterns for patterns in asked)


def test_a_language_model_that_does_not_fit_is_reported() -> None:
    """What was captured is in the report all the same, and the reason for the rest."""
    model, _ = build_family("llava")
    model.config.text_config.layer_types = ["full_attention", "chunked_attention"]
    report = probe(model)
    assert [item.captured for item in report.components] == [True, True, False]
    assert "chunked_attention" in str(report.components[2].reason)


def test_what_rotation_leaves_is_reported_by_reason() -> None:
    report = analysed_probe(build_family("glm4v")[0])
    skips = report.analyses["skips"]
    assert sum("gain of a norm that writes the stream" in skip for skip in skips) == 4
    lines = fold_skips(skips)
    assert len(lines) < len(skips) and any(line.endswith("(4 times)") for line in lines)
