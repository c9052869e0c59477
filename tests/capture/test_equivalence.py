"""Captured components, glued by hand, compute what the Hugging Face model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from capture.glue import Glue
from transformers import AutoModelForImageTextToText, PreTrainedModel

from mqc.capture import capture, load_processor
from mqc.ir import Program, load_program, save_program, verify
from mqc.ir.serialize import program_to_json
from mqc.models import EMBEDDED, embedded_model_path
from mqc.testing.families import BASIC, build_family, make_image, sample

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


class Case:
    """A model, its captured program, and the hand-written host around it."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.model, self.batch = build_family(name, dtype)
        self.program = capture(self.model, dtype=dtype)
        self.glue = Glue(self.program, self.model.config)

    @torch.no_grad()
    def reference(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = self.model(**batch).logits
        return logits

    def images(self, *sizes: Any) -> list[Any]:
        generator = torch.Generator().manual_seed(5)
        return [make_image(self.model.config, size, generator) for size in sizes]


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["f32", "f64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    kind: torch.dtype = request.param
    return kind


@pytest.fixture(scope="module", params=sorted(BASIC))
def case(request: pytest.FixtureRequest, dtype: torch.dtype) -> Case:
    return Case(request.param, dtype)


def test_program_is_well_formed(case: Case) -> None:
    verify(case.program)
    assert list(case.program.components) == ["vision", "embed", "decoder"]
    decoder = case.program.components["decoder"]
    assert [port.name for port in decoder.inputs[:4]] == [
        "inputs_embeds",
        "position_ids",
        "mask",
        "logit_index",
    ]
    assert decoder.input("mask").type.shape == ("batch", 1, "tokens", "past + tokens")
    assert decoder.input("past_key_1").axes == ("batch", None, "past", None)
    assert decoder.output("logits").type.shape == ("batch", "rows", 96)
    assert decoder.output("present_value_1").type.shape == ("batch", 2, "past + tokens", 12)
    names = {str(node.target) for item in case.program for node in item.graph.nodes}
    assert not [name for name in names if "assert" in name]


def test_prefill_of_two_images(case: Case) -> None:
    expected = case.reference(case.batch)
    assert relative(case.glue.logits(case.batch), expected) <= TOLERANCE[case.dtype]


def test_chunked_prefill_and_decoding(case: Case) -> None:
    tokens = case.batch["input_ids"].shape[1]
    actual = case.glue.logits(case.batch, [7, tokens - 10, 1, 1, 1])
    assert relative(actual, case.reference(case.batch)) <= TOLERANCE[case.dtype]


def test_padded_batch(case: Case) -> None:
    one, two = ((4, 4), (6, 4)) if case.name == "qwen2_vl" else (1, 2)
    rows = [case.images(one), case.images(two, one), []]
    batch = sample(
        case.model.config, rows, generator=torch.Generator().manual_seed(1), dtype=case.dtype
    )
    valid = batch["attention_mask"].bool()
    positions = case.glue.positions(batch)
    expected = case.reference({**batch, "position_ids": positions})
    actual = case.glue.logits(batch)
    assert relative(actual[valid], expected[valid]) <= TOLERANCE[case.dtype]
    assert torch.isfinite(actual).all()


def test_text_only(case: Case) -> None:
    batch = sample(case.model.config, [[]], text=9, generator=torch.Generator().manual_seed(2))
    actual = case.glue.logits(batch)
    assert relative(actual, case.reference(batch)) <= TOLERANCE[case.dtype]


def test_image_sizes(case: Case) -> None:
    sizes: list[Any] = [1, 3, 5]
    if case.name == "qwen2_vl":
        sizes = [(2, 2), (2, 40), (12, 10)]
    for size in sizes:
        batch = sample(
            case.model.config,
            [case.images(size)],
            generator=torch.Generator().manual_seed(3),
            dtype=case.dtype,
        )
        actual = case.glue.logits(batch)
        assert relative(actual, case.reference(batch)) <= TOLERANCE[case.dtype]


def test_one_token(case: Case) -> None:
    batch = {"input_ids": torch.tensor([[30]]), "attention_mask": torch.tensor([[1]])}
    assert relative(case.glue.logits(batch), case.reference(batch)) <= TOLERANCE[case.dtype]


def test_head_only_for_the_rows_asked_for(case: Case) -> None:
    embeds, positions = case.glue.embeds(case.batch), case.glue.positions(case.batch)
    valid = case.batch["attention_mask"].bool()
    full, _ = case.glue.decode(embeds, positions, valid)
    rows = torch.tensor([[embeds.shape[1] - 1, 0, 3]])
    some, _ = case.glue.decode(embeds, positions, valid, rows=rows)
    assert relative(some, full[:, rows[0]]) <= TOLERANCE[case.dtype]


def test_save_and_load(case: Case, tmp_path: Path) -> None:
    save_program(case.program, tmp_path)
    loaded = load_program(tmp_path)
    verify(loaded)
    assert loaded.facts == case.program.facts
    actual = Glue(loaded, case.model.config).logits(case.batch)
    assert torch.equal(actual, case.glue.logits(case.batch))


def test_model_in_memory_is_not_changed() -> None:
    model, batch = build_family("qwen2_vl")
    with torch.no_grad():
        before = model(**batch).logits
        first, second = capture(model), capture(model)
        after = model(**batch).logits
    assert torch.equal(before, after)
    assert program_to_json(first) == program_to_json(second)
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_bfloat16_program() -> None:
    model, batch = build_family("llava", torch.bfloat16)
    program = capture(model, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(**batch).logits
    assert relative(Glue(program, model.config).logits(batch), expected) <= 0.02


def test_tied_head_is_one_parameter() -> None:
    program = capture(build_family("qwen2_vl")[0])
    (embedding,) = program.components["embed"].param_names()
    assert embedding in program.components["decoder"].param_names()
    assert "lm_head.weight" not in program.params


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_embedded_checkpoint(name: str) -> None:
    folder = embedded_model_path(name)
    program: Program = capture(name)
    model: PreTrainedModel = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    state = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for key in program.params:
        assert torch.equal(program.params[key], state[key]), key
    from PIL import Image

    images = [Image.new("RGB", size, (200, 40, 90)) for size in ((64, 64), (150, 70), (1, 1))]
    batch = load_processor(folder).prompt("what is it?", images)
    with torch.no_grad():
        expected = model(**batch).logits
    assert relative(Glue(program, model.config).logits(batch), expected) <= 5e-6
