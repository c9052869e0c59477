"""Scoring: teacher forcing decides what generation would do; KL and its interval."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from mqc.errors import TargetError, UsageError
from mqc.host import EvalItem, ProgramEngine, evaluate, generate, score
from mqc.host.score import answer_ids, kl_divergence, wilson
from mqc.testing import vqa


def items(name: str, count: int = 6) -> list[EvalItem]:
    run = tiny.runnable(name)
    samples = [vqa.sample("evaluation", index) for index in range(count)]
    return [run.eval_item(vqa.messages(sample), sample.answer) for sample in samples]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_correct_means_that_generation_gives_the_answer(name: str) -> None:
    run = tiny.runnable(name)
    right = []
    for item in items(name, 4):
        length = len(item.answer_ids)
        tokens = generate(run.engine, item.prompt, max_new_tokens=length, stop=()).tokens
        right.append(EvalItem(item.prompt, tuple(tokens)))
    wrong = [
        EvalItem(item.prompt, (*item.answer_ids[:-1], (item.answer_ids[-1] + 1) % 500))
        for item in right
    ]
    assert all(one.correct for one in score(run.engine, right, batch_size=4))
    assert not any(one.correct for one in score(run.engine, wrong, batch_size=4))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_batches_chunks_and_padding_change_nothing(name: str) -> None:
    engine, data = tiny.runnable(name).engine, items(name)
    assert len({len(item.prompt) + len(item.answer_ids) for item in data}) > 1
    single = list(score(engine, data, batch_size=1))
    settings: list[dict[str, Any]] = [
        {"batch_size": 6},
        {"batch_size": 4, "padding": "left"},
        {"batch_size": 3, "chunk": 11},
    ]
    for options in settings:
        for one, other in zip(single, score(engine, data, **options), strict=True):
            torch.testing.assert_close(one.log_probs, other.log_probs, rtol=1e-4, atol=1e-4)
            assert one.answer_log_prob == pytest.approx(other.answer_log_prob, rel=1e-4)


def test_log_probs_are_transformers_own() -> None:
    item = items("tiny-llava", 1)[0]
    (one,) = score(tiny.runnable("tiny-llava").engine, [item])
    ids = torch.cat([item.prompt.input_ids, torch.tensor(item.answer_ids)])
    with torch.inference_mode():
        logits = tiny.hf_model("tiny-llava")(
            input_ids=ids[None], pixel_values=item.prompt.vision_calls[0]["pixel_values"]
        ).logits[0, len(item.prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(one.log_probs, expected, rtol=1e-4, atol=1e-4)
    picked = expected.gather(1, torch.tensor(item.answer_ids)[:, None])
    assert one.answer_log_prob == pytest.approx(float(picked.sum()), rel=1e-4, abs=1e-5)


def test_report_and_progress() -> None:
    engine, data = tiny.runnable("tiny-qwen2-vl").engine, items("tiny-qwen2-vl")
    done: list[int] = []
    report = evaluate(engine, data, baseline=engine, batch_size=4, progress=done.append)
    assert done == [4, 2] and report.n == 6
    assert report.kl == pytest.approx(0, abs=1e-9) and report.agreement == 1
    assert report.low <= report.accuracy <= report.high and report.loss > 0
    assert report.to_json()["accuracy"] == report.accuracy
    kept = list(score(engine, data))
    again = evaluate(engine, iter(data), baseline=kept)
    assert (again.n, again.correct) == (report.n, report.correct)
    assert again.loss == pytest.approx(report.loss, rel=1e-4)
    assert evaluate(engine, data).kl is None


def test_divergence_of_a_changed_engine() -> None:
    data = items("tiny-qwen2-vl", 3)
    program = tiny.program("tiny-qwen2-vl").copy()
    name = next(n for n in program.components["decoder"].param_names() if "down_proj" in n)
    program.params[name] = program.params[name] + 0.5
    changed = ProgramEngine(program)
    engine = tiny.runnable("tiny-qwen2-vl").engine
    report = evaluate(changed, data, baseline=engine)
    assert report.kl is not None and report.kl > 1e-4
    byhand = []
    for one, other in zip(score(changed, data), score(engine, data), strict=True):
        p = other.log_probs.double()
        byhand += (p.exp() * (p - one.log_probs.double())).sum(-1).tolist()
    assert report.kl == pytest.approx(sum(byhand) / len(byhand), rel=1e-6)


def test_refusals() -> None:
    engine, data = tiny.runnable("tiny-llava").engine, items("tiny-llava", 2)
    with pytest.raises(UsageError, match="nothing to evaluate"):
        evaluate(engine, [])
    with pytest.raises(UsageError, match="no tokens"):
        list(score(engine, [replace(data[0], answer_ids=())]))
    with pytest.raises(UsageError, match="batch of 0"):
        list(score(engine, data, batch_size=0))
    with pytest.raises(UsageError, match="fewer scores"):
        evaluate(engine, data, baseline=list(score(engine, data[:1])))


def test_nan_logits_are_an_error() -> None:
    program = tiny.program("tiny-llava").copy()
    name = next(n for n in program.components["decoder"].param_names() if "down_proj" in n)
    program.params[name] = program.params[name] * torch.nan
    with pytest.raises(TargetError, match="not numbers"):
        evaluate(ProgramEngine(program), items("tiny-llava", 1))


def test_answer_ids() -> None:
    run = tiny.runnable("tiny-qwen2-vl")
    ids = answer_ids("red circle", run.tokenizer, run.engine.facts)
    assert run.tokenizer.decode(ids[:-1]) == "red circle" and ids[-1] in run.stop
    with pytest.raises(UsageError, match="end-of-text"):
        answer_ids("a", object(), {})


def test_kl_and_wilson() -> None:
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert float(kl_divergence(p.log(), q.log())) == pytest.approx(expected)
    sure = torch.tensor([0.0, -math.inf])
    assert float(kl_divergence(sure, q.log())) == pytest.approx(math.log(4))
    low, high = wilson(95, 100)
    assert (low, high) == (pytest.approx(0.8882, abs=1e-4), pytest.approx(0.9785, abs=1e-4))
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == pytest.approx(1)
