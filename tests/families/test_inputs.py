"""What a processor gives, split into calls of the tower: tiles, paddings, instructions, masks."""

from __future__ import annotations

import pytest
import torch
from programs import captured

from mqc.capture import adapter_for
from mqc.errors import UsageError
from mqc.host import ProgramEngine
from mqc.passes.aifs_reorder import AifsReorder
from mqc.passes.modality_split import ModalitySplit
from mqc.testing.families import FAMILIES, build_family
from mqc.testing.families.run import engine_logits, family_prompt, family_samples, model_logits
from mqc.transform import PassContext, PassManager


def test_tiles_of_an_image_that_stands_alone_and_of_several() -> None:
    """Some processors cut only a lone image into tiles; others give its base tile alone."""
    config = FAMILIES["llava_onevision"].config()
    adapter = adapter_for(config)
    pixels, sizes = torch.randn(2, 5, 3, 16, 16), torch.tensor([[32, 32], [16, 30]])
    batch = {"pixel_values": pixels, "image_sizes": sizes}
    tiled = adapter.vision_calls(batch)
    assert [len(call["pixel_values"]) for call in tiled] == [5, 3]
    single = adapter.vision_calls({**batch, "batch_num_images": torch.tensor([2])})
    assert [len(call["pixel_values"]) for call in single] == [1, 1]
    assert [len(call["pack_index"]) for call in single] == [17, 17]  # 16 rows and a newline


def test_features_of_a_large_image_are_shrunk() -> None:
    """The row lists hold fractions where the model's own packing resizes."""
    adapter = adapter_for(FAMILIES["llava_onevision"].config())
    batch = {"pixel_values": torch.zeros(1, 5, 3, 16, 16), "image_sizes": torch.tensor([[32, 32]])}
    (call,) = adapter.vision_calls(batch)
    weight = call["pack_weight"]
    assert weight.shape == call["pack_index"].shape == (len(weight), 4)
    assert torch.allclose(weight.sum(1), torch.ones(len(weight)))
    assert bool(((weight > 0).sum(1) > 1).any())


def test_blank_tiles_are_left_out_and_padded_ones_refused() -> None:
    adapter = adapter_for(FAMILIES["idefics3"].config())
    pixels = torch.randn(2, 3, 3, 16, 16)
    pixels[0, 2] = 0.0
    mask = torch.ones(2, 3, 16, 16, dtype=torch.bool)
    mask[0, 2] = False
    ids = torch.full((2, 12), 7)
    calls = adapter.vision_calls(
        {"pixel_values": pixels, "pixel_attention_mask": mask, "input_ids": ids}
    )
    assert sum(len(call["pixel_values"]) for call in calls) == 5
    mask[1, 0, 8:] = False
    with pytest.raises(UsageError, match="padded inside its tile"):
        adapter.vision_calls({"pixel_values": pixels, "pixel_attention_mask": mask})


def test_patches_of_one_merged_token_stand_together() -> None:
    adapter = adapter_for(FAMILIES["mistral3"].config())
    image = torch.arange(24.0 * 24).reshape(1, 1, 24, 24).expand(1, 3, -1, -1)
    (call,) = adapter.vision_calls({"pixel_values": image, "image_sizes": torch.tensor([[8, 16]])})
    assert call["position_ids"][:8].tolist() == [
        *([0, 0], [0, 1], [1, 0], [1, 1]),
        *([0, 2], [0, 3], [1, 2], [1, 3]),
    ]
    assert call["pixel_values"].shape == (8, 48)
    assert call["pixel_values"][1, :4].tolist() == [4.0, 5.0, 6.0, 7.0]


@pytest.mark.parametrize("name", ["gemma3", "paligemma"])
def test_aifs_keeps_attention_among_image_tokens(name: str) -> None:
    """Bidirectional blocks and windows move with their tokens; the decode steps that follow too."""
    model, _ = build_family(name)
    adapter = adapter_for(model.config)
    passes = [ModalitySplit(), AifsReorder()]
    reordered = PassManager(passes).run(captured(name), PassContext())
    samples = family_samples(FAMILIES[name], model.config, torch.float32, 4)
    prompts = [family_prompt(adapter, sample) for sample in samples]
    assert any(prompt.blocks is not None for prompt in prompts)
    plain = engine_logits(ProgramEngine(captured(name)), prompts)
    moved = engine_logits(ProgramEngine(reordered), prompts, padding="left", chunk=5)
    for sample, one, two in zip(samples, plain, moved, strict=True):
        expected = model_logits(model, sample)
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(two, expected, rtol=1e-4, atol=1e-4)


def test_a_block_changes_the_answer() -> None:
    """The comparison above would see a mask that is causal among image tokens."""
    model, _ = build_family("gemma3")
    (sample,) = family_samples(FAMILIES["gemma3"], model.config, torch.float32, 1)
    prompt = family_prompt(adapter_for(model.config), sample)
    causal = type(prompt)(**{**prompt.__dict__, "blocks": None})
    engine = ProgramEngine(captured("gemma3"))
    (one,), (two,) = engine_logits(engine, [prompt]), engine_logits(engine, [causal])
    assert (one - two).abs().max() > 1e-2
