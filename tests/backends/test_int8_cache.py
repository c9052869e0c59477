"""Int8 KV caches: the scheme's field, the pass, and both CPU targets."""

from __future__ import annotations

from pathlib import Path

import native_library as native
import pytest
import torch
from onnx_cases import relative
from tiny import conversations, program, runnable

from mqc.backends.onnx import session as session_module
from mqc.backends.onnx.emit import emit
from mqc.backends.onnx.session import OnnxEngine
from mqc.backends.onnx.target import OnnxTarget
from mqc.backends.reference.target import ReferenceTarget
from mqc.config import make_recipe
from mqc.errors import PassPreconditionError, UsageError
from mqc.host import ProgramEngine, build_prompt, decode_step, prefill
from mqc.ir import Program
from mqc.passes.quantize_cache import QuantizeCache
from mqc.planning import plan
from mqc.spec import named_scheme
from mqc.transform import PassContext, PassManager

NAME = "tiny-qwen2-vl"
ATTENTION = torch.ops.mqc.attention.default


def asked() -> Program:
    result = program(NAME).copy()
    result.facts = {**result.facts, "kv_cache": "int8"}
    return result


def answers(engine: ProgramEngine | OnnxEngine) -> tuple[list[torch.Tensor], list[torch.dtype]]:
    """Log-probabilities of a batch's next tokens, then of two more; and the caches' dtypes."""
    model = runnable(NAME)
    rows = list(conversations().values())[:2]
    state = prefill(engine, [build_prompt(r, model.processor, model.adapter) for r in rows], 9)
    logits, tokens = [state.logits.log_softmax(-1)], torch.tensor([5, 7])
    for _ in range(2):
        state = decode_step(engine, state, tokens)
        logits.append(state.logits.log_softmax(-1))
    arrays = (
        c if isinstance(c, torch.Tensor) else torch.from_numpy(c.numpy()) for c in state.cache
    )
    return logits, [a.dtype for a in arrays]


def test_reference() -> None:
    """Near the float program, with a quarter of the memory and a scale a row."""
    lowered = ReferenceTarget().lower(asked())
    decoder = lowered.components["decoder"]
    assert not decoder.graph.find_nodes(op="call_function", target=ATTENTION)
    (wanted, plain), (found, dtypes) = (answers(ProgramEngine(p)) for p in (program(NAME), lowered))
    layers = len(plain) // 2
    assert dtypes == [torch.int8] * 2 * layers + [torch.float32] * 2 * layers
    for left, right in zip(found, wanted, strict=True):
        divergence = (right.exp() * (right - left)).sum(-1)
        assert 0 < divergence.max() <= 5e-3


@pytest.mark.parametrize("by_library", [False, pytest.param(True, marks=native.needs_library)])
def test_onnx(by_library: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not by_library:
        monkeypatch.setattr(session_module, "ops_library", lambda *_: None)
        monkeypatch.setattr(session_module, "attention_in_place", lambda *_: False)
    lowered = OnnxTarget().lower(asked())
    emit(lowered, tmp_path)
    wanted, _ = answers(ProgramEngine(ReferenceTarget().lower(asked())))
    found, dtypes = answers(OnnxEngine(tmp_path, lowered.facts, threads=1))
    assert set(dtypes) == {torch.int8, torch.float32}
    for left, right in zip(found, wanted, strict=True):
        # An ulp may decide a step of a row; float results alone are within 1e-5.
        assert relative(left, right) <= 2e-3


def test_growing_caches_cannot_be_int8() -> None:
    with pytest.raises(PassPreconditionError, match="grow"):
        PassManager([QuantizeCache()]).run(program(NAME), PassContext())


def test_scheme_and_plan() -> None:
    chosen = make_recipe("w4a8", None, ["kv_cache=int8"]).scheme
    assert "int8 KV cache" in chosen.describe()
    with pytest.raises(UsageError, match="kv_cache"):
        make_recipe("w4a8", None, ["kv_cache=int4"])
    narrow, wide = (plan(NAME, s).kv_bytes_per_token for s in (chosen, named_scheme("w4a8")))
    ports = [p for p in program(NAME).components["decoder"].inputs if p.axis("past") is not None]
    rows = sum(int(p.type.shape[1]) for p in ports if p.name != "mask")
    assert narrow == wide // 4 + 4 * rows
