"""A program as an engine, in plain torch: float programs, and lowered ones through the operators'
reference implementations. It is the oracle for every other target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

import mqc.ops  # noqa: F401  (registers the operators that a lowered program calls)
from mqc.errors import VerificationError
from mqc.host.cache import grown, is_buffer, next_capacity, past_of
from mqc.host.engine import Cache, spread
from mqc.ir import Port, Program
from mqc.ir.types import is_cache


class ProgramEngine:
    """:class:`~mqc.host.engine.Engine` over the components of ``program``, on the CPU.

    Components are built when first called. Floating-point inputs are cast to their port's dtype.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._modules: dict[str, fx.GraphModule] = {}

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.program.facts

    def vision(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Rows [visual_tokens, hidden] of one tower call, all outputs side by side."""
        outputs = self._call("vision", inputs)
        return torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in outputs], dim=-1)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, T, hidden] of int64 ids [B, T]."""
        return self._call("embed", {"input_ids": ids})[0]

    def empty_cache(self, batch: int) -> list[torch.Tensor]:
        """One tensor [batch, kv_heads, 0, head_dim] per cache port; buffers grow when needed."""
        sizes = {"batch": batch, "past": 0, "capacity": 0}
        return [
            torch.zeros(
                [size if isinstance(size, int) else sizes[size] for size in port.type.shape],
                dtype=port.type.dtype,
            )
            for port in self._cache_ports()
        ]

    def decoder(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor,
        logit_index: torch.Tensor,
        modality: torch.Tensor,
        cache: Cache,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """See :meth:`mqc.host.engine.Engine.decoder`."""
        inputs = {
            **spread(inputs_embeds, self.facts.get("deepstack", ()), self._hidden()),
            "position_ids": position_ids,
            "mask": mask,
            "logit_index": logit_index,
            "modality": modality,
        }
        names = [port.name for port in self._cache_ports()]
        if is_buffer(self.facts):
            inputs["past"] = torch.tensor([past_of(mask)])
            cache = [
                self._with_room(rows, mask) if port.axis("capacity") is not None else rows
                for port, rows in zip(self._cache_ports(), cache, strict=True)
            ]
        inputs.update(zip(names, cache, strict=True))
        logits, *present = self._call("decoder", inputs)
        return logits, present

    def _with_room(self, cache: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``cache``, or a larger copy where the call's keys do not fit."""
        limit = self.facts.get("max_positions")
        rows = next_capacity(mask.shape[3], cache.shape[2], limit)
        return cache if rows == cache.shape[2] else grown(cache, rows, past_of(mask))

    def _hidden(self) -> int:
        return int(self.program.components["decoder"].input("inputs_embeds").type.shape[-1])

    def _cache_ports(self) -> list[Port]:
        ports = self.program.components["decoder"].inputs
        return [port for port in ports if is_cache(port)]

    def _call(self, name: str, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        component = self.program.components[name]
        if name not in self._modules:
            self._modules[name] = self.program.module(name)
        values = []
        for port in component.inputs:
            value = inputs.get(port.name)
            if value is None:
                raise VerificationError(
                    f"component {name!r} has input {port.name!r}, which the host does not give",
                    hint=f"the host gives: {', '.join(inputs)}",
                )
            values.append(value.to(port.type.dtype))
        with torch.inference_mode():
            result: tuple[torch.Tensor, ...] = tuple(self._modules[name](*values))
        return result
