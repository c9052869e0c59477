"""Generation against transformers' own, and the parts of generation by themselves."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest
import tiny
import torch

from mqc.errors import UsageError
from mqc.host import Sampling, generate, generate_batch, prefill, steps
from mqc.host.generate import TextStream, decode_text, stop_tokens
from mqc.host.prompt import split_media

NEW = 6


def hf_answer(name: str, messages: tiny.Messages) -> tuple[list[int], torch.Tensor]:
    """Tokens of transformers' greedy generation, and the logits [steps, vocab] behind them."""
    processor = tiny.runnable(name).processor.hf
    plain, images, _ = split_media(messages)
    text = processor.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
    bos = processor.tokenizer.bos_token
    inputs = processor(
        text=[text],
        images=images or None,
        return_tensors="pt",
        add_special_tokens=not (bos and text.startswith(bos)),
    )
    result = tiny.hf_model(name).generate(
        **inputs,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return result.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(result.logits)


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("kind", list(tiny.conversations()))
def test_equals_transformers(name: str, kind: str) -> None:
    run = tiny.runnable(name)
    messages = tiny.conversations()[kind]
    expected, logits = hf_answer(name, messages)
    prompt = run.prompt(messages)
    tokens = [t.id for t in steps(run.engine, [prompt], max_new_tokens=NEW, stop=run.stop)]
    assert tokens == expected
    first = prefill(run.engine, [prompt]).logits
    torch.testing.assert_close(first, logits[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("chunk", [None, 1, 16])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_batch_and_chunks_change_nothing(name: str, padding: str, chunk: int | None) -> None:
    run = tiny.runnable(name)
    prompts = [run.prompt(messages) for messages in tiny.conversations().values()]
    assert len({len(prompt) for prompt in prompts}) > 1
    together = prefill(run.engine, prompts, chunk, padding)  # type: ignore[arg-type]
    alone = torch.cat([prefill(run.engine, [prompt]).logits for prompt in prompts])
    torch.testing.assert_close(together.logits, alone, rtol=1e-4, atol=1e-4)
    if chunk == 1:
        return
    options = {"max_new_tokens": NEW, "stop": run.stop}
    batch = generate_batch(run.engine, prompts, chunk=chunk, padding=padding, **options)  # type: ignore[arg-type]
    for prompt, result in zip(prompts, batch, strict=True):
        assert result.tokens == generate(run.engine, prompt, **options).tokens  # type: ignore[arg-type]
        assert result.prompt_tokens == len(prompt)


def test_result_fields_and_callback() -> None:
    run = tiny.runnable("tiny-qwen2-vl")
    prompt = run.prompt(prompt="what ?")
    seen = []
    result = generate(
        run.engine,
        prompt,
        tokenizer=run.tokenizer,
        max_new_tokens=4,
        stop=(),
        on_token=lambda token: seen.append(token.id),
    )
    assert seen == result.tokens and len(seen) == 4
    assert result.finish == "length"
    assert result.text == decode_text(run.tokenizer, seen)
    assert 0 < result.time_to_first_token < result.seconds and result.tokens_per_second > 0
    stopped = generate(run.engine, prompt, max_new_tokens=4, stop=[seen[0]])
    assert stopped.tokens == [] and stopped.finish == "stop" and stopped.tokens_per_second == 0


def test_rows_stop_by_themselves() -> None:
    run = tiny.runnable("tiny-llava")
    prompts = [run.prompt(prompt="what ?"), run.prompt(prompt="how many red things are there ?")]
    free = generate_batch(run.engine, prompts, max_new_tokens=5, stop=())
    stop = free[0].tokens[2]
    results = generate_batch(run.engine, prompts, max_new_tokens=5, stop=[stop])
    for result, whole in zip(results, free, strict=True):
        cut = whole.tokens.index(stop) if stop in whole.tokens else None
        assert result.tokens == whole.tokens[:cut]
        assert result.finish == ("length" if cut is None else "stop")


def test_sampling() -> None:
    logits = torch.tensor([[2.0, 1.9, -3.0, 0.5]]).repeat(4000, 1)
    greedy = Sampling()
    assert greedy.choose(logits, greedy.generator()).unique().tolist() == [0]
    warm = Sampling(temperature=1.0, seed=3)
    counts = torch.bincount(warm.choose(logits, warm.generator()), minlength=4) / 4000
    torch.testing.assert_close(counts, logits[0].softmax(-1), atol=0.03, rtol=0)
    nucleus = Sampling(temperature=1.0, top_p=0.5)
    assert nucleus.choose(logits, nucleus.generator()).unique().tolist() == [0, 1]
    tight = Sampling(temperature=1.0, top_p=0.01)
    assert tight.choose(logits, tight.generator()).unique().tolist() == [0]
    again = Sampling(temperature=1.0, seed=3)
    assert warm.choose(logits, warm.generator()).equal(again.choose(logits, again.generator()))


def test_a_nucleus_of_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest tokens alone give the draws that sorting all gives, in and outside of them."""
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)) * 4
    drawn = []
    for head in (5000, 100, 2):  # all sorted; enough; too few
        monkeypatch.setattr(import_module("mqc.host.generate"), "HEAD", head)
        sampling = Sampling(temperature=1.0, top_p=0.6, seed=5)
        generator = sampling.generator()
        drawn.append([sampling.choose(logits, generator).tolist() for _ in range(200)])
    assert drawn[0] == drawn[1] == drawn[2]
    assert len({token for tokens in drawn[0] for token in tokens}) > 6


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_sampling(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    run = tiny.runnable("tiny-llava")
    prompt = run.prompt(prompt="what ?")
    with pytest.raises(UsageError, match="max_new_tokens 0"):
        generate(run.engine, prompt, max_new_tokens=0)
    with pytest.raises(UsageError, match="chunk of 0"):
        generate(run.engine, prompt, chunk=0)
    with pytest.raises(UsageError, match="no prompt"):
        generate_batch(run.engine, [])


class Letters:
    """A tokenizer of bytes."""

    eos_token_id = 7

    def decode(self, tokens: list[int], **_: object) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def test_text_stream_waits_for_whole_characters() -> None:
    stream = TextStream(Letters())
    pieces = [stream.put(byte) for byte in "aé€😀b".encode()]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]
    assert stream.end() == ""
    cut = TextStream(Letters())
    assert [cut.put(byte) for byte in "é".encode()[:1]] == [""]
    assert cut.end() == "\ufffd"


@pytest.mark.parametrize("name", tiny.NAMES)
def test_stream_of_real_tokenizer(name: str) -> None:
    tokenizer = tiny.runnable(name).tokenizer
    text = "row 2 column 1 naïve 漢字 😀 end"
    assert decode_text(tokenizer, tokenizer.encode(text, add_special_tokens=False)) == text


def test_stop_tokens() -> None:
    assert stop_tokens({"eos_token_ids": [3, 4]}) == [3, 4]
    assert stop_tokens({}, Letters()) == [7]
    assert stop_tokens({}) == []


def test_positions_end() -> None:
    run = tiny.runnable("tiny-qwen2-vl")
    prompt = run.prompt(prompt="what ?")
    most = run.engine.facts["max_positions"]
    full = replace(prompt, next_position=most)
    assert len(list(steps(run.engine, [full, prompt], max_new_tokens=9))) == 2  # one token each
    beyond = replace(prompt, next_position=most + 1)
    with pytest.raises(UsageError, match=f"takes {most + 1} positions; the model has {most}"):
        list(steps(run.engine, [prompt, beyond]))
