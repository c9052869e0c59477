"""The engine of target ``cuda``: prefill eagerly in planned memory, decode by recorded steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from mqc.backends.cuda.decode import DecodeStep, sizes_of
from mqc.backends.cuda.executor import Arena, Call, Executor
from mqc.backends.cuda.graphs import Recorder, call_again
from mqc.backends.cuda.kernels import Kernels
from mqc.backends.cuda.launch import on_device
from mqc.backends.cuda.plan import Value, lifetimes
from mqc.backends.cuda.slots import Sequences, SlotPool
from mqc.errors import UsageError, VerificationError
from mqc.host.cache import is_buffer, past_of
from mqc.host.engine import Cache, spread
from mqc.ir import Port, Program
from mqc.ir.types import is_cache

CAPACITY = 1024
"""Rows of the smallest KV buffer."""
ROUND = 256
"""Prefill memory is planned for a multiple of this many tokens."""


P = ParamSpec("P")
R = TypeVar("R")


def _on_its_device(
    method: Callable[Concatenate[CudaEngine, P], R],
) -> Callable[Concatenate[CudaEngine, P], R]:
    """What an engine does, it does on the kernels' device, whichever is the current one."""

    @wraps(method)
    def call(engine: CudaEngine, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with on_device(engine.kernels.device):
            return method(engine, *args, **kwargs)

    return call


class CudaEngine:
    """:class:`~mqc.host.engine.Engine` over a program in dialect ``cuda``.

    Args:
        program: lowered; its parameters are moved to the kernels' device.
        kernels: the device's.
        plans: memory plans by component; made from the graphs where not given.
        record: how decode steps are recorded.
        kv_cache: "float" (the program's dtype) or "int8" with one scale a row.
        capacity: rows of the smallest KV buffer.

    Raises:
        UsageError: an unknown kind of cache, or int8 for a program whose caches grow.
    """

    def __init__(
        self,
        program: Program,
        kernels: Kernels,
        *,
        plans: Mapping[str, Sequence[Value]] | None = None,
        record: Recorder = call_again,
        kv_cache: str = "float",
        capacity: int = CAPACITY,
    ) -> None:
        self.program = program
        self.kernels = kernels
        self._record = record
        self._plans = {
            part.name: list(plans[part.name] if plans else lifetimes(part)) for part in program
        }
        device = kernels.device
        params = _Moved(program, device)
        with on_device(device):  # parameters are moved
            self._executors = {part.name: Executor(part, params, kernels) for part in program}
        self._arenas: dict[str, Arena] = {}
        decoder = program.components["decoder"]
        self._caches = [port for port in decoder.inputs if is_cache(port)]
        self._buffers = is_buffer(program.facts)
        if kv_cache not in ("float", "int8"):
            raise UsageError(f"unknown kind of KV cache {kv_cache!r}", hint="use float or int8")
        if kv_cache == "int8" and not self._buffers:
            raise UsageError(
                "this program's caches grow, and only buffers can be int8",
                hint="use kv_cache=float; mqc inspect shows why attention was not fused",
            )
        self._rows = [port for port in self._caches if port.axis("memory") is None]
        self._memory = [port for port in self._caches if port.axis("memory") is not None]
        kept = [port.axis("memory") is not None for port in decoder.outputs]
        self._rewritten = [index for index, found in enumerate(kept) if found]
        floats = next((port.type.dtype for port in self._rows), program.dtype)
        dtype = torch.int8 if kv_cache == "int8" else floats
        limit = program.facts.get("max_positions")
        self._pool = SlotPool(self._caches, dtype, device, capacity, limit)

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.program.facts

    @_on_its_device
    def vision(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Rows [visual_tokens, hidden] of one tower call, all outputs side by side."""
        outputs = self._run("vision", self._placed("vision", inputs), {})
        return torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in outputs], dim=-1)

    @_on_its_device
    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [B, T, hidden] of int64 ids [B, T]."""
        return self._run("embed", self._placed("embed", {"input_ids": ids}), {})[0]

    @_on_its_device
    def empty_cache(self, batch: int) -> Cache:
        """No rows: buffers are lent by the first call."""
        if self._buffers:
            return (Sequences(self._pool.lend(batch, 1), batch, 0),)
        sizes = {"batch": batch, "past": 0}
        return [
            torch.zeros(
                [size if isinstance(size, int) else sizes[size] for size in port.type.shape],
                dtype=port.type.dtype,
                device=self.kernels.device,
            )
            for port in self._caches
        ]

    @_on_its_device
    def decoder(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        logit_index: Tensor,
        modality: Tensor,
        cache: Cache,
    ) -> tuple[Tensor, Cache]:
        """See :meth:`mqc.host.engine.Engine.decoder`."""
        given: dict[str, Any] = {
            **spread(inputs_embeds, self.facts.get("deepstack", ()), self._hidden()),
            "position_ids": position_ids,
            "logit_index": logit_index,
            "modality": modality,
        }
        if not self._buffers:
            given.update(zip((port.name for port in self._caches), cache, strict=True))
            placed = self._placed("decoder", {**given, "mask": mask})
            logits, *present = self._run("decoder", placed, {})
            return logits, present
        past, tokens = past_of(mask), mask.shape[2]
        sequences = self._pool.with_room(cache[0], past + tokens)
        causal = is_causal(mask)
        placed = self._placed("decoder", given)
        placed["mask"] = self._mask(mask, causal)
        logits = self.prefill(placed, sequences, past, causal)
        return logits, (Sequences(sequences.lease, sequences.batch, past + tokens),)

    @_on_its_device
    def prefill(
        self, inputs: dict[str, Any], sequences: Sequences, past: int, causal: bool
    ) -> Tensor:
        """Logits of one call on placed inputs; keys and values go to rows ``past`` on, the memory
        of recurrent layers is rewritten."""
        device, slot = self.kernels.device, sequences.lease.slot
        inputs["past"] = torch.tensor([past], device=device)
        caches = [cache.rows(sequences.batch) for cache in slot.caches]
        memory = [value[: sequences.batch] for value in slot.memory]
        inputs.update(zip((port.name for port in self._rows), caches, strict=True))
        inputs.update(zip((port.name for port in self._memory), memory, strict=True))
        tokens = inputs["inputs_embeds"].shape[1]
        outputs = self._run("decoder", inputs, {"end": past + tokens, "causal": causal})
        for value, index in zip(memory, self._rewritten, strict=True):
            value.copy_(outputs[index])
        return outputs[0]

    def greedy_step(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache
    ) -> tuple[Tensor, Cache]:
        """The likeliest next token of every sequence, chosen on the device.

        Args:
            tokens: int64 [B], the last ones.
            positions: int64 [B, 1] or [3, B, 1].
            mask: bool [B, M, 1, past + 1], M as the decoder's port has it.
            cache: as :meth:`decoder` takes it.

        Returns:
            (tokens int64 [B], the cache with one more row).
        """
        step, sequences = self._advance(tokens, positions, mask, cache)
        return step.chosen(sequences.batch), (sequences,)

    def logits_step(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache
    ) -> tuple[Tensor, Cache]:
        """:meth:`greedy_step` for callers that choose themselves: logits float32 [B, vocab]."""
        step, sequences = self._advance(tokens, positions, mask, cache)
        return step.logits[: sequences.batch].to("cpu", torch.float32, copy=True), (sequences,)

    @_on_its_device
    def _advance(
        self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: Cache
    ) -> tuple[DecodeStep, Sequences]:
        """One recorded step, and the sequences with its row."""
        past = past_of(mask)
        sequences = self._pool.with_room(cache[0], past + 1)
        step = self.decode_step(sequences, tuple(positions.shape[:-2]))
        step.advance(tokens, positions, mask, past)
        return step, Sequences(sequences.lease, sequences.batch, past + 1)

    @property
    def greedy(self) -> bool:
        """Whether recorded steps can be used: they need buffered caches."""
        return self._buffers

    @_on_its_device
    def decode_step(self, sequences: Sequences, axes: tuple[int, ...]) -> DecodeStep:
        """The recorded step of the sequences' slot."""
        slot = sequences.lease.slot
        if "step" not in slot.recorded:
            parts = (self._executors["decoder"], self._executors["embed"])
            plan = self._plans["decoder"]
            slot.recorded["step"] = DecodeStep(*parts, plan, slot, axes, self._record)
        step: DecodeStep = slot.recorded["step"]
        return step

    def arena_bytes(self) -> dict[str, int]:
        """Bytes of planned memory by component, as far as it was used."""
        return {name: arena.layout.nbytes for name, arena in self._arenas.items()}

    def _hidden(self) -> int:
        return int(self.program.components["decoder"].input("inputs_embeds").type.shape[-1])

    def _mask(self, mask: Tensor, causal: bool) -> Tensor:
        """On the device; a causal one that nobody reads has its shape only."""
        if causal and getattr(self.kernels, "knows_causal", False) and not self._mask_is_read():
            one = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.kernels.device)
            return one.expand(mask.shape)
        return mask.to(self.kernels.device)

    def _mask_is_read(self) -> bool:
        """Whether anything but attention reads the mask (a reordering does)."""
        node = self.program.components["decoder"].placeholder("mask")
        targets = {str(user.target) for user in node.users}
        return not targets <= {"mqc.attention.default", "aten.sym_size.int"}

    def _placed(self, name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs on the device, in their ports' dtypes."""
        placed: dict[str, Any] = {}
        for port in self.program.components[name].inputs:
            value = inputs.get(port.name)
            if value is None:
                if port.name in ("mask", "past") or is_cache(port):
                    continue
                raise VerificationError(
                    f"component {name!r} has input {port.name!r}, which the host does not give",
                    hint=f"the host gives: {', '.join(inputs)}",
                )
            placed[port.name] = value.to(self.kernels.device, port.type.dtype)
        return placed

    def _run(self, name: str, inputs: Mapping[str, Any], how: dict[str, Any]) -> list[Tensor]:
        ports: list[Port] = self.program.components[name].inputs
        tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor)}
        sizes = sizes_of(ports, tensors)
        arena = self._arena(name, sizes)
        with torch.inference_mode():
            return self._executors[name].run(inputs, Call(arena, **how))

    def _arena(self, name: str, sizes: Mapping[str, int]) -> Arena:
        """Planned memory that is large enough; made anew, for the largest sizes yet, where not."""
        arena = self._arenas.get(name)
        if arena is None or not arena.holds(sizes):
            largest = {} if arena is None else arena.sizes
            wanted = {
                key: max(_rounded(key, size), largest.get(key, 0)) for key, size in sizes.items()
            }
            self._arenas.pop(name, None)
            arena = self._arenas[name] = Arena(self._plans[name], wanted, self.kernels.device)
        return arena


def _rounded(symbol: str, size: int) -> int:
    return -(-size // ROUND) * ROUND if symbol == "tokens" and size > 1 else size


def is_causal(mask: Tensor) -> bool:
    """Whether bool [B, M, T, past + T] is the mask of unpadded causal attention."""
    tokens, past = mask.shape[2], past_of(mask)
    if not bool(mask[..., :past].all()):
        return False
    lower = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return bool((mask[..., past:] == lower).all())


class _Moved(Mapping[str, Tensor]):
    """A program's parameters on a device, each moved when it is first asked for; the program keeps
    the moved one, so that there is one copy."""

    def __init__(self, program: Program, device: torch.device) -> None:
        self._program = program
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        params = self._program.params
        value = params[name]
        if value.device != self._device:
            value = params[name] = value.to(self._device)
        return value

    def __iter__(self) -> Any:
        return iter(self._program.params)

    def __len__(self) -> int:
        return len(self._program.params)
