"""Videos of every family that takes them: batches, kinds of tokens, times, and what is refused.

``test_families`` compares their logits with transformers' own, and the targets with each other.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import captured

from mqc.backends.onnx.emit import emit
from mqc.backends.onnx.lower import lower
from mqc.backends.onnx.session import OnnxEngine
from mqc.capture import adapter_for
from mqc.errors import UsageError
from mqc.host import ProgramEngine, generate_batch
from mqc.passes.aifs_reorder import AifsReorder
from mqc.passes.modality_split import ModalitySplit
from mqc.pipeline import default_passes
from mqc.spec import named_scheme
from mqc.testing.families import FAMILIES, build_family
from mqc.testing.families.chats import CHATS
from mqc.testing.families.frame import IMAGE
from mqc.testing.families.run import engine_logits
from mqc.testing.families.videos import (
    Content,
    Sample,
    film,
    noise,
    own_logits,
    text,
    video_samples,
)
from mqc.transform import PassContext, PassManager

STILL = {"type": "image", "image": noise(7)}


def sample(name: str, *content: dict[str, Any]) -> Sample:
    (found,) = video_samples(name, [list(content)])
    return found


@cache
def reordered(name: str) -> ProgramEngine:
    """The family's float program with modalities told apart and rows in AIFS order."""
    passes = [ModalitySplit(), AifsReorder()]
    return ProgramEngine(PassManager(passes).run(captured(name), PassContext()))


@pytest.mark.parametrize("name", ["glm4v", "minicpmv4_7", "llava_onevision"])
def test_a_batch_of_different_lengths(name: str) -> None:
    """Two videos, a video and an image, one frame and no video at all in one call: each as alone
    in transformers, with AIFS, padded on the left, in chunks."""
    chats: list[Content] = [
        [film(3), text("or"), film(3, 1), text("?")],
        [STILL, film(1, 2), text("which of them ?")],
        [film(1, 3, height=16, width=24), text("what ?")],
        [text("nothing to see")],
    ]
    samples = video_samples(name, chats)
    assert len({len(one.prompt) for one in samples}) == 4
    model, _ = build_family(name, torch.float64)
    prompts = [one.prompt for one in samples]
    for engine, options in (
        (ProgramEngine(captured(name)), {}),
        (reordered(name), {"padding": "left", "chunk": 7}),
    ):
        found = engine_logits(engine, prompts, **options)
        for one, logits in zip(samples, found, strict=True):
            expected = own_logits(model, one.tensors).float()
            torch.testing.assert_close(logits, expected, rtol=2e-4, atol=2e-4)
    options = {"max_new_tokens": 3, "stop": ()}
    natural = generate_batch(ProgramEngine(captured(name)), prompts, **options)
    moved = generate_batch(reordered(name), prompts, **options)
    assert [one.tokens for one in moved] == [one.tokens for one in natural]


@pytest.mark.parametrize("name", sorted(CHATS))
def test_all_rows_of_videos_are_visual(name: str) -> None:
    one = sample(name, text("a"), film(3), text("b"))
    prompt = one.prompt
    ids = one.tensors["input_ids"][0]
    token = CHATS[name].tokens
    visual = {IMAGE, token.get("<|video_pad|>", IMAGE), token.get("<video>", IMAGE)}
    assert prompt.visual_mask.tolist() == [int(number) in visual for number in ids]
    assert bool(prompt.visual_mask.any()) and prompt.visual_order is None


@pytest.mark.parametrize("name", ["qwen3_vl"])
def test_calibrated_with_videos_alone(name: str, tmp_path: Path) -> None:
    """Their rows give the visual scales; both targets answer alike, to videos and to images."""
    scheme = named_scheme("w4a8")
    prompts = [one.prompt for one in video_samples(name)[:3]]
    manager = PassManager(default_passes(scheme))
    program = manager.run(captured(name), PassContext(scheme, prompts))
    scales = [
        value
        for key, value in program.params.items()
        if "x_scale" in key and value.shape == (2,) and bool((value[0] != value[1]).any())
    ]
    assert scales, "no linear of the language model has a scale of its own for visual rows"
    lowered = lower(program)[0]
    emit(lowered, tmp_path)
    mixed = sample(name, text("a"), film(3), text("b"), STILL, text("c")).prompt
    asked = [*prompts, mixed]
    one = engine_logits(ProgramEngine(program), asked)
    two = engine_logits(OnnxEngine(tmp_path, lowered.facts), asked)
    same = [
        float((a.argmax(-1) == b.argmax(-1)).double().mean()) for a, b in zip(one, two, strict=True)
    ]
    assert min(same) >= 0.95


@pytest.mark.parametrize(
    ("name", "calls"),
    [("qwen2_vl", 3), ("qwen3_vl", 3), ("glm4v", 3), ("internvl", 5), ("llava_onevision", 1)],
)
def test_calls_of_five_frames(name: str, calls: int) -> None:
    """One call a temporal patch, a frame, or the video; an odd frame fills its patch alone."""
    one = sample(name, film(5))
    assert len(one.prompt.vision_calls) == calls
    if calls == 3:
        last = one.prompt.vision_calls[-1]["pixel_values"].unflatten(1, (3, 2, -1))
        assert torch.equal(last[:, :, 0], last[:, :, 1])
        first = one.prompt.vision_calls[0]["pixel_values"].unflatten(1, (3, 2, -1))
        assert not torch.equal(first[:, :, 0], first[:, :, 1])


def test_rows_of_images_and_videos_find_their_tokens() -> None:
    """Where they have tokens of their own, and where the image token stands for both."""
    for name in ("qwen2_vl", "glm4v"):
        prompt = sample(name, film(2), STILL, film(3, 1), STILL, text("?")).prompt
        order = prompt.visual_order
        assert order is not None and sorted(order.tolist()) == list(range(len(order)))
        kinds = adapter_for(FAMILIES[name].config()).modalities(prompt.input_ids)
        assert kinds[kinds > 0].unique_consecutive().tolist() == [2, 1, 2, 1]
        images = int((kinds == 1).sum())
        assert bool((order[kinds[kinds > 0] == 1] < images).all())
    assert sample("internvl", film(2), STILL, film(2, 1)).prompt.visual_order is None


def test_times_of_frames() -> None:
    """Positions by seconds (Qwen2.5-VL), times in words (Qwen3-VL, GLM-4V, SmolVLM)."""
    slow, fast = (sample("qwen2_5_vl", film(4, fps=fps), text("?")).prompt for fps in (1.0, 4.0))
    assert torch.equal(slow.input_ids, fast.input_ids)
    assert int(slow.position_ids[0].max() - fast.position_ids[0].max()) > 0
    assert torch.equal(slow.position_ids[1:, :-2], fast.position_ids[1:, :-2])
    for name in ("qwen3_vl", "glm4v", "smolvlm"):
        slow, fast = (sample(name, film(4, fps=fps)).prompt for fps in (0.5, 2.0))
        assert slow.input_ids.tolist() != fast.input_ids.tolist()
        assert len(slow.vision_calls) == len(fast.vision_calls)


def test_limits_of_size_hold_for_a_frame_or_for_the_video() -> None:
    size = {"height": 40, "width": 40}  # 25 tokens a frame, unless there are too many
    few, many = (sample("qwen3_vl", film(frames, **size)).prompt for frames in (2, 8))
    rows = [len(prompt.vision_calls[0]["pixel_values"]) for prompt in (few, many)]
    assert rows[0] > rows[1]
    few, many = (sample("qwen2_vl", film(frames, **size)).prompt for frames in (2, 8))
    rows = [len(prompt.vision_calls[0]["pixel_values"]) for prompt in (few, many)]
    assert rows[0] == rows[1]


def test_what_families_refuse() -> None:
    with pytest.raises(UsageError, match="'smolvlm' takes images or videos, not both"):
        sample("smolvlm", film(2), STILL)
    for name in ("llava_onevision", "internvl"):  # they take videos of one length
        refused = r"videos: 2 frames of 28x20, 3 frames of 28x20\): "
        with pytest.raises(UsageError, match=refused) as info:
            sample(name, film(2), film(3))
        assert "as many frames" in str(info.value.hint)
    wide = film(2, height=2, width=900)
    with pytest.raises(UsageError, match="absolute aspect ratio"):
        sample("qwen2_vl", wide)


def test_families_without_videos_say_so() -> None:
    for name, family in FAMILIES.items():
        adapter = adapter_for(family.config())
        assert (adapter.video_reader is not None) == (name in CHATS)
        assert adapter.video_token_id is None or name in CHATS
