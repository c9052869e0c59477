"""Where keys, values and recurrent memory of running sequences live: buffers, lent and reused.

A slot belongs to a batch bucket and a capacity; recorded decode steps hold its addresses, so a slot
whose sequences have ended is kept for the next ones with everything recorded for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mqc.backends.cuda.kernels import CacheTensor
from mqc.host.cache import next_capacity
from mqc.ir import Port
from mqc.ir.symbols import evaluate_shape

IDLE = 2
"""Slots kept for reuse."""


def bucket(batch: int) -> int:
    """The batch size that is recorded for ``batch`` sequences: the next power of two."""
    return 1 << (batch - 1).bit_length()


@dataclass
class Slot:
    """Caches of a batch bucket, in order of the decoder's ports, and steps recorded on them.

    ``memory``: of recurrent layers, [batch, ...] each; a call rewrites it in place. It has no rows
    that a mask could hide, so it is cleared for new sequences.
    """

    batch: int
    capacity: int
    caches: list[CacheTensor]
    memory: list[Tensor] = field(default_factory=list)
    recorded: dict[str, Any] = field(default_factory=dict)


class Lease:
    """A slot in use; it goes back to the pool when nothing refers to the lease."""

    def __init__(self, pool: SlotPool, slot: Slot) -> None:
        self._pool = pool
        self.slot = slot

    def __del__(self) -> None:
        self._pool.put(self.slot)


@dataclass(frozen=True)
class Sequences:
    """What an engine's cache is: ``batch`` sequences of ``past`` rows in a leased slot.

    A call writes rows from ``past`` on, and memory, in place: continue a cache once.
    """

    lease: Lease
    batch: int
    past: int


class SlotPool:
    """Makes, lends and keeps slots.

    Args:
        ports: the decoder's cache ports, with symbols ``batch`` and ``capacity``; those without
            capacity are the memory of recurrent layers.
        dtype: of keys and values; int8 brings one scale a row.
        device: where they live.
        capacity: rows of the smallest slot.
        limit: the model's positions, or None.
    """

    def __init__(
        self,
        ports: Sequence[Port],
        dtype: torch.dtype,
        device: torch.device,
        capacity: int,
        limit: int | None,
    ) -> None:
        self._ports = [port for port in ports if port.axis("capacity") is not None]
        self._memory = [port for port in ports if port.axis("capacity") is None]
        self._dtype = dtype
        self._device = device
        self._capacity = capacity
        self._limit = limit
        self._idle: list[Slot] = []

    @torch.inference_mode(False)  # buffers outlive calls, and are written in any mode
    def lend(self, batch: int, rows: int) -> Lease:
        """A slot for at least ``rows`` rows of ``batch`` sequences."""
        size, capacity = bucket(batch), next_capacity(rows, self._capacity, self._limit)
        for slot in self._idle:
            if slot.batch == size and slot.capacity >= capacity:
                self._idle.remove(slot)
                for value in slot.memory:
                    value.zero_()
                return Lease(self, slot)
        while len(self._idle) >= IDLE:  # what is kept makes room for what is needed
            self._idle.pop(0)
        sizes = {"batch": size, "capacity": capacity}
        caches = [
            CacheTensor.empty(
                tuple(evaluate_shape(port.type.shape, sizes)), self._dtype, self._device
            )
            for port in self._ports
        ]
        memory = [
            torch.zeros(
                evaluate_shape(port.type.shape, sizes), dtype=port.type.dtype, device=self._device
            )
            for port in self._memory
        ]
        return Lease(self, Slot(size, capacity, caches, memory))

    def put(self, slot: Slot) -> None:
        """Take a slot back."""
        self._idle.append(slot)

    def with_room(self, sequences: Sequences, rows: int) -> Sequences:
        """``sequences`` in a slot that holds ``rows`` rows; copied where theirs is too small."""
        slot = sequences.lease.slot
        if slot.capacity >= rows:
            return sequences
        lease = self.lend(sequences.batch, max(rows, 2 * slot.capacity))
        for new, old in zip(lease.slot.caches, slot.caches, strict=True):
            new.copy_rows(old, sequences.past)
        for kept, value in zip(lease.slot.memory, slot.memory, strict=True):
            kept[: sequences.batch] = value[: sequences.batch]
        return Sequences(lease, sequences.batch, sequences.past)
