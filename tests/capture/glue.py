"""The host's part of a model, written out by hand: merge, positions, masks, cache."""

from __future__ import annotations

from typing import Any

import torch

from mqc.capture import adapter_for
from mqc.ir import Program


class Glue:
    """Runs a captured program on a processor's output."""

    def __init__(self, program: Program, config: Any) -> None:
        self.program = program
        self.adapter = adapter_for(config)
        self.modules = {name: program.module(name) for name in program.components}

    def embeds(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Token embeddings with the image rows in place: [batch, tokens, hidden]."""
        ids = batch["input_ids"]
        (rows,) = self.modules["embed"](ids)
        names = [port.name for port in self.program.components["vision"].inputs]
        images = [
            self.modules["vision"](*(call[name] for name in names))[0]
            for call in self.adapter.vision_calls(batch)
        ]
        if images:
            where = (ids == self.adapter.image_token_id)[..., None].expand_as(rows)
            rows = rows.masked_scatter(where, torch.cat(images))
        return rows

    def positions(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Position ids of a left-padded batch (padding gets 0)."""
        ids, valid = batch["input_ids"], batch["attention_mask"].bool()
        grids = batch.get("image_grid_thw")
        merge = getattr(self.adapter.config.vision_config, "spatial_merge_size", 1)
        result = []
        for row, mask in zip(ids, valid, strict=True):
            own: dict[str, torch.Tensor] = {}
            if grids is not None:
                tokens = int((row == self.adapter.image_token_id).sum())
                count = 0
                while tokens > 0:
                    tokens -= int(grids[count].prod()) // merge**2
                    count += 1
                own["image_grid_thw"], grids = grids[:count], grids[count:]
            position, _ = self.adapter.position_ids(row[mask], own)
            pad = len(row) - position.shape[-1]
            result.append(torch.nn.functional.pad(position, (pad, 0)))
        return torch.stack(result, dim=-2)

    def decode(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor,
        cache: list[torch.Tensor] | None = None,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """One decoder call; ``valid`` bool [batch, past + tokens] names the tokens that exist."""
        batch, tokens = embeds.shape[:2]
        past = valid.shape[1] - tokens
        facts = self.program.facts
        if cache is None:
            shape = (batch, facts["kv_heads"], 0, facts["head_dim"])
            cache = [torch.zeros(shape, dtype=embeds.dtype)] * (2 * facts["kv_layers"])
        column = torch.arange(past + tokens)
        query = torch.arange(past, past + tokens)[:, None]
        mask = (column <= query) & (valid[:, None, None, :] | (column == query))
        if rows is None:
            rows = torch.arange(tokens).expand(batch, -1)
        logits, *cache = self.modules["decoder"](embeds, positions, mask, rows, *cache)
        return logits, cache

    def logits(self, batch: dict[str, torch.Tensor], chunks: list[int] | None = None) -> Any:
        """Logits of all tokens of ``batch``, prefilled in ``chunks`` (sizes; default: at once)."""
        embeds, positions = self.embeds(batch), self.positions(batch)
        valid = batch["attention_mask"].bool()
        cache, parts, start = None, [], 0
        for size in chunks or [embeds.shape[1]]:
            stop = start + size
            part, cache = self.decode(
                embeds[:, start:stop], positions[..., start:stop], valid[:, :stop], cache
            )
            parts.append(part)
            start = stop
        return torch.cat(parts, dim=1)
