"""Evaluation refuses what has no meaning before a model is called. Scores: test_end_to_end.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny

from mqc import evaluation
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


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_killed_evaluation_goes_on_to_the_same_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tiny.runnable("tiny-internvl"), tiny.runnable("tiny-internvl")
    asked: list[int] = []

    def run(out: Path | None, stop: int | None = None, **more: Any) -> Any:
        def item(model: Runnable, row: Any) -> Any:
            asked.append(1)
            if len(asked) == stop:
                raise Killed
            return real(model, row)

        asked.clear()
        monkeypatch.setattr(evaluation, "_item", item)
        return evaluate(models[0], against=models[1], n=5, out=out, **{"batch_size": 2, **more})

    real = evaluation._item
    whole = run(None)
    out = tmp_path / "rows.jsonl"
    with pytest.raises(Killed):
        run(out, stop=5)
    lines = out.read_text().splitlines(keepends=True)
    assert len(lines) == 5  # what it is, and two batches
    out.write_text("".join(lines[:4]) + lines[4][:9])  # a kill in the middle of a line
    assert run(out) == whole and len(asked) == 3
    assert run(out) == whole and not asked
    assert json.loads(out.read_text().splitlines()[-1])["baseline_correct"] in (True, False)
    with pytest.raises(UsageError, match="results of another evaluation"):
        run(out, batch_size=3)
    for text in ("notes", "notes\n", "7\n", "{}\n"):
        out.write_text(text)
        with pytest.raises(UsageError, match="not a file that mqc eval wrote"):
            run(out)
        assert out.read_text() == text
    out.write_text(lines[0][:20])
    assert run(out, stop=None) == whole
    with pytest.raises(UsageError, match="cannot be kept in"):
        run(tmp_path / "no" / "rows.jsonl")
