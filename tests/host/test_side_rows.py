"""Towers that feed the decoder in several places: rows side by side, zeros for text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from programs import captured

from mqc.capture import adapter_for
from mqc.host import ProgramEngine, make_batch, merge, spread
from mqc.testing.families import FAMILIES, build_family
from mqc.testing.families.run import family_prompt, family_samples

SIDE = ["deepstack_0", "deepstack_1"]


def test_wide_rows_are_taken_apart() -> None:
    rows = torch.arange(24.0).reshape(1, 2, 12)
    parts = spread(rows, SIDE, 4)
    assert list(parts) == ["inputs_embeds", *SIDE]
    assert torch.equal(torch.cat(list(parts.values()), dim=-1), rows)


def test_narrow_rows_have_zeros_beside_them() -> None:
    rows = torch.randn(2, 1, 4)
    parts = spread(rows, SIDE, 4)
    assert torch.equal(parts["inputs_embeds"], rows)
    assert all(parts[name].shape == rows.shape and not parts[name].any() for name in SIDE)
    assert list(spread(rows, [], 4)) == ["inputs_embeds"]


def test_a_wrong_number_of_side_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        spread(torch.zeros(1, 1, 8), SIDE, 4)


def test_text_rows_of_a_merged_batch_are_zero_beside_the_embeddings() -> None:
    program = captured("qwen3_vl")
    assert program.facts["deepstack"] == SIDE
    model, _ = build_family("qwen3_vl")
    adapter = adapter_for(model.config)
    samples = family_samples(FAMILIES["qwen3_vl"], model.config, torch.float32, 4)
    prompts = [family_prompt(adapter, sample) for sample in samples]
    batch = make_batch(prompts, "left")
    merged = merge(ProgramEngine(program), prompts, batch)
    assert merged.shape[-1] == 3 * 48
    beside = merged[..., 48:].abs().sum(-1)
    assert torch.equal(beside > 0, batch.visual_mask)


def test_prompts_without_images_stay_narrow() -> None:
    class Recording(ProgramEngine):
        def _call(self, name: str, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            seen.append((name, dict(inputs)))
            return super()._call(name, inputs)

    seen: list[tuple[str, dict[str, Any]]] = []
    engine = Recording(captured("qwen3_vl"))
    prompt = family_prompt(
        adapter_for(FAMILIES["qwen3_vl"].config()),
        {"input_ids": torch.tensor([[1, 30, 31]])},
    )
    merged = merge(engine, [prompt], make_batch([prompt]))
    assert merged.shape[-1] == 48 and [name for name, _ in seen] == ["embed"]
