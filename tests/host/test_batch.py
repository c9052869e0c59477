"""Padding, attention masks, and a KV cache whose keys are not in natural order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mqc.errors import UsageError
from mqc.host import KeyTable, Prompt, decode_step, make_batch, prefill
from mqc.host.batch import chunk_ends
from mqc.host.engine import Cache, Engine


def prompt(size: int, visual: Sequence[int] = (), start: int = 10) -> Prompt:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(visual)] = True
    return Prompt(torch.arange(start, start + size), mask, torch.arange(size), size)


def test_padding() -> None:
    prompts = [prompt(2), prompt(4, [1, 2], start=20)]
    right, left = make_batch(prompts, "right", pad_id=1), make_batch(prompts, "left", pad_id=1)
    assert right.input_ids.tolist() == [[10, 11, 1, 1], [20, 21, 22, 23]]
    assert left.input_ids.tolist() == [[1, 1, 10, 11], [20, 21, 22, 23]]
    assert left.position_ids.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert left.visual_mask.tolist() == [[False] * 4, [False, True, True, False]]
    assert left.valid.tolist() == [[False, False, True, True], [True] * 4]
    assert right.last.tolist() == [1, 3] and left.last.tolist() == [3, 3]
    assert left.next_position.tolist() == [2, 4]


def test_padding_of_three_axes() -> None:
    one = prompt(2)
    three = Prompt(one.input_ids, one.visual_mask, torch.arange(6).reshape(3, 2), 6)
    longer = Prompt(torch.arange(3), torch.zeros(3).bool(), torch.arange(9).reshape(3, 3), 9)
    batch = make_batch([three, longer], "left")
    assert batch.position_ids.shape == (3, 2, 3)
    assert batch.position_ids[:, 0].tolist() == [[0, 0, 1], [0, 2, 3], [0, 4, 5]]
    assert batch.position_ids[:, 1].equal(longer.position_ids)


def test_bad_batches() -> None:
    with pytest.raises(UsageError, match="no prompt"):
        make_batch([])
    with pytest.raises(UsageError, match="no tokens"):
        make_batch([prompt(0)])
    with pytest.raises(UsageError, match="'odd'"):
        KeyTable(1).append(torch.ones(1, 1).bool(), torch.ones(1, 1).bool(), "odd")


def test_mask_of_left_padding() -> None:
    valid = torch.tensor([[False, True, True]])
    table = KeyTable(1)
    assert table.mask(valid)[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    table.append(torch.zeros_like(valid), valid)
    one = torch.ones(1, 1, dtype=torch.bool)
    assert table.mask(one)[0, 0].int().tolist() == [[0, 1, 1, 1]]


def test_windows_count_tokens_and_not_slots() -> None:
    """A row looks back over padding (False) without counting it, and never past its window."""
    valid = torch.tensor([[True, True, False], [False, True, True]])
    table = KeyTable(2, (None, 2))
    mask = table.mask(valid).int()
    assert mask[:, 1].tolist() == [
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]],
        [[1, 0, 0], [0, 1, 0], [0, 1, 1]],
    ]
    table.append(torch.zeros_like(valid), valid)
    new = table.mask(torch.ones(2, 2, dtype=torch.bool)).int()
    assert new[:, 0].tolist() == [
        [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]],
        [[0, 1, 1, 1, 0], [0, 1, 1, 1, 1]],
    ]
    assert new[:, 1].tolist() == [
        [[0, 1, 0, 1, 0], [0, 0, 0, 1, 1]],
        [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]],
    ]


def test_window_under_aifs_follows_tokens() -> None:
    visual = torch.tensor([[False, True, False]])
    table = KeyTable(1, (2,))
    table.append(visual, torch.ones_like(visual), "aifs")
    assert table.rank.tolist() == [[1, 0, 2]]
    assert table.mask(torch.ones(1, 1).bool())[0, 0].int().tolist() == [[0, 0, 1, 1]]


def test_blocks_see_each_other_both_ways() -> None:
    valid = torch.tensor([[True, True, True, True, False]])
    blocks = torch.tensor([[-1, 0, 0, 1, 1]])
    full, near = KeyTable(1, (None, 2)).mask(valid, blocks)[0].int().tolist()
    assert full == [
        [1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    assert near[2] == [0, 1, 1, 0, 0] and near[1] == [1, 1, 1, 0, 0]


def test_chunks_do_not_split_blocks() -> None:
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1], [-1, -1, -1, -1, -1, -1, -1, -1]])
    assert chunk_ends(blocks, 2) == [4, 6, 8]
    assert chunk_ends(blocks, 3) == [4, 8]
    assert chunk_ends(blocks, 8) == [8]
    assert chunk_ends(torch.full((1, 5), -1), 2) == [2, 4, 5]
    assert chunk_ends(torch.zeros(1, 5), 2) == [5]


def test_aifs_slots() -> None:
    visual = torch.tensor([[False, True, False, True], [False, False, True, False]])
    valid = torch.tensor([[True, True, True, True], [False, True, True, True]])
    table = KeyTable(2)
    table.append(visual, valid, "aifs")
    assert table.order.tolist() == [[1, 3, 0, 2], [2, 0, 1, 3]]
    assert table.valid.tolist() == [[True] * 4, [True, False, True, True]]
    table.append(torch.zeros(2, 1).bool(), torch.ones(2, 1).bool(), "aifs")
    assert table.order[:, 4].tolist() == [4, 4] and len(table) == 5


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_mask_is_the_definition(data: st.DataObject) -> None:
    """Whatever the calls and their orders: row i sees slot j iff j is valid and not later."""
    rows = data.draw(st.integers(1, 3))
    aifs = data.draw(st.booleans())
    table = KeyTable(rows)
    tokens: list[list[tuple[int, bool]]] = [[] for _ in range(rows)]  # (causal index, valid)
    for _ in range(data.draw(st.integers(1, 3))):
        size = data.draw(st.integers(1, 4))
        bits = st.lists(st.booleans(), min_size=size, max_size=size)
        valid = torch.tensor([data.draw(bits) for _ in range(rows)])
        visual = torch.tensor([data.draw(bits) for _ in range(rows)]) & valid
        mask = table.mask(valid)
        past = len(table)
        assert mask.shape == (rows, 1, size, past + size) and mask.any(-1).all()
        for b in range(rows):
            new = [(past + i, bool(valid[b, i])) for i in range(size)]
            for i, (index, ok) in enumerate(new):
                slots = tokens[b] + new
                expected = [(o and ok and j <= index) or j == index for j, o in slots]
                assert mask[b, 0, i].tolist() == expected
            order = sorted(range(size), key=lambda i: not visual[b, i]) if aifs else range(size)
            tokens[b] += [new[i] for i in order]
        table.append(visual, valid, "aifs" if aifs else None)


class VisualFirst:
    """An engine whose decoder works, and keeps its cache, in visual-first order."""

    def __init__(self, engine: Engine) -> None:
        self.inner = engine
        self.facts: Mapping[str, Any] = {**engine.facts, "kv_order": "aifs"}
        self.vision, self.embed = engine.vision, engine.embed
        self.empty_cache = engine.empty_cache

    def decoder(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor,
        logit_index: torch.Tensor,
        modality: torch.Tensor,
        cache: Cache,
    ) -> tuple[torch.Tensor, Cache]:
        order = torch.argsort((~modality).to(torch.int8), dim=1, stable=True)
        size, past = order.shape[1], mask.shape[-1] - order.shape[1]
        columns = torch.arange(past).expand(len(order), -1)
        columns = torch.cat([columns, order + past], dim=1)
        mask = mask.gather(2, order[:, None, :, None].expand_as(mask))
        mask = mask.gather(3, columns[:, None, None, :].expand_as(mask))
        return self.inner.decoder(
            inputs_embeds.gather(1, order[..., None].expand_as(inputs_embeds)),
            position_ids.gather(-1, order.expand_as(position_ids)),
            mask,
            order.argsort(dim=1).gather(1, logit_index.clamp(0, size - 1)),
            modality.gather(1, order),
            cache,
        )


@pytest.mark.parametrize("chunk", [None, 13])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_visual_first_cache_changes_nothing(name: str, padding: str, chunk: int | None) -> None:
    run = tiny.runnable(name)
    prompts = [run.prompt(messages) for messages in tiny.conversations().values()]
    states = [
        prefill(engine, prompts, chunk, padding)  # type: ignore[arg-type]
        for engine in (run.engine, VisualFirst(run.engine))
    ]
    assert not states[0].keys.order.equal(states[1].keys.order)
    for token in (11, 12, 13):
        torch.testing.assert_close(states[1].logits, states[0].logits, rtol=1e-4, atol=1e-4)
        tokens = torch.full((len(prompts),), token)
        states[0] = decode_step(run.engine, states[0], tokens)
        states[1] = decode_step(VisualFirst(run.engine), states[1], tokens)
