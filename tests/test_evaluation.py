"""Evaluation refuses what has no meaning before a model is called. Scores: test_end_to_end.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mqc.errors import UsageError
from mqc.evaluation import evaluate
from mqc.host import Runnable


def model(adapter: str, vocabulary: int) -> Runnable:
    engine: Any = SimpleNamespace(facts={"adapter": adapter, "vocab_size": vocabulary})
    parts: Any = SimpleNamespace()
    return Runnable(engine, parts, parts)


@pytest.mark.parametrize(
    ("other", "cause"),
    [(("llava", 512), "model type 'llava'"), (("qwen2_vl", 600), "vocabulary size 600")],
)
def test_models_that_read_other_prompts_are_not_compared(
    other: tuple[str, int], cause: str
) -> None:
    with pytest.raises(UsageError, match=cause) as info:
        evaluate(model("qwen2_vl", 512), against=model(*other), data=[])
    assert "compiled from" in str(info.value.hint)


def test_a_row_without_an_answer_is_named() -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}], "answer": answer} for answer in "b"]
    rows.append({"messages": rows[0]["messages"], "answer": None})  # type: ignore[dict-item]
    with pytest.raises(UsageError, match="row 1 has no answer"):
        evaluate(model("qwen2_vl", 512), data=rows)
