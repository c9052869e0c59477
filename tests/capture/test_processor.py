"""Processors: what goes in and out, without torchvision too, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mqc.capture import adapter_for, load_processor, processor_files
from mqc.errors import CheckpointError, UsageError
from mqc.models import EMBEDDED, embedded_model_path


def picture(*size: int) -> Image.Image:
    return Image.new("RGB", size, (30, 90, 200))


@pytest.fixture(params=sorted(EMBEDDED))
def name(request: pytest.FixtureRequest) -> str:
    value: str = request.param
    return value


def test_files_make_another_folder(name: str, tmp_path: Path) -> None:
    source = embedded_model_path(name)
    for path in processor_files(source):
        shutil.copy(path, tmp_path / path.relative_to(source))
    assert not list(tmp_path.glob("*.safetensors"))
    images = [picture(64, 64), picture(90, 40)]
    first = load_processor(source).prompt("what?", images)
    second = load_processor(tmp_path).prompt("what?", images)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert adapter_for(tmp_path).image_token_id == adapter_for(source).image_token_id


def test_calls_cover_the_image_tokens(name: str) -> None:
    folder = embedded_model_path(name)
    batch = load_processor(folder).prompt("what?", [picture(64, 64), picture(200, 60)])
    adapter = adapter_for(folder)
    calls = adapter.vision_calls(batch)
    assert len(calls) == 2
    assert torch.equal(torch.cat([call["pixel_values"] for call in calls]), batch["pixel_values"])
    positions, following = adapter.position_ids(batch["input_ids"][0], batch)
    assert positions.shape[-1] == batch["input_ids"].shape[1]
    assert following == int(positions.max()) + 1


def test_text_only_and_decode(name: str) -> None:
    processor = load_processor(embedded_model_path(name))
    batch = processor.prompt("what is it?")
    assert "pixel_values" not in batch
    assert "what is it?" in processor.decode(batch["input_ids"][0])


def test_batch_is_padded(name: str) -> None:
    processor = load_processor(embedded_model_path(name))

    def chat(text: str) -> list[dict[str, Any]]:
        content = [{"type": "image", "image": picture(64, 64)}, {"type": "text", "text": text}]
        return [{"role": "user", "content": content}]

    batch = processor.encode([chat("a"), chat("what is at the top left?")])
    assert batch["input_ids"].shape[0] == 2
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()


@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-internvl"])
def test_video_part_without_torchvision(name: str) -> None:
    processor = load_processor(embedded_model_path(name))
    assert not processor.image_only
    assert processor.hf.video_processor.size == processor.hf.image_processor.size
    content = [{"type": "video", "video": "a.mp4"}]
    with pytest.raises(UsageError, match="not made here"):
        processor.encode([{"role": "user", "content": content}])


def test_missing_files(name: str, tmp_path: Path) -> None:
    for pattern, message in (
        ("tokenizer.json", "no tokenizer"),
        ("*processor_config.json", "no image processor"),
        ("config.json", "no config.json"),
    ):
        folder = Path(shutil.copytree(embedded_model_path(name), tmp_path / message))
        for path in folder.glob(pattern):
            path.unlink()
        with pytest.raises(CheckpointError, match=message) as info:
            load_processor(folder)
        assert info.value.hint


def test_damaged_tokenizer(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded_model_path(name), tmp_path / "model"))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_processor(folder)


def test_no_chat_template(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(embedded_model_path("tiny-llava"), tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="chat template"):
        load_processor(folder).prompt("what?")


def test_missing_image(name: str) -> None:
    with pytest.raises(UsageError, match="refused"):
        load_processor(embedded_model_path(name)).prompt("what?", ["no-such-image.png"])
