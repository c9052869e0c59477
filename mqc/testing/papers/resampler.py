"""Cross-attention resamplers: learned queries read a tower's rows (Qwen-VL, MiniCPM-V)."""

from __future__ import annotations

import torch
from torch import nn


def sincos_2d(width: int, rows: int, columns: int) -> torch.Tensor:
    """Fixed positions float32 [rows * columns, width]: half of the channels each for both axes."""

    def axis(count: int) -> torch.Tensor:
        steps = torch.arange(width // 4, dtype=torch.float32) / (width / 4)
        angles = torch.arange(count, dtype=torch.float32)[:, None] / 10000.0**steps
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    down = axis(rows)[:, None].expand(-1, columns, -1)
    across = axis(columns)[None].expand(rows, -1, -1)
    return torch.cat([across, down], dim=-1).reshape(rows * columns, -1)


class Resampler(nn.Module):
    """``queries`` learned queries attend to the rows of an image; positions go to the keys alone.

    Keys are ``ln_kv(x) + position`` and values ``ln_kv(x)``, so one gain is read with and without
    something added.
    """

    def __init__(self, queries: int, width: int, heads: int, source: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, width) * 0.02)
        self.kv_proj = nn.Linear(source, width, bias=False)
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_q, self.ln_kv = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(
        self, x: torch.Tensor, places: torch.Tensor, of_queries: torch.Tensor | None
    ) -> torch.Tensor:
        """[images, rows, source] -> [images, queries, width].

        ``places`` are the rows' positions [rows, width], ``of_queries`` the queries'
        [queries, width].
        """
        x = self.ln_kv(self.kv_proj(x)).permute(1, 0, 2)
        query = self.ln_q(self.query)
        if of_queries is not None:
            query = query + of_queries
        wide = query[:, None].expand(-1, x.shape[1], -1)
        mixed, _ = self.attn(wide, x + places[:, None], x, need_weights=False)
        result: torch.Tensor = mixed.permute(1, 0, 2)
        return result
