"""Batches of prompts of different lengths, and which keys each of their rows may attend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from mqc.errors import UsageError
from mqc.host.prompt import Prompt

Padding = Literal["left", "right"]

AIFS = "aifs"
"""Value of ``facts["kv_order"]`` for a decoder whose new keys enter the cache visual-first."""


@dataclass(frozen=True)
class Batch:
    """B prompts padded to S tokens.

    Attributes:
        input_ids: int64 [B, S].
        visual_mask: bool [B, S], False in padding.
        valid: bool [B, S], False in padding.
        position_ids: int64 [B, S] or [3, B, S], 0 in padding.
        first: int64 [B], column of each prompt's first token.
        lengths: int64 [B].
        next_position: int64 [B].
        blocks: int64 [B, S], tokens of one number >= 0 attend each other both ways; -1: causal.
    """

    input_ids: torch.Tensor
    visual_mask: torch.Tensor
    valid: torch.Tensor
    position_ids: torch.Tensor
    first: torch.Tensor
    lengths: torch.Tensor
    next_position: torch.Tensor
    blocks: torch.Tensor

    @property
    def last(self) -> torch.Tensor:
        """int64 [B], column of each prompt's last token."""
        return self.first + self.lengths - 1


def make_batch(prompts: Sequence[Prompt], padding: Padding = "right", pad_id: int = 0) -> Batch:
    """Pad prompts on the left or on the right. Raises :class:`UsageError` for none, or empty."""
    if not prompts:
        raise UsageError("there is no prompt to run", hint="give at least one prompt")
    if any(len(prompt) == 0 for prompt in prompts):
        raise UsageError("a prompt has no tokens", hint="give some text")
    count, size = len(prompts), max(len(prompt) for prompt in prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    first = torch.zeros(count, dtype=torch.int64) if padding == "right" else size - lengths
    columns = torch.arange(size)
    valid = (columns >= first[:, None]) & (columns < (first + lengths)[:, None])
    input_ids = torch.full((count, size), pad_id, dtype=torch.int64)
    input_ids[valid] = torch.cat([prompt.input_ids for prompt in prompts])
    visual_mask = torch.zeros(count, size, dtype=torch.bool)
    visual_mask[valid] = torch.cat([prompt.visual_mask for prompt in prompts])
    position_ids = torch.zeros(*prompts[0].position_ids.shape[:-1], count, size, dtype=torch.int64)
    position_ids[..., valid] = torch.cat([prompt.position_ids for prompt in prompts], dim=-1)
    next_position = torch.tensor([prompt.next_position for prompt in prompts])
    blocks = torch.full((count, size), -1, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        if prompt.blocks is not None:
            blocks[row, valid[row]] = prompt.blocks
    return Batch(input_ids, visual_mask, valid, position_ids, first, lengths, next_position, blocks)


class KeyTable:
    """What each slot of the KV cache holds, for each sequence of a batch.

    Attributes:
        windows: one entry per mask that the decoder takes (``facts["attention_windows"]``): how
            many tokens back a row may look, itself included, or None for all.
        valid: bool [B, past], False where a slot holds a padding row's key.
        order: int64 [B, past], causal index of each slot's token. Slots need not be in causal
            order: a decoder under AIFS (MQuant, arXiv 2502.00425, section 3.3) stores the keys of
            each call visual-first.
        rank: int64 [B, past], the same without padding: the number of tokens before this one.
    """

    def __init__(self, batch: int, windows: Sequence[int | None] = (None,)) -> None:
        self.windows = tuple(windows)
        self._used = 0
        self._valid = torch.zeros(batch, 0, dtype=torch.bool)
        self._order = torch.zeros(batch, 0, dtype=torch.int64)
        self._rank = torch.zeros(batch, 0, dtype=torch.int64)
        self._count = torch.zeros(batch, 1, dtype=torch.int64)

    def __len__(self) -> int:
        return self._used

    @property
    def valid(self) -> torch.Tensor:
        return self._valid[:, : self._used]

    @property
    def order(self) -> torch.Tensor:
        return self._order[:, : self._used]

    @property
    def rank(self) -> torch.Tensor:
        return self._rank[:, : self._used]

    def mask(self, valid: torch.Tensor, blocks: torch.Tensor | None = None) -> torch.Tensor:
        """Who may attend whom in a call with T new rows; ``valid``: bool [B, T].

        ``blocks`` (int64 [B, T], see :class:`Batch`) lets the new rows of one block see each other
        both ways. Returns bool [B, windows, T, past + T], True = may attend. Columns of the past
        follow the cache, columns of the new rows are in natural order. A padding row attends
        itself alone, so that no row's softmax is empty.
        """
        new, padded = valid.shape[1], not bool(valid.all())
        if new == 1 and not padded and self.windows == (None,):  # a decode step: all keys but holes
            return torch.nn.functional.pad(self.valid[:, None, None], (0, 1), value=True)
        # NumPy: torch's threads would wait for cores on which those of an engine still spin.
        past, rows = len(self), valid.numpy()
        seen = np.tri(new, dtype=bool)[None]
        if blocks is not None and bool((blocks >= 0).any()):
            number = blocks.numpy()
            together = number[:, :, None] == number[:, None, :]
            seen = seen | (together & (number >= 0)[:, :, None])
        allowed = np.empty((len(rows), new, past + new), bool)
        allowed[:, :, :past] = self.valid.numpy()[:, None, :]
        np.logical_and(seen, rows[:, None, :], out=allowed[:, :, past:])
        itself = np.arange(new), past + np.arange(new)
        if padded:
            allowed &= rows[:, :, None]
            allowed[:, *itself] = True
        if self.windows == (None,):
            return torch.from_numpy(allowed[:, None])
        rank = self._ranks(valid)
        back = (rank[:, :, None] - torch.cat([self.rank, rank], dim=1)[:, None, :]).numpy()
        near = [None if window is None else back < window for window in self.windows]
        masks = [allowed if inside is None else allowed & inside for inside in near]
        result = np.stack(masks, axis=1)
        result[:, :, *itself] = True
        return torch.from_numpy(result)

    def append(
        self, visual_mask: torch.Tensor, valid: torch.Tensor, kv_order: str | None = None
    ) -> None:
        """Record the keys of a call; ``visual_mask`` and ``valid``: bool [B, T], natural order.

        ``kv_order`` is the program's ``facts["kv_order"]``: None (slots in natural order) or
        ``"aifs"`` (visual rows first, each group in natural order).
        """
        start, end = self._used, self._used + valid.shape[1]
        order = torch.arange(start, end).expand(valid.shape)
        rank = self._ranks(valid)
        self._count += valid.sum(1, keepdim=True)
        if kv_order == AIFS and valid.shape[1] > 1:
            index = torch.argsort((~visual_mask).to(torch.int8), dim=1, stable=True)
            order, valid, rank = (v.gather(1, index) for v in (order, valid, rank))
        elif kv_order not in (None, "natural", AIFS):
            raise UsageError(f"unknown order of the KV cache: {kv_order!r}")
        self._reserve(end)
        for table, new in ((self._valid, valid), (self._order, order), (self._rank, rank)):
            table[:, start:end] = new
        self._used = end

    def _reserve(self, rows: int) -> None:
        """Room for ``rows`` slots, doubled where there is none: a step of decoding copies none."""
        if rows > self._valid.shape[1]:
            more = (0, max(rows, 2 * self._used) - self._valid.shape[1])
            pad = torch.nn.functional.pad
            self._valid, self._order = pad(self._valid, more), pad(self._order, more)
            self._rank = pad(self._rank, more)

    def _ranks(self, valid: torch.Tensor) -> torch.Tensor:
        """Ranks of new rows: int64 [B, T]."""
        return self._count + valid.to(torch.int64).cumsum(1) - 1


def chunk_ends(blocks: torch.Tensor, step: int) -> list[int]:
    """Where calls of about ``step`` columns end, so that none splits a block.

    ``blocks``: int64 [B, S] of :class:`Batch`. Rows of one block must be in one call, for they see
    each other both ways; a block longer than ``step`` makes its call longer.
    """
    size = blocks.shape[1]
    inside = (blocks[:, 1:] == blocks[:, :-1]) & (blocks[:, 1:] >= 0)
    split = [bool(column) for column in inside.any(dim=0)]  # column i: between i and i + 1
    ends: list[int] = []
    start = 0
    while start < size:
        end = min(start + step, size)
        while end < size and split[end - 1]:
            end += 1
        ends.append(end)
        start = end
    return ends
