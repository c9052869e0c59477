"""Teacher-forced scoring: exact match and KL divergence without generating.

Greedy decoding writes exactly the answer if and only if, with the answer's tokens given, each of
them (the end-of-text token included) is the most likely one after those before it. So one pass
over prompt and answer decides, and gives the distributions to compare with another engine's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from mqc.errors import TargetError, UsageError
from mqc.host.batch import Padding, make_batch
from mqc.host.engine import Engine, merge, read
from mqc.host.generate import stop_tokens
from mqc.host.prompt import Prompt, append_answer

Progress = Callable[[int], None]
"""Called with the number of items done since the last call."""


@dataclass(frozen=True)
class EvalItem:
    """A prompt and the tokens of its answer, end-of-text token included."""

    prompt: Prompt
    answer_ids: tuple[int, ...]


@dataclass(frozen=True)
class AnswerScore:
    """One item's score.

    ``correct``: greedy decoding gives the answer; ``log_probs``: float32 [answer tokens, vocab],
    log-probabilities at each answer token's place; ``answer_log_prob``: their sum over the
    answer's tokens, in nats.
    """

    correct: bool
    log_probs: torch.Tensor
    answer_log_prob: float


@dataclass(frozen=True)
class EvalReport:
    """Accuracy of an engine over n items, and its distance from a baseline.

    ``accuracy`` in [0, 1] with its Wilson 95 % interval ``low``, ``high``; ``kl``: mean over
    answer tokens of KL(baseline || engine) in nats, ``agreement``: share of answer tokens with the
    baseline's most likely token; both None without a baseline. ``loss``: mean negative
    log-probability of the answer tokens, in nats.
    """

    n: int
    correct: int
    low: float
    high: float
    loss: float
    kl: float | None = None
    agreement: float | None = None

    @property
    def accuracy(self) -> float:
        return self.correct / self.n

    def to_json(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "n": self.n,
            "correct": self.correct,
            "accuracy": self.accuracy,
            "wilson_95": [self.low, self.high],
            "loss": self.loss,
            "kl": self.kl,
            "agreement": self.agreement,
        }


def answer_ids(answer: str, tokenizer: Any, facts: Any) -> tuple[int, ...]:
    """Tokens of an answer as a model writes it: its text, then the end-of-text token.

    Raises :class:`UsageError` for a model without an end-of-text token.
    """
    stops = stop_tokens(facts, tokenizer)
    if not stops:
        raise UsageError("the model names no end-of-text token", hint="set eos_token_id")
    own = getattr(tokenizer, "eos_token_id", None)
    end = own if own in stops else stops[0]
    return (*tokenizer.encode(answer, add_special_tokens=False), int(end))


def score(
    engine: Engine,
    items: Iterable[EvalItem],
    *,
    batch_size: int = 16,
    chunk: int | None = None,
    padding: Padding = "right",
    progress: Progress | None = None,
) -> Iterator[AnswerScore]:
    """Score items in batches, lazily and in order; one batch is in memory at a time."""
    if batch_size < 1:
        raise UsageError(f"a batch of {batch_size} is not possible", hint="use 1 or more")
    source = iter(items)
    while group := list(islice(source, batch_size)):
        yield from _score_batch(engine, group, chunk, padding)
        if progress is not None:
            progress(len(group))


def _score_batch(
    engine: Engine, items: Sequence[EvalItem], chunk: int | None, padding: Padding
) -> list[AnswerScore]:
    if any(not item.answer_ids for item in items):
        raise UsageError("an answer has no tokens", hint="give an answer, or leave the row out")
    # The last answer token is predicted, never read.
    full = [append_answer(item.prompt, item.answer_ids[:-1]) for item in items]
    batch = make_batch(full, padding)
    counts = torch.tensor([len(item.answer_ids) for item in items])
    offset = torch.arange(int(counts.max()))
    rows = batch.last[:, None] + 1 - counts[:, None] + offset
    rows = rows.minimum(batch.last[:, None])
    logits, _, _ = read(engine, merge(engine, full, batch), batch, rows, chunk)
    scores = []
    for index, item in enumerate(items):
        answer = torch.tensor(item.answer_ids)
        log_probs = torch.log_softmax(logits[index, : len(answer)].double(), dim=-1)
        if bool(log_probs.isnan().any()):
            raise TargetError(
                "the engine gave logits that are not numbers",
                hint="a weight or a scale is NaN or infinite: compile again with --verify-each",
            )
        given = log_probs.gather(1, answer[:, None])
        correct = bool((log_probs.argmax(dim=-1) == answer).all())
        scores.append(AnswerScore(correct, log_probs.float(), float(given.sum())))
    return scores


@dataclass(frozen=True)
class RowResult:
    """What an evaluation sums up of one item; ``baseline_*``, ``kl`` (sum over the answer's tokens,
    in nats) and ``agreed`` (tokens) are None without a baseline."""

    tokens: int
    correct: bool
    nats: float
    baseline_correct: bool | None = None
    baseline_nats: float | None = None
    kl: float | None = None
    agreed: int | None = None


def evaluate(
    engine: Engine,
    items: Iterable[EvalItem],
    *,
    baseline: Engine | Iterable[AnswerScore] | None = None,
    batch_size: int = 16,
    chunk: int | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Accuracy of ``engine`` on ``items``, and its divergence from ``baseline``.

    ``baseline`` is another engine, run on the same items batch by batch, or its scores in the
    same order (kept from an earlier :func:`score`). Raises :class:`UsageError` without items, or
    for a baseline of another length.
    """
    results: list[RowResult] = []
    for group in compare(engine, items, baseline=baseline, batch_size=batch_size, chunk=chunk):
        results += group
        if progress is not None:
            progress(len(group))
    return summary(results)


def compare(
    engine: Engine,
    items: Iterable[EvalItem],
    *,
    baseline: Engine | Iterable[AnswerScore] | None = None,
    batch_size: int = 16,
    chunk: int | None = None,
) -> Iterator[list[RowResult]]:
    """The results of :func:`evaluate`, batch by batch, each when it is found."""
    source = iter(items)
    known = None if baseline is None or _is_engine(baseline) else iter(baseline)  # type: ignore[arg-type]
    while group := list(islice(source, batch_size)):
        scores = list(score(engine, group, batch_size=batch_size, chunk=chunk))
        reference: Sequence[AnswerScore | None] = [None] * len(group)
        if known is not None:
            reference = list(islice(known, len(group)))
        elif baseline is not None:
            reference = list(score(baseline, group, batch_size=batch_size, chunk=chunk))  # type: ignore[arg-type]
        if len(reference) != len(group):
            raise UsageError("the baseline has fewer scores than there are items")
        yield [_result(*row) for row in zip(group, scores, reference, strict=True)]


def _result(item: EvalItem, one: AnswerScore, other: AnswerScore | None) -> RowResult:
    tokens = len(item.answer_ids)
    if other is None:
        return RowResult(tokens, one.correct, -one.answer_log_prob)
    same = other.log_probs.argmax(dim=-1) == one.log_probs.argmax(dim=-1)
    return RowResult(
        tokens,
        one.correct,
        -one.answer_log_prob,
        other.correct,
        -other.answer_log_prob,
        float(kl_divergence(other.log_probs, one.log_probs).sum()),
        int(same.sum()),
    )


def summary(results: Sequence[RowResult]) -> EvalReport:
    """The report of an engine. Raises :class:`UsageError` without results."""
    divergences = [row.kl for row in results if row.kl is not None]
    report = _report([row.correct for row in results], [row.nats for row in results], results)
    if not divergences:
        return report
    compared = sum(row.tokens for row in results)
    agreed = sum(row.agreed or 0 for row in results)
    return replace(report, kl=sum(divergences) / compared, agreement=agreed / compared)


def baseline_summary(results: Sequence[RowResult]) -> EvalReport | None:
    """The report of the baseline, or None where there was none."""
    if not results or results[0].baseline_nats is None:
        return None
    correct = [bool(row.baseline_correct) for row in results]
    return _report(correct, [row.baseline_nats or 0.0 for row in results], results)


def _report(
    correct: Sequence[bool], nats: Sequence[float], results: Sequence[RowResult]
) -> EvalReport:
    if not results:
        raise UsageError("there is nothing to evaluate", hint="give rows with answers")
    tokens = sum(row.tokens for row in results)
    return EvalReport(
        len(results), sum(correct), *wilson(sum(correct), len(results)), sum(nats) / tokens
    )


def kl_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats of log-probabilities [..., vocab]; float64 [...], never negative."""
    p, q = p.double(), q.double()
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return terms.sum(dim=-1).clamp_min(0)


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), 95 % by default."""
    share, spread = correct / n, z * z / n
    middle = share + spread / 2
    width = z * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return (
        max(0.0, (middle - width) / (1 + spread)),
        min(1.0, (middle + width) / (1 + spread)),
    )


def _is_engine(value: Any) -> bool:
    return hasattr(value, "decoder") and hasattr(value, "embed")
