"""Writing: greedy or sampled tokens, one prompt or a batch, as a stream of text."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mqc.errors import UsageError
from mqc.host.batch import Padding
from mqc.host.engine import Engine, decode_step, greedy_step, prefill
from mqc.host.prompt import Prompt

HEAD = 1024
"""Tokens that a nucleus is first looked for among."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: ``temperature`` 0 is greedy; ``top_p`` in (0, 1]."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UsageError(
                f"temperature {self.temperature} is not possible", hint="use 0 or more"
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p} is not possible", hint="use 0 < top_p <= 1")

    def generator(self) -> torch.Generator:
        """The random generator of one generation."""
        return torch.Generator().manual_seed(self.seed)

    def choose(self, logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Logits float [B, vocab] -> tokens int64 [B]."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        probs = torch.softmax(logits.double() / self.temperature, dim=-1)
        if self.top_p == 1:
            return _draw(probs, generator)[:, 0]
        ranked, order = _likeliest(probs, self.top_p)
        outside = ranked.cumsum(dim=-1) - ranked >= self.top_p
        return order.gather(1, _draw(ranked.masked_fill(outside, 0), generator))[:, 0]


def _draw(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """An index int64 [B, 1] of each row of [B, n] by its weight; one random number a row."""
    total = weights.cumsum(dim=-1)
    at = torch.rand(len(weights), 1, dtype=weights.dtype, generator=generator) * total[:, -1:]
    return torch.searchsorted(total, at, right=True).clamp_(max=weights.shape[-1] - 1)


def _likeliest(probs: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities [B, n] in falling order and their tokens, as many as make up ``share``: a
    vocabulary is sorted only where its likeliest ``HEAD`` tokens do not."""
    if probs.shape[-1] > HEAD:
        ranked, order = probs.topk(HEAD, dim=-1)
        if bool((ranked.sum(dim=-1) >= share).all()):
            return ranked, order
    return probs.sort(dim=-1, descending=True, stable=True)


@dataclass(frozen=True)
class Token:
    """One generated token: ``row`` of the batch, ``last`` where the sequence ends with it."""

    row: int
    id: int
    last: bool


@dataclass
class GenerationResult:
    """What was written after one prompt.

    ``tokens`` without the stop token; ``finish`` is "stop" or "length"; times in seconds from the
    call; ``tokens_per_second`` counts the decode steps alone (0 where there were none).
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = "length"
    prompt_tokens: int = 0
    time_to_first_token: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        count = len(self.tokens) + (self.finish == "stop") - 1
        decode = self.seconds - self.time_to_first_token
        return count / decode if count > 0 and decode > 0 else 0.0


class TextStream:
    """Tokens to text, piece by piece; the pieces' concatenation is the whole text.

    A piece is held back while it ends inside a UTF-8 character. Decoding starts a few tokens
    early, so that tokenizers which drop or add spaces at the start of a text do so once only.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0
        self._done = 0

    def put(self, token: int) -> str:
        """The text that ``token`` completes, maybe empty."""
        self._tokens.append(token)
        return self._advance(final=False)

    def end(self) -> str:
        """What was held back."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._tokens[self._start : self._done])
        after = self._decode(self._tokens[self._start :])
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""
        self._start, self._done = self._done, len(self._tokens)
        return after[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def decode_text(tokenizer: Any, tokens: Iterable[int]) -> str:
    """The text of tokens, as a stream would give it."""
    stream = TextStream(tokenizer)
    return "".join([stream.put(token) for token in tokens]) + stream.end()


def steps(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    stop: Iterable[int] = (),
    sampling: Sampling | None = None,
    chunk: int | None = None,
    padding: Padding = "right",
) -> Iterator[Token]:
    """Generate token by token for a batch, until each sequence stops or has its maximum.

    ``stop``: ids that end a sequence; they are yielded too. Sequences that ended are carried along
    unread; all end where the model's positions do. Raises :class:`UsageError` for a maximum below 1
    and for a prompt longer than the model's positions.
    """
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens {max_new_tokens} is not possible", hint="use 1 or more")
    max_new_tokens = min(max_new_tokens, _room(engine, prompts))
    sampling, stops = sampling or Sampling(), frozenset(stop)
    generator = sampling.generator()
    state = prefill(engine, prompts, chunk, padding)
    running = set(range(len(prompts)))
    tokens = sampling.choose(state.logits, generator)
    for count in range(1, max_new_tokens + 1):
        for row in sorted(running):
            token = int(tokens[row])
            last = token in stops or count == max_new_tokens
            if last:
                running.discard(row)
            yield Token(row, token, last)
        if not running:
            return
        chosen = greedy_step(engine, state, tokens) if sampling.temperature == 0 else None
        if chosen is not None:
            tokens, state = chosen
        else:
            state = decode_step(engine, state, tokens)
            tokens = sampling.choose(state.logits, generator)


def _room(engine: Engine, prompts: Sequence[Prompt]) -> int:
    """Tokens that every prompt leaves up to the model's largest position."""
    positions = engine.facts.get("max_positions")
    if positions is None:
        return sys.maxsize
    longest = max((prompt.next_position for prompt in prompts), default=0)
    if longest > positions:
        raise UsageError(
            f"a prompt takes {longest} positions; the model has {positions}",
            hint="shorten the prompt, or use fewer or smaller images",
        )
    # The last token is chosen, not read: it needs no position.
    return int(positions) - longest + 1


def generate_batch(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    stop: Iterable[int] | None = None,
    sampling: Sampling | None = None,
    chunk: int | None = None,
    padding: Padding = "right",
    on_token: Callable[[Token], None] | None = None,
) -> list[GenerationResult]:
    """Answers to several prompts at once, in their order.

    ``stop`` defaults to the program's end-of-text tokens (:func:`stop_tokens`). Without
    ``tokenizer`` the results have no text.
    """
    stops = frozenset(stop_tokens(engine.facts, tokenizer) if stop is None else stop)
    results = [GenerationResult(prompt_tokens=len(prompt)) for prompt in prompts]
    begin = time.perf_counter()
    for token in steps(
        engine,
        prompts,
        max_new_tokens=max_new_tokens,
        stop=stops,
        sampling=sampling,
        chunk=chunk,
        padding=padding,
    ):
        result = results[token.row]
        result.seconds = time.perf_counter() - begin
        result.time_to_first_token = result.time_to_first_token or result.seconds
        if token.id in stops:
            result.finish = "stop"
        else:
            result.tokens.append(token.id)
        if on_token is not None:
            on_token(token)
    if tokenizer is not None:
        for result in results:
            result.text = decode_text(tokenizer, result.tokens)
    return results


def generate(
    engine: Engine,
    prompt: Prompt,
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    stop: Iterable[int] | None = None,
    sampling: Sampling | None = None,
    chunk: int | None = None,
    on_token: Callable[[Token], None] | None = None,
) -> GenerationResult:
    """The answer to one prompt; see :func:`generate_batch`."""
    return generate_batch(
        engine,
        [prompt],
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        stop=stop,
        sampling=sampling,
        chunk=chunk,
        on_token=on_token,
    )[0]


def stop_tokens(facts: Any, tokenizer: Any = None) -> list[int]:
    """Ids that end an answer: ``facts["eos_token_ids"]``, else the tokenizer's end-of-text."""
    ids = facts.get("eos_token_ids")
    if ids:
        return [int(token) for token in ids]
    token = getattr(tokenizer, "eos_token_id", None)
    return [] if token is None else [int(token)]
