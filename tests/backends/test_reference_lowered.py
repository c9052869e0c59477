"""The host and the reference engine on programs that passes have changed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch

from mqc.artifact import ArtifactWriter
from mqc.backends.reference import ReferenceTarget
from mqc.backends.registry import load_artifact
from mqc.config import make_recipe
from mqc.host import EvalItem, ProgramEngine, decode_step, prefill, score
from mqc.host.engine import Engine
from mqc.ir import Program
from mqc.models import embedded_model_path
from mqc.pipeline import make_passes, pass_names
from mqc.spec import named_scheme
from mqc.testing import vqa
from mqc.transform import PassContext, PassManager

QUICK = ("method=rtn", "clip=false")
"""Rounding weights to nearest takes a second; GPTQ is not what is tested here."""


@cache
def compiled(name: str, passes: tuple[str, ...]) -> Program:
    run = tiny.runnable(name)
    quick = [f"{part}.weights.{what}" for part in ("vision", "decoder") for what in QUICK]
    plan = make_recipe("w4a8", overrides=quick).scheme
    rows = (vqa.messages(vqa.sample("calibration", index)) for index in range(4))
    context = PassContext(plan, [run.prompt(messages) for messages in rows], seed=0)
    return PassManager(make_passes(passes, plan)).run(tiny.program(name).copy(), context)


def full_pipeline(aifs: bool) -> tuple[str, ...]:
    names = pass_names(named_scheme("w4a8"))
    return tuple(name for name in names if aifs or name != "aifs-reorder")


def logits(
    engine: Engine, name: str, chunk: int | None, padding: str, steps: Sequence[int] = (11, 12)
) -> torch.Tensor:
    """Logits [1 + steps, B, vocab] after a batch of all kinds of prompts, then of fixed tokens."""
    prompts = [tiny.runnable(name).prompt(m) for m in tiny.conversations().values()]
    state = prefill(engine, prompts, chunk, padding)  # type: ignore[arg-type]
    found = [state.logits]
    for token in steps:
        state = decode_step(engine, state, torch.full((len(prompts),), token))
        found.append(state.logits)
    return torch.stack(found)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_reordering_a_float_program_changes_nothing(name: str) -> None:
    engine = ProgramEngine(compiled(name, ("canonicalize", "modality-split", "aifs-reorder")))
    assert engine.facts["kv_order"] == "aifs"
    assert engine.program.components["decoder"].has_input("modality")
    expected = logits(tiny.runnable(name).engine, name, None, "right")
    for chunk, padding in ((None, "right"), (None, "left"), (13, "right"), (7, "left")):
        found = logits(engine, name, chunk, padding)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_quantized_program(tmp_path: Path) -> None:
    """A saved W4A8 program computes what it did before, and AIFS on and off agree.

    Results are the same to the bit unless float attention, which sums in another order, tips a
    rounding; the integer matrix products cannot differ.
    """
    name = "tiny-qwen2-vl"
    program = compiled(name, full_pipeline(aifs=True))
    target = ReferenceTarget()
    with ArtifactWriter(tmp_path / "a") as writer:
        target.emit(target.lower(program), writer)
        writer.copy_model_files(embedded_model_path(name))
        writer.describe(target=target.name, facts=program.facts, history=program.history)
    engine = load_artifact(tmp_path / "a").engine
    found = logits(engine, name, None, "right")
    assert found.equal(logits(ProgramEngine(program), name, None, "right"))
    plain = ProgramEngine(compiled(name, full_pipeline(aifs=False)))
    for chunk, padding in ((None, "right"), (13, "left")):
        expected = logits(plain, name, chunk, padding)
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_static_scales_do_not_see_the_batch() -> None:
    run = tiny.runnable("tiny-qwen2-vl")
    engine = ProgramEngine(compiled("tiny-qwen2-vl", full_pipeline(aifs=True)))
    items: list[EvalItem] = []
    for index in range(4):
        sample = vqa.sample("evaluation", index)
        items.append(run.eval_item(vqa.messages(sample), sample.answer))
    together = list(score(engine, items, batch_size=4))
    for one, other in zip(score(engine, items, batch_size=1), together, strict=True):
        error = (one.log_probs - other.log_probs).abs().max()
        assert error < 0.02 * one.log_probs.abs().max()
