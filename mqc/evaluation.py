"""Accuracy of a compiled model, and its distance from another one, on rows with answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Any

from mqc.calib.dataset import Dataset, Row, load_dataset, refuse_overlap
from mqc.errors import UsageError
from mqc.host import AnswerScore, EvalItem, EvalReport, Runnable, score
from mqc.host import evaluate as evaluate_engine
from mqc.host.score import wilson
from mqc.loading import open_model
from mqc.models import EMBEDDED
from mqc.progress import Reporter, Silent

EVALUATION_SAMPLES = 2000


@dataclass(frozen=True)
class Evaluation:
    """Scores on the same rows; ``baseline`` is what KL divergence and agreement refer to."""

    rows: int
    source: str
    compiled: EvalReport
    baseline: EvalReport | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "source": self.source,
            "compiled": self.compiled.to_json(),
            "baseline": self.baseline.to_json() if self.baseline else None,
        }


def evaluate(
    artifact: str | Path | Runnable,
    *,
    against: str | Path | Runnable | None = None,
    data: str | Path | Sequence[Any] | None = None,
    n: int = EVALUATION_SAMPLES,
    batch_size: int = 16,
    runtime: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Accuracy on rows with answers; with ``against``, KL divergence from that model too.

    Args:
        artifact: a compiled artifact, or a checkpoint (scored in float32).
        against: another artifact or checkpoint.
        data: rows with answers (:func:`mqc.calib.dataset.load_dataset`); embedded models have a
            generated set.
        n: at most this many rows.
        batch_size: rows a model call holds.
        runtime: options of the artifact's target, as :func:`mqc.load` takes them.
        trust_remote_code: for a checkpoint, as in transformers.
        reporter: told how far the evaluation is.

    Raises:
        CalibrationError: rows that calibration used are among the data.
        UsageError: there is no data, or a row without an answer.
    """
    report = reporter or Silent()
    runnable = open_model(artifact, trust_remote_code=trust_remote_code, **(runtime or {}))
    other = None
    if against is not None:
        other = open_model(against, trust_remote_code=trust_remote_code)
        _same_prompts(runnable, other, str(against))
    rows = _evaluation_rows(runnable, data, n)
    for model in (runnable, other):
        if model is not None:
            refuse_overlap(list(rows), model.manifest.get("calibration"))
    missing = next((index for index, row in enumerate(rows) if row.answer is None), None)
    if missing is not None:
        raise UsageError(
            f"{rows[missing].where or f'row {missing}'} has no answer to score",
            hint='give rows as {"messages": [...], "answer": "..."}',
        )
    items: Iterator[EvalItem] = (_item(runnable, row) for row in rows)
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        report.step("scoring", done, len(rows))

    baseline = None
    if other is not None:
        # Both models go through the rows side by side: one batch is in memory, not all rows.
        items, scored, counted = tee(items, 3)
        baseline = _Counted(score(other.engine, scored, batch_size=batch_size), counted)
    compiled = evaluate_engine(
        runnable.engine, items, baseline=baseline, batch_size=batch_size, progress=progress
    )
    return Evaluation(
        len(rows), rows.source, compiled, baseline.report() if baseline is not None else None
    )


def _item(runnable: Runnable, row: Row) -> EvalItem:
    with row.named():
        return runnable.eval_item(row.loaded(), str(row.answer))


def _same_prompts(one: Runnable, other: Runnable, name: str) -> None:
    """Raise :class:`UsageError` unless both read the same prompts and write the same tokens."""
    for fact, what in (("adapter", "model type"), ("vocab_size", "vocabulary size")):
        here, there = one.engine.facts.get(fact), other.engine.facts.get(fact)
        if here != there:
            raise UsageError(
                f"{name} has {what} {there!r}, and the artifact {here!r}: answers of different "
                "models have no divergence",
                hint="compare with the model that the artifact was compiled from",
            )


class _Counted:
    """A baseline's scores on their way to the comparison, summed up as they pass."""

    def __init__(self, scores: Iterator[AnswerScore], items: Iterable[EvalItem]) -> None:
        self._scores = zip(items, scores, strict=True)
        self._n = self._correct = self._tokens = 0
        self._nats = 0.0

    def __iter__(self) -> Iterator[AnswerScore]:
        for item, one in self._scores:
            self._n += 1
            self._correct += one.correct
            self._tokens += len(item.answer_ids)
            self._nats -= one.answer_log_prob
            yield one

    def report(self) -> EvalReport:
        low, high = wilson(self._correct, self._n)
        return EvalReport(self._n, self._correct, low, high, self._nats / self._tokens)


def _evaluation_rows(
    runnable: Runnable, source: str | Path | Sequence[Any] | None, n: int
) -> Dataset:
    if n < 1:
        raise UsageError(f"{n} evaluation rows", hint="use 1 or more")
    name = runnable.engine.facts.get("source", {}).get("name")
    if source is None and name in EMBEDDED:
        source = f"tiny-vqa:evaluation:{n}"
    if source is None:
        raise UsageError(
            "there is nothing to evaluate on",
            hint='--data FILE.jsonl with rows {"messages": [...], "answer": "..."}',
        )
    return load_dataset(source, limit=n)
