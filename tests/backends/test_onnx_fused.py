"""Lowered programs in onnxruntime: fused operators through their bodies, caches in both forms."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from tiny import conversations, program, runnable

from mqc.backends.onnx.emit import emit
from mqc.backends.onnx.library import VARIABLE, attention_in_place
from mqc.backends.onnx.session import OnnxEngine
from mqc.backends.onnx.target import OnnxTarget
from mqc.host import ProgramEngine, build_prompt, decode_step, prefill
from mqc.host.prompt import Prompt
from mqc.ir import Program
from mqc.pipeline import default_passes
from mqc.spec import named_scheme
from mqc.testing import vqa
from mqc.transform import PassContext, PassManager

NAME = "tiny-llava"


@cache
def prompts() -> list[Prompt]:
    model = runnable(NAME)
    rows = [vqa.messages(vqa.sample("calibration", index)) for index in range(2)]
    rows.append(conversations()["text"])
    return [build_prompt(row, model.processor, model.adapter) for row in rows]


@cache
def quantized() -> Program:
    scheme = named_scheme("w4a8")
    context = PassContext(scheme=scheme, calibration=prompts()[:2])
    return PassManager(default_passes(scheme)).run(program(NAME), context)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Path, Program]]:
    """Files with fused attention and without it."""
    made = {}
    for buffers in (False, True):
        lowered = OnnxTarget(buffers=buffers).lower(quantized())
        folder = tmp_path_factory.mktemp(f"buffers{buffers}")
        emit(lowered, folder)
        made[buffers] = (folder, lowered)
    return made


def read_and_write(
    engine: OnnxEngine | ProgramEngine, chunk: int | None, steps: int = 4
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits of the prompts' ends and of greedy steps, and the tokens chosen."""
    state = prefill(engine, prompts(), chunk)
    logits, tokens = [state.logits], []
    for _ in range(steps):
        tokens.append(state.logits.argmax(-1))
        state = decode_step(engine, state, tokens[-1])
        logits.append(state.logits)
    return logits, tokens


def test_the_file_holds_fused_operators(folders: dict[bool, tuple[Path, Program]]) -> None:
    model = onnx.load(folders[True][0] / "decoder.onnx", load_external_data=False)
    kinds = [node.op_type for node in model.graph.node if node.domain == "ai.mqc"]
    assert kinds.count("Attention_packed_half") == 4
    assert sum(kind.startswith("RmsNormQuantize_mask_u8") for kind in kinds) == 8
    assert sum(kind.startswith("ActivationQuantize_silu_gated") for kind in kinds) == 4
    assert sum("residual" in kind for kind in kinds) == 8
    assert {function.name for function in model.functions} == set(kinds)
    plain = [node.op_type for node in model.graph.node if node.domain == ""]
    assert "Softmax" not in plain and "Sigmoid" not in plain
    outputs = [value.name for value in model.graph.output]
    assert outputs[:3] == ["logits", "new_key_cache_0", "new_value_cache_0"]


@pytest.mark.parametrize("chunk", [None, 9])
def test_bodies_compute_what_the_reference_does(
    folders: dict[bool, tuple[Path, Program]], chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of unequal prompts, padded, whole and in chunks, in stock onnxruntime."""
    monkeypatch.setenv(VARIABLE, "none")
    runs = []
    for buffers, form in ((False, "growing"), (True, "buffer")):
        folder, lowered = folders[buffers]
        assert lowered.facts.get("cache", "growing") == form
        runs.append(read_and_write(OnnxEngine(folder, lowered.facts, threads=1), chunk))
    runs.append(read_and_write(ProgramEngine(quantized()), chunk))
    (plain, tokens), (fused, same), (want, expected) = runs
    for chosen in (tokens, same):
        assert all(torch.equal(a, b) for a, b in zip(chosen, expected, strict=True))
    for left, right, oracle in zip(plain, fused, want, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)
        # In the tower, values within an ulp of a boundary take other int8 steps than the oracle's.
        assert (right.softmax(-1) - oracle.softmax(-1)).abs().max() <= 0.1
        torch.testing.assert_close(right[2], oracle[2], rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not attention_in_place(), reason="the native library is not built")
@pytest.mark.parametrize("chunk", [None, 9])
def test_kernels_fill_buffers_in_place(
    folders: dict[bool, tuple[Path, Program]], chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, lowered = folders[True]
    engine = OnnxEngine(folder, lowered.facts, threads=1)
    state = prefill(engine, prompts(), chunk)
    before = [rows.data_ptr() for rows in state.cache]
    state = decode_step(engine, state, state.logits.argmax(-1))
    assert [rows.data_ptr() for rows in state.cache] == before, "no row was copied"
    assert {rows.shape()[2] for rows in state.cache} == {128}
    got, tokens = read_and_write(engine, chunk)
    monkeypatch.setenv(VARIABLE, "none")
    want, expected = read_and_write(OnnxEngine(folder, lowered.facts, threads=1), chunk)
    assert all(torch.equal(a, b) for a, b in zip(tokens, expected, strict=True))
    for left, right in zip(got, want, strict=True):
        assert (left.softmax(-1) - right.softmax(-1)).abs().max() <= 0.1
