"""Decode steps recorded for one batch bucket: static buffers in, static results out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mqc.backends.cuda.executor import Arena, Call, Executor
from mqc.backends.cuda.graphs import Recorder
from mqc.backends.cuda.plan import Value
from mqc.backends.cuda.slots import Slot
from mqc.ir import Port
from mqc.ir.types import is_cache


@dataclass(frozen=True)
class _Left:
    """What a step left on the device, but for the tokens that it chose."""

    past: int
    positions: Tensor
    mask: Tensor


class DecodeStep:
    """One token for every sequence of a slot.

    The recorded step starts from token ids, and ends with the next ones: it appends a row to the
    cache, moves ``past`` and the positions on and opens the mask's next column, all on the device,
    so that replays may follow each other without the host (but for masks of windows, whose columns
    also close: those start anew). The memory of recurrent layers is rewritten in place.

    Args:
        decoder, embed: executors.
        values: the decoder's memory plan.
        slot: whose caches it reads and writes.
        axes: leading axes of the position ids, () or (3,).
        record: makes the replay.
    """

    @torch.inference_mode(False)  # its inputs are written in any mode
    def __init__(
        self,
        decoder: Executor,
        embed: Executor,
        values: list[Value],
        slot: Slot,
        axes: tuple[int, ...],
        record: Recorder,
    ) -> None:
        self.slot = slot
        self._decoder, self._embed = decoder, embed
        device, batch = decoder.kernels.device, slot.batch
        sizes = {"batch": batch, "tokens": 1, "rows": 1, "capacity": slot.capacity}
        self.arena = Arena(values, sizes, device)
        self._embed_arena = Arena((), {}, device)
        integers: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self.ids = torch.zeros(batch, 1, **integers)
        self.positions = torch.zeros(*axes, batch, 1, **integers)
        # Warm-up writes the last row of the cache, which no sequence has reached.
        self.past = torch.full((1,), slot.capacity - 1, **integers)
        planes = int(decoder.component.input("mask").type.shape[1])
        self.mask = torch.ones(batch, planes, 1, slot.capacity, dtype=torch.bool, device=device)
        self._left: _Left | None = None
        self._chosen: Tensor | None = None
        self._constants = self._constant_inputs(decoder.component.inputs)
        with torch.inference_mode():
            self._known = decoder.constants(self._constants, Call(self.arena))
        before = [value.clone() for value in slot.memory]
        self._replay, (self.tokens, self.logits) = record(self._step)
        for value, kept in zip(slot.memory, before, strict=True):  # what warm-up has rewritten
            value.copy_(kept)

    def _constant_inputs(self, ports: list[Port]) -> dict[str, Tensor]:
        """A text token's inputs: not visual, nothing from the tower, the only row is wanted."""
        device, batch = self._decoder.kernels.device, self.slot.batch
        found = {}
        for port in ports:
            if port.name in ("inputs_embeds", "position_ids", "mask", "past"):
                continue
            if is_cache(port):
                continue
            shape = [size if isinstance(size, int) else 1 for size in port.type.shape]
            shape[port.axes.index("batch")] = batch
            found[port.name] = torch.zeros(shape, dtype=port.type.dtype, device=device)
        return found

    def _step(self) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            (embeds,) = self._embed.run({"input_ids": self.ids}, Call(self._embed_arena))
            ports = self._decoder.component.inputs
            kinds = {port.name: port.type.dtype for port in ports}
            inputs: dict[str, Any] = {
                **self._constants,
                "inputs_embeds": embeds.to(kinds["inputs_embeds"]),
                "position_ids": self.positions,
                "mask": self.mask,
                "past": self.past,
            }
            names = [port.name for port in ports if "capacity" in port.axes]
            inputs.update(zip(names, self.slot.caches, strict=True))
            names = [port.name for port in ports if "memory" in port.axes]
            inputs.update(zip(names, self.slot.memory, strict=True))
            found = self._decoder.run(inputs, Call(self.arena), self._known)
            made = zip(self._decoder.component.outputs, found, strict=True)
            new = [value for port, value in made if "memory" in port.axes]
            for old, value in zip(self.slot.memory, new, strict=True):
                old.copy_(value)
            logits = found[0][:, 0]
            tokens = self._decoder.kernels.argmax(logits)
            self.ids.copy_(tokens[:, None])
            self.positions.add_(1)
            self.past.add_(1).clamp_(max=self.slot.capacity - 1)
            self.mask.index_fill_(3, self.past, True)
            return tokens, logits

    def start(self, tokens: Tensor, positions: Tensor, mask: Tensor, past: int) -> None:
        """Set the inputs: tokens int64 [B], positions [.., B, 1], mask bool [B, M, 1, past + 1].

        Rows of the bucket beyond B repeat nothing: they attend their own token alone.
        """
        self._left = None
        batch = tokens.shape[0]
        self.ids[:batch, 0].copy_(tokens)
        self.positions[..., :batch, :].copy_(positions)
        self.past.fill_(past)
        columns = torch.zeros(self.mask.shape, dtype=torch.bool)
        columns[:batch, ..., : past + 1] = mask
        columns[:, ..., past] = True
        self.mask.copy_(columns)

    def run(self) -> None:
        """One step: ``tokens`` int64 [bucket] and ``logits`` [bucket, vocab] are new afterwards."""
        self._left = self._chosen = None
        self._replay()

    def chosen(self, batch: int) -> Tensor:
        """The tokens that the last step found likeliest, int64 [batch] on the CPU."""
        self._chosen = self.tokens[:batch].cpu()
        return self._chosen.clone()

    def advance(self, tokens: Tensor, positions: Tensor, mask: Tensor, past: int) -> None:
        """:meth:`start` and :meth:`run`; where the sequences go on, only their tokens are sent, and
        not even those where they are the ones that were chosen."""
        if not self._goes_on(positions, mask, past):
            self.start(tokens, positions, mask, past)
        elif self._chosen is None or not self._chosen.equal(tokens):
            self.ids[: tokens.shape[0], 0].copy_(tokens)
        self.run()
        self._left = _Left(past + 1, positions + 1, mask)

    def _goes_on(self, positions: Tensor, mask: Tensor, past: int) -> bool:
        """Whether the last step has set all inputs but the tokens. Masks of windows start anew."""
        left = self._left
        if left is None or left.past != past or mask.shape[1] != 1:
            return False
        same = left.positions.equal(positions) and left.mask.equal(mask[..., :-1])
        return same and bool(mask[..., -1].all())


def sizes_of(ports: list[Port], inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Values of the symbols in ports' shapes that inputs decide: ``s`` and ``4*s`` alike."""
    found: dict[str, int] = {}
    for port in ports:
        value = inputs.get(port.name)
        if value is None:
            continue
        for size, actual in zip(port.type.shape, value.shape, strict=True):
            factor, _, symbol = str(size).rpartition("*")
            if isinstance(size, str) and symbol.isidentifier() and (not factor or factor.isdigit()):
                found[symbol] = actual // int(factor or 1)
    return found
