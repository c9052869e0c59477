"""On a GPU: the compiled model answers as its definition does, with and without graphs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mqc
from mqc.host import evaluate
from mqc.testing import vqa

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "artifact"
    quick = ["weights.method=rtn", "weights.clip=false"]
    mqc.compile("tiny-qwen2-vl", target="cuda", overrides=quick, samples=16, out=out)
    return out


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
def test_scores(artifact: Path, kv_cache: str) -> None:
    reference = mqc.load(artifact, device="reference")
    rows = [vqa.sample("evaluation", index) for index in range(32)]
    items = [reference.eval_item(vqa.messages(row), row.answer) for row in rows]
    engine = mqc.load(artifact, kv_cache=kv_cache).engine
    report = evaluate(engine, items, baseline=reference.engine)
    assert report.agreement is not None and report.agreement >= 0.97


def test_graphs_change_nothing(artifact: Path) -> None:
    messages = [vqa.messages(vqa.sample("evaluation", index)) for index in range(3)]
    recorded, plain = (mqc.load(artifact, graphs=on) for on in (True, False))
    for item in messages:
        expected = plain.generate(item, max_new_tokens=8).tokens
        assert recorded.generate(item, max_new_tokens=8).tokens == expected


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_device_answers_alike(artifact: Path) -> None:
    """Both in one process, the first being the current one."""
    messages = [vqa.messages(vqa.sample("evaluation", index)) for index in range(3)]
    first, second = (mqc.load(artifact, device=name) for name in ("cuda:0", "cuda:1"))
    for item in messages:
        expected = first.generate(item, max_new_tokens=8).tokens
        assert second.generate(item, max_new_tokens=8).tokens == expected
