"""Prompts from chat messages: what is built, and what is refused with a clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from mqc.errors import UsageError
from mqc.host import Prompt, append_answer, build_prompts, generate, messages_from
from mqc.host.images import open_image


@pytest.mark.parametrize("name", tiny.NAMES)
def test_fields(name: str) -> None:
    run = tiny.runnable(name)
    kinds = tiny.conversations()
    prompts = build_prompts(list(kinds.values()), run.processor, run.adapter)
    for kind, prompt in zip(kinds, prompts, strict=True):
        size = len(prompt)
        assert prompt.input_ids.shape == prompt.visual_mask.shape == (size,)
        assert prompt.input_ids.dtype == torch.int64 and prompt.visual_mask.dtype == torch.bool
        assert prompt.position_ids.shape[-1] == size
        assert prompt.next_position == int(prompt.position_ids.max()) + 1
        images = {"text": 0, "image": 1, "images": 2, "interleaved": 2, "last": 1}[kind]
        assert len(prompt.vision_calls) == images
        rows = sum(run.engine.vision(call).shape[0] for call in prompt.vision_calls)
        assert rows == int(prompt.visual_mask.sum())


def test_paths_pil_arrays_and_bytes_are_the_same(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    places: list[Any] = [image, tmp_path / "a.png", str(tmp_path / "a.png"), data]
    places += [f"file://{tmp_path}/a.png", np.asarray(image)]
    for place in places:
        assert open_image(place).tobytes() == image.tobytes()
    assert open_image("a.png", tmp_path).tobytes() == image.tobytes()
    assert open_image(Image.new("RGBA", (2, 3))).mode == "RGB"


def test_append_answer_continues_positions() -> None:
    for positions in (torch.arange(3), torch.arange(3).expand(3, 3)):
        prompt = Prompt(torch.tensor([7, 8, 9]), torch.ones(3, dtype=torch.bool), positions, 5)
        longer = append_answer(prompt, [1, 2])
        assert longer.input_ids.tolist() == [7, 8, 9, 1, 2]
        assert longer.visual_mask.tolist() == [True] * 3 + [False] * 2
        assert longer.position_ids.reshape(-1, 5)[-1].tolist() == [0, 1, 2, 5, 6]
        assert longer.next_position == 7 and len(prompt) == 3


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("size", [(1, 1), (4000, 100), (1, 64), (3, 1)])
def test_odd_image_sizes(name: str, size: tuple[int, int]) -> None:
    run = tiny.runnable(name)
    prompt = run.prompt(prompt="what ?", images=[Image.new("RGB", size, (9, 90, 200))])
    assert torch.isfinite(run.engine.vision(prompt.vision_calls[0])).all()
    assert len(generate(run.engine, prompt, max_new_tokens=2, stop=()).tokens) == 2


def test_what_the_processor_refuses_is_named() -> None:
    """Qwen2-VL takes no picture more than 200 times as wide as high."""
    run = tiny.runnable("tiny-qwen2-vl")
    with pytest.raises(UsageError, match=r"image sizes: 5000x10\): absolute aspect ratio"):
        run.prompt(prompt="what ?", images=[Image.new("RGB", (5000, 10))])


def test_system_and_assistant_turns() -> None:
    run = tiny.runnable("tiny-qwen2-vl")
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what ?"},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": "where ?"},
    ]
    text = run.prompt(chat).text
    assert text.index("be brief") < text.index("what ?") < text.index("red") < text.index("where ?")


IMAGE = Image.new("RGB", (64, 64))
USER = {"role": "user"}


@pytest.mark.parametrize(
    ("messages", "cause"),
    [
        ([], "empty"),
        ("what ?", "must be a list"),
        ([{"content": "a"}], "must have 'role' and 'content'"),
        ([{**USER, "content": 3}], "text or a list"),
        ([{**USER, "content": [{"type": "image"}]}], "names no image"),
        ([{**USER, "content": [{"type": "audio", "audio": "a.wav"}]}], "not supported"),
        ([{**USER, "content": [{"type": "video", "video": "a.mp4"}]}], "video"),
        ([{**USER, "content": [{"type": "image", "image": "gone.png"}]}], "'gone.png' does not"),
        ([{**USER, "content": [{"type": "image", "image": "http://a/b.png"}]}], "network"),
        ([{**USER, "content": [{"type": "image", "image": 3}]}], "type int"),
        ([{**USER, "content": [{"type": "image", "image": b"nonsense"}]}], "format"),
        ([{**USER, "content": [{"type": "image", "image": "/"}]}], "folder"),
    ],
)
def test_bad_messages(messages: Any, cause: str) -> None:
    run = tiny.runnable("tiny-llava")
    with pytest.raises(UsageError, match=cause):
        run.prompt(messages)


def test_truncated_image(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match=r"half\.png' cannot be read"):
        open_image(tmp_path / "half.png")


@pytest.mark.parametrize("name", tiny.NAMES)
def test_placeholders_must_match_images(name: str) -> None:
    run = tiny.runnable(name)
    token = run.processor.hf.image_token
    for images in ([], [IMAGE]):
        with pytest.raises(UsageError, match="image placeholders"):
            run.prompt(prompt=f"what is {token} ?", images=images)


def test_rows_must_match_image_tokens() -> None:
    run = tiny.runnable("tiny-llava")
    prompt = run.prompt(prompt="what ?", images=[IMAGE])
    doubled = Prompt(
        prompt.input_ids,
        prompt.visual_mask,
        prompt.position_ids,
        prompt.next_position,
        prompt.vision_calls * 2,
    )
    with pytest.raises(UsageError, match="64 image tokens, but its 2 images give 128 rows"):
        generate(run.engine, doubled)


def test_messages_or_prompt() -> None:
    run = tiny.runnable("tiny-llava")
    with pytest.raises(UsageError, match="either"):
        run.prompt()
    with pytest.raises(UsageError, match="either"):
        run.prompt(messages_from("a"), prompt="a")
    with pytest.raises(UsageError, match="go into the messages"):
        run.prompt(messages_from("a"), images=[IMAGE])
    one = run.prompt(prompt="a", images=IMAGE)  # type: ignore[arg-type]
    assert len(one.vision_calls) == 1


def test_stream_and_generate_agree() -> None:
    run = tiny.runnable("tiny-qwen2-vl")
    pieces: list[str] = []
    result = run.generate(prompt="what ?", images=[IMAGE], max_new_tokens=5, on_text=pieces.append)
    assert "".join(pieces) == result.text
    assert "".join(run.stream(prompt="what ?", images=[IMAGE], max_new_tokens=5)) == result.text
    batch = run.generate_batch([messages_from("what ?", [IMAGE])] * 2, max_new_tokens=5)
    assert [one.tokens for one in batch] == [result.tokens] * 2
    with pytest.raises(UsageError):
        run.stream(prompt="what ?", images=["gone.png"])
