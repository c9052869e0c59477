"""Adapters and the attention of packed vision towers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from mqc.capture import Adapter, GridAdapter, adapter_for, probe, register
from mqc.capture.adapters.registry import _REGISTRY
from mqc.capture.segments import segment_attention
from mqc.errors import CaptureError, CheckpointError
from mqc.testing.families import FAMILIES, IMAGE, build_family


def test_positions_are_those_of_the_live_model() -> None:
    model, batch = build_family("qwen2_vl")
    adapter = adapter_for(model.config)
    expected, delta = model.model.get_rope_index(
        batch["input_ids"], batch["mm_token_type_ids"], image_grid_thw=batch["image_grid_thw"]
    )
    positions, following = adapter.position_ids(batch["input_ids"][0], batch)
    assert torch.equal(positions, expected[:, 0])
    assert following == batch["input_ids"].shape[1] + int(delta)


def test_text_positions_count_up() -> None:
    for name, rows in (("qwen2_vl", 3), ("llava", 1)):
        adapter = adapter_for(FAMILIES[name].config())
        positions, following = adapter.position_ids(torch.tensor([1, 30, 31]), {})
        assert adapter.rope_axes == rows
        assert torch.equal(positions.reshape(rows, 3), torch.arange(3).expand(rows, 3))
        assert following == 3


def test_tiles_of_one_image_stay_together() -> None:
    adapter = adapter_for(FAMILIES["internvl"].config())  # 4 tokens a tile
    ids = torch.tensor([[1, *[IMAGE] * 8, 30, *[IMAGE] * 4, 31]])
    pixels = torch.randn(3, 3, 16, 16)
    calls = adapter.vision_calls({"input_ids": ids, "pixel_values": pixels})
    assert [len(call["pixel_values"]) for call in calls] == [2, 1]
    assert adapter.vision_calls({"input_ids": ids}) == []
    alone = adapter.vision_calls({"pixel_values": pixels})
    assert [len(call["pixel_values"]) for call in alone] == [1, 1, 1]


def test_segments_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 10, 4) for _ in range(3))
    bounds = torch.tensor([0, 3, 4, 10], dtype=torch.int32)
    module = torch.nn.Module()
    together, _ = segment_attention(module, q, k, v, None, scaling=0.5, cu_seq_lens_q=bounds)
    for start, stop in ((0, 3), (3, 4), (4, 10)):
        part, _ = segment_attention(
            module, *(t[:, :, start:stop] for t in (q, k, v)), None, scaling=0.5
        )
        torch.testing.assert_close(together[:, start:stop], part)


def test_registering_a_family() -> None:
    config = FAMILIES["llava"].config()
    config.model_type = "some-new-family"
    assert type(adapter_for(config)) is Adapter

    @register("some-new-family")
    class Mine(GridAdapter):
        pass

    try:
        assert type(adapter_for(config)) is Mine
    finally:
        del _REGISTRY["some-new-family"]


def test_no_image_token() -> None:
    config = FAMILIES["internvl"].config().text_config
    with pytest.raises(CheckpointError, match="names no image token"):
        _ = adapter_for(config).image_token_id


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json"):
        adapter_for(tmp_path)


def test_tower_that_returns_pieces() -> None:
    """The default adapter says what is wrong when a family does not fit it."""
    model = AutoModelForImageTextToText.from_config(FAMILIES["llava"].config())
    with pytest.raises(CaptureError, match="separate pieces"):
        Adapter(model.config).image_embeds(model, torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({}, {"full_attention": None}),
        ({"sliding_window": 64}, {"sliding_attention": 64}),
        ({"sliding_window": 64, "use_sliding_window": False}, {"full_attention": None}),
        ({"sliding_window": 4096}, {"full_attention": None}),
        (
            {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
            {"sliding_attention": 64, "full_attention": None},
        ),
    ],
)
def test_attention_kinds(change: dict[str, Any], kinds: dict[str, int | None]) -> None:
    """One mask per kind of layer; a window that no position reaches is none."""
    config = FAMILIES["llava"].config()
    for key, value in change.items():
        setattr(config.text_config, key, value)
    adapter = adapter_for(config)
    adapter.check()
    assert adapter.attention_kinds() == kinds


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layer_types": ["chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"attn_logit_softcapping": 30.0}, "caps its logits .attn_logit_softcapping"),
        ({"final_logit_softcapping": 30.0}, "caps its logits .final_logit_softcapping"),
        ({"is_encoder_decoder": True}, "an encoder with a decoder"),
    ],
)
def test_layers_that_do_not_fit(change: dict[str, Any], reason: str) -> None:
    config = FAMILIES["llava"].config()
    for key, value in change.items():
        setattr(config.text_config, key, value)
    with pytest.raises(CaptureError, match=reason):
        adapter_for(config).check()


def test_language_model_without_fused_attention() -> None:
    """Its own attention would add the boolean mask as a number; the probe says so."""
    config = FAMILIES["paligemma"].config()
    text = {**config.text_config.to_dict(), "model_type": "gemma2"}
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        text[name] = None
    other = type(config)(**{**config.to_dict(), "text_config": text})
    model = AutoModelForImageTextToText.from_config(other)
    report = probe(model)
    assert not report.captured
    (decoder,) = [item for item in report.components if item.name == "decoder"]
    assert not decoder.captured and "scaled_dot_product_attention" in str(decoder.reason)


def test_variable_grid_without_adapter() -> None:
    config = FAMILIES["qwen2_vl"].config()
    with pytest.raises(CaptureError, match="no fixed image size"):
        Adapter(config).vision_inputs()
