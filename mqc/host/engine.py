"""The protocol between host and target, and the two things a language model does: read and write.

An engine computes; it knows nothing of prompts, padding or masks. All tensors that the host makes
(ids, positions, masks) are on the CPU; what an engine returns may live on its own device and is
handed back to it unread, but for embeddings and logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

from mqc.errors import UsageError
from mqc.host.batch import Batch, KeyTable, Padding, chunk_ends, make_batch
from mqc.host.prompt import Prompt

Cache = Sequence[Any]
"""An engine's KV cache: one entry per decoder port ``past_key_0, past_value_0, ...`` (or
``key_cache_0, ...``, see :mod:`mqc.host.cache`), in order of the ports. Only the engine looks
inside, and a call may write into what it is given: a cache is continued once."""


class Engine(Protocol):
    """The three components of a compiled model, callable."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """The program's facts (``kv_order``, token ids, ...)."""

    def vision(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One call of tower and connector, inputs by port name -> float [visual_tokens, hidden].

        A tower with several outputs (``facts["deepstack"]``) gives them side by side, the
        embeddings first: [visual_tokens, (1 + outputs) * hidden].
        """

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """int64 [B, T] -> float [B, T, hidden]."""

    def empty_cache(self, batch: int) -> Cache:
        """A cache of ``batch`` sequences with no past."""

    def decoder(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor,
        logit_index: torch.Tensor,
        modality: torch.Tensor,
        cache: Cache,
    ) -> tuple[torch.Tensor, Cache]:
        """One pass over T new rows.

        Args:
            inputs_embeds: float [B, T, hidden], or wider where the tower has side outputs: see
                :func:`spread`.
            position_ids: int64 [B, T] or [3, B, T].
            mask: bool [B, M, T, past + T], True = may attend (:class:`KeyTable`); M is 1, or one
                for each entry of ``facts["attention_windows"]``.
            logit_index: int64 [B, R], the rows that logits are wanted of.
            modality: bool [B, T], True = visual row; ignored by a decoder without that input.
            cache: what :meth:`empty_cache` or the last call returned.

        Returns:
            (logits float [B, R, vocab], the cache with the T new rows).
        """


class GreedyEngine(Engine, Protocol):
    """An engine with steps of its own for one new token a sequence, from ids on; they choose the
    likeliest token where the logits are computed."""

    @property
    def greedy(self) -> bool:
        """Whether this program allows it."""

    def logits_step(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        cache: Cache,
    ) -> tuple[torch.Tensor, Cache]:
        """Append ``tokens`` as :meth:`greedy_step` does; logits float32 [B, vocab] on the CPU."""

    def greedy_step(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        cache: Cache,
    ) -> tuple[torch.Tensor, Cache]:
        """Append ``tokens`` (int64 [B]) and return what follows (int64 [B], on the CPU).

        ``positions``: int64 [B, 1] or [3, B, 1]; ``mask``: bool [B, M, 1, past + 1].
        """


@dataclass
class State:
    """Sequences that an engine has read.

    ``logits``: float32 [B, vocab] of each sequence's last token; ``next_position``: int64 [B];
    ``axes``: leading axes of the position ids, () or (3,).
    """

    cache: Cache
    keys: KeyTable
    next_position: torch.Tensor
    logits: torch.Tensor
    axes: tuple[int, ...]


def see(engine: Engine, calls: Sequence[Mapping[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Rows of every vision call; a tower that takes tiles gets the tiles of all calls at once.

    ``facts["tiles"]`` says that all inputs of the tower count tiles on their first axis, each
    giving the same number of rows. Calls whose inputs differ in another size are made one by one.
    """
    shapes = {tuple((name, *value.shape[1:]) for name, value in call.items()) for call in calls}
    if len(shapes) != 1 or not engine.facts.get("tiles"):
        return [engine.vision(call) for call in calls]
    counts = [next(iter(call.values())).shape[0] for call in calls]
    rows = engine.vision({name: torch.cat([call[name] for call in calls]) for name in calls[0]})
    return list(rows.split([count * (rows.shape[0] // sum(counts)) for count in counts]))


def spread(
    inputs_embeds: torch.Tensor, side: Sequence[str], hidden: int
) -> dict[str, torch.Tensor]:
    """The decoder's inputs that ``inputs_embeds`` [B, T, (1 + len(side)) * hidden] stands for.

    Each is [B, T, hidden]: ``inputs_embeds``, then those that ``side`` (``facts["deepstack"]``)
    names. Where only the embeddings are given, as in decoding, the others are zero.
    """
    if inputs_embeds.shape[-1] == hidden:
        zero = torch.zeros_like(inputs_embeds) if side else None
        return {"inputs_embeds": inputs_embeds, **dict.fromkeys(side, zero)}  # type: ignore[dict-item]
    parts = inputs_embeds.split(hidden, dim=-1)
    return dict(zip(("inputs_embeds", *side), parts, strict=True))


def merge(engine: Engine, prompts: Sequence[Prompt], batch: Batch) -> torch.Tensor:
    """Embeddings [B, S, hidden] with the vision tower's rows in the visual places.

    Where the tower gives wider rows (:func:`spread`), text rows are padded with zeros.

    Raises :class:`UsageError` where the tower gives another number of rows than the prompt has
    image and video tokens.
    """
    # An image token may lie outside the vocabulary; its row is replaced anyway.
    ids = batch.input_ids.masked_fill(batch.visual_mask, 0)
    embeds = _copy(engine.embed(ids))
    seen = iter(see(engine, [call for prompt in prompts for call in prompt.vision_calls]))
    for index, prompt in enumerate(prompts):
        wanted = int(prompt.visual_mask.sum())
        pieces = [next(seen) for _ in prompt.vision_calls]
        given = sum(piece.shape[0] for piece in pieces)
        if wanted != given:
            raise UsageError(
                f"prompt {index} has {wanted} image tokens, but its {len(pieces)} images give "
                f"{given} rows",
                hint="give images as message parts and leave image tokens out of the text",
            )
        if pieces:
            rows = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(embeds)
            if prompt.visual_order is not None:
                rows = rows[prompt.visual_order.to(rows.device)]
            wider = rows.shape[-1] - embeds.shape[-1]
            embeds = torch.nn.functional.pad(embeds, (0, wider)) if wider else embeds
            _put(embeds[index], batch.visual_mask[index], rows)
    return embeds


def _copy(embeds: torch.Tensor) -> torch.Tensor:
    """A copy to write to. Here and below NumPy does a CPU's work: torch's threads would wait for
    cores on which those of an engine still spin."""
    if embeds.device.type == "cpu" and embeds.dtype == torch.float32:
        return torch.from_numpy(embeds.detach().numpy().copy())
    return embeds.clone()


def _put(embeds: torch.Tensor, where: torch.Tensor, rows: torch.Tensor) -> None:
    """Write ``rows`` [n, hidden] to those places of ``embeds`` [T, hidden] that ``where`` names."""
    if embeds.device.type == "cpu" and embeds.dtype == torch.float32:
        embeds.numpy()[where.numpy()] = rows.detach().numpy()
    else:
        embeds[where.to(embeds.device)] = rows


def prefill(
    engine: Engine,
    prompts: Sequence[Prompt],
    chunk: int | None = None,
    padding: Padding = "right",
) -> State:
    """Read prompts, at most ``chunk`` tokens a call (None: as the engine likes it best)."""
    batch = make_batch(prompts, padding)
    rows = batch.last[:, None]
    logits, cache, keys = read(engine, merge(engine, prompts, batch), batch, rows, chunk)
    axes = tuple(batch.position_ids.shape[:-2])
    return State(cache, keys, batch.next_position.clone(), logits[:, 0], axes)


def read(
    engine: Engine,
    embeds: torch.Tensor,
    batch: Batch,
    rows: torch.Tensor,
    chunk: int | None = None,
) -> tuple[torch.Tensor, Cache, KeyTable]:
    """Run the decoder over a merged batch; return logits of ``rows`` (int64 [B, R] columns).

    Returns (logits float32 on the CPU [B, R, vocab], cache, keys). Chunks give the same result as
    one call; each asks for as many logits rows as it holds at most. A chunk is longer where it
    would split a block of tokens that attend each other both ways. Without ``chunk`` it is the
    engine's own ``chunk``, or everything at once where it has none.
    """
    if chunk is not None and chunk < 1:
        raise UsageError(f"a chunk of {chunk} tokens is not possible", hint="use 1 or more")
    count, size = batch.valid.shape
    keys = KeyTable(count, engine.facts.get("attention_windows", (None,)))
    cache = engine.empty_cache(count)
    positions = batch.position_ids
    if engine.facts.get("recurrent"):  # how such a decoder knows rows of padding
        positions = positions.masked_fill(~batch.valid, -1)
    result: torch.Tensor | None = None
    start = 0
    step = chunk or getattr(engine, "chunk", None) or size
    for end in chunk_ends(batch.blocks, step):
        part, start = slice(start, end), end
        inside = (rows >= part.start) & (rows < part.stop)
        wanted = inside.any(dim=0)
        index = (rows[:, wanted] - part.start).clamp(0, part.stop - part.start - 1)
        if not bool(wanted.any()):
            index = torch.zeros(count, 1, dtype=torch.int64)
        valid, visual = batch.valid[:, part], batch.visual_mask[:, part]
        logits, cache = engine.decoder(
            embeds[:, part],
            positions[..., part],
            keys.mask(valid, batch.blocks[:, part]),
            index,
            visual,
            cache,
        )
        keys.append(visual, valid, engine.facts.get("kv_order"))
        if result is None:
            result = torch.zeros(*rows.shape, logits.shape[-1])
        if bool(wanted.any()):
            new = logits.to("cpu", torch.float32)
            result[:, wanted] = torch.where(inside[:, wanted, None], new, result[:, wanted])
    assert result is not None
    return result, cache, keys


def greedy_step(
    engine: Engine, state: State, tokens: torch.Tensor
) -> tuple[torch.Tensor, State] | None:
    """The likeliest tokens after ``tokens`` where the engine finds them itself, else None.

    ``logits`` of the new state are those of the old one.
    """
    if not getattr(engine, "greedy", False):
        return None
    chooser = cast(GreedyEngine, engine)
    count = tokens.shape[0]
    valid, visual = torch.ones(count, 1, dtype=torch.bool), torch.zeros(count, 1, dtype=torch.bool)
    positions = state.next_position[:, None].expand(*state.axes, count, 1)
    mask = state.keys.mask(valid)
    found, cache = chooser.greedy_step(tokens, positions.contiguous(), mask, state.cache)
    state.keys.append(visual, valid, engine.facts.get("kv_order"))
    return found, State(cache, state.keys, state.next_position + 1, state.logits, state.axes)


def decode_step(engine: Engine, state: State, tokens: torch.Tensor) -> State:
    """Append one token to every sequence; ``tokens``: int64 [B]."""
    count = tokens.shape[0]
    valid = torch.ones(count, 1, dtype=torch.bool)
    visual = torch.zeros(count, 1, dtype=torch.bool)
    positions = state.next_position[:, None].expand(*state.axes, count, 1).contiguous()
    mask = state.keys.mask(valid)
    if getattr(engine, "greedy", False):
        last, cache = cast(GreedyEngine, engine).logits_step(tokens, positions, mask, state.cache)
    else:
        rows = torch.zeros(count, 1, dtype=torch.int64)
        embeds = engine.embed(tokens[:, None])
        logits, cache = engine.decoder(embeds, positions, mask, rows, visual, state.cache)
        last = logits[:, 0].to("cpu", torch.float32)
    state.keys.append(visual, valid, engine.facts.get("kv_order"))
    return State(cache, state.keys, state.next_position + 1, last, state.axes)
