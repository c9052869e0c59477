"""Accuracy of a compiled model, and its distance from another one, on rows with answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mqc.calib.dataset import Dataset, Row, load_dataset, refuse_overlap
from mqc.errors import UsageError
from mqc.host import EvalItem, EvalReport, Runnable
from mqc.host.score import RowResult, baseline_summary, compare, summary
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
    out: str | Path | None = None,
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
        out: a JSONL file for the result of every row, written batch by batch. Where it has results
            of the same evaluation, these rows are not scored again.
        reporter: told how far the evaluation is.

    Raises:
        CalibrationError: rows that calibration used are among the data.
        UsageError: there is no data, a row without an answer, or ``out`` has other results.
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
    results: list[RowResult] = []
    store = None
    if out is not None:
        identity = {
            "model": _identity(runnable, artifact),
            "against": None if other is None else _identity(other, against),
            "rows": [[row.sha256, row.answer] for row in rows],
            "batch_size": batch_size,
            "runtime": dict(runtime or {}),
        }
        store = Results(Path(out), identity)
        results += store.read(batch_size, len(rows))
        if results:
            report.note(f"continues after {len(results)} of {len(rows)} rows in {out}")
    # Both models go through the rows side by side: one batch is in memory, not all rows.
    items = (_item(runnable, row) for row in rows[len(results) :])
    engine = None if other is None else other.engine
    for group in compare(runnable.engine, items, baseline=engine, batch_size=batch_size):
        results += group
        if store is not None:
            store.add(group)
        report.step("scoring", len(results), len(rows))
    return Evaluation(len(rows), rows.source, summary(results), baseline_summary(results))


class Results:
    """A JSONL file: what is evaluated, as a hash, then the result of each row when it is known."""

    def __init__(self, path: Path, identity: Any) -> None:
        self.path = path
        text = json.dumps(identity, sort_keys=True, default=str)
        self.head = json.dumps({"evaluation": hashlib.sha256(text.encode()).hexdigest()})

    def read(self, batch_size: int, rows: int) -> list[RowResult]:
        """What an earlier call wrote, in whole batches of ``rows`` rows; the rest is cut off.

        Raises :class:`UsageError` for a file of anything else.
        """
        try:
            text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
            if self.head.startswith(text):  # nothing, or a head that a kill has cut
                text = f"{self.head}\n"
            lines = text.split("\n")[:-1]  # behind the last line feed is a line that a kill has cut
            results = [RowResult(**json.loads(line)) for line in lines[1:]]
            if not lines or "evaluation" not in json.loads(lines[0]):
                raise ValueError
        except (ValueError, TypeError) as error:
            raise UsageError(
                f"{self.path} is not a file that mqc eval wrote", hint="choose another --out"
            ) from error
        except OSError as error:
            raise self._unusable(error) from error
        if lines[0] != self.head:
            raise UsageError(
                f"{self.path} has the results of another evaluation",
                hint="remove it, or choose another --out",
            )
        if len(results) < rows:
            del results[len(results) // batch_size * batch_size :]
        self._write("w", [self.head, *map(_line, results)])
        return results

    def add(self, results: Sequence[RowResult]) -> None:
        """Append the results of a batch."""
        self._write("a", list(map(_line, results)))

    def _write(self, mode: str, lines: Sequence[str]) -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> UsageError:
        return UsageError(
            f"results cannot be kept in {self.path}: {error.strerror or error}",
            hint="choose another --out",
        )


def _line(result: RowResult) -> str:
    return json.dumps(asdict(result))


def _identity(model: Runnable, source: Any) -> Any:
    """What a model is, as JSON data: an artifact's own description, hashes of files included."""
    return model.manifest or {"name": str(source), "facts": dict(model.engine.facts)}


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
