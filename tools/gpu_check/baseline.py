"""A bf16 Qwen2-VL as transformers computes it, in plain torch: what the kernels are compared with.

Separate linears as in the checkpoint, torch's attention, a static cache; decoding is recorded as a
CUDA graph and attends exactly the rows that are there, without a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, layer_norm, linear, rms_norm, silu
from torch.nn.functional import scaled_dot_product_attention as attend

from tools.gpu_check.model import Sizes

EPS = 1e-6


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


class _Random:
    """Random parameters on a device, one call each."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(1)

    def __call__(self, *shape: int) -> Tensor:
        value = torch.empty(shape, device=self.device, dtype=self.dtype)
        return value.normal_(0, 0.02, generator=self._generator)

    def ones(self, size: int) -> Tensor:
        return torch.ones(size, device=self.device, dtype=self.dtype)


class TextModel:
    """The language model: embeddings, layers, head."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        self.sizes, make = sizes, _Random(device, dtype)
        s, kv = sizes, sizes.kv_heads * sizes.head_dim
        self.table, self.head = make(s.vocabulary, s.hidden), make(s.vocabulary, s.hidden)
        self.last = make.ones(s.hidden)
        shapes = {
            "q": (s.hidden, s.hidden),
            "k": (kv, s.hidden),
            "v": (kv, s.hidden),
            "o": (s.hidden, s.hidden),
            "gate": (s.intermediate, s.hidden),
            "up": (s.intermediate, s.hidden),
            "down": (s.hidden, s.intermediate),
        }
        self.layers = []
        for _ in range(s.layers):
            layer = {name: make(*shape) for name, shape in shapes.items()}
            layer |= {f"{name}.bias": make(shapes[name][0]) for name in ("q", "k", "v")}
            self.layers.append({**layer, "in": make.ones(s.hidden), "post": make.ones(s.hidden)})
        steps = torch.arange(0, s.head_dim, 2, device=device, dtype=torch.float32)
        self._frequencies = 1.0 / 1e6 ** (steps / s.head_dim)

    def caches(self, batch: int, rows: int) -> list[tuple[Tensor, Tensor]]:
        """Empty keys and values of every layer."""
        shape = (batch, self.sizes.kv_heads, rows, self.sizes.head_dim)
        return [(self.table.new_zeros(shape), self.table.new_zeros(shape)) for _ in self.layers]

    def forward(
        self, embeds: Tensor, places: Tensor, caches: list[tuple[Tensor, Tensor]], causal: bool
    ) -> Tensor:
        """Logits of the last row; new rows go to ``places`` (int64 [T]) of the caches."""
        angles = places.to(torch.float32)[:, None] * self._frequencies
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos().to(embeds.dtype), angles.sin().to(embeds.dtype)
        x = embeds
        for layer, cache in zip(self.layers, caches, strict=True):
            x = x + self._attention(x, layer, cache, (cos, sin), places, causal)
            h = rms_norm(x, (x.shape[-1],), layer["post"], EPS)
            h = silu(linear(h, layer["gate"])) * linear(h, layer["up"])
            x = x + linear(h, layer["down"])
        return linear(rms_norm(x[:, -1:], (x.shape[-1],), self.last, EPS), self.head)

    def _attention(
        self,
        x: Tensor,
        layer: dict[str, Tensor],
        cache: tuple[Tensor, Tensor],
        angles: tuple[Tensor, Tensor],
        places: Tensor,
        causal: bool,
    ) -> Tensor:
        batch, tokens, hidden = x.shape
        h = rms_norm(x, (hidden,), layer["in"], EPS)
        q, k, v = (
            linear(h, layer[name], layer[f"{name}.bias"])
            .view(batch, tokens, -1, self.sizes.head_dim)
            .transpose(1, 2)
            for name in ("q", "k", "v")
        )
        q, k = _rotate(q, *angles), _rotate(k, *angles)
        cache[0].index_copy_(2, places, k)
        cache[1].index_copy_(2, places, v)
        keys, values = (k, v) if causal else cache
        rows = attend(q, keys, values, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        return linear(rows.transpose(1, 2).reshape(batch, tokens, hidden), layer["o"])

    def step(
        self, ids: Tensor, place: Tensor, caches: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, ...]:
        """One token for every sequence, and the likeliest next ones written into ``ids`` [B, 1]."""
        logits = self.forward(embedding(ids, self.table), place, caches, causal=False)
        ids.copy_(logits[:, 0].argmax(-1)[:, None])
        return (logits,)


class VisionTower:
    """The tower without its patch embedding's convolution form: patches in, merged rows out."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        self.sizes, make = sizes, _Random(device, dtype)
        width, inner = sizes.vision_width, 4 * sizes.vision_width
        self.patch = make(width, 3 * 2 * 14 * 14)
        shapes = {"qkv": (3 * width, width), "proj": (width, width)}
        shapes |= {"fc1": (inner, width), "fc2": (width, inner)}
        self.blocks = []
        for _ in range(sizes.vision_depth):
            block = {name: make(*shape) for name, shape in shapes.items()}
            block |= {f"{name}.bias": make(shape[0]) for name, shape in shapes.items()}
            norms = {f"{n}.{p}": make.ones(width) for n in ("n1", "n2") for p in ("g", "b")}
            self.blocks.append(block | norms)
        self.merge = make(4 * width, 4 * width), make(sizes.hidden, 4 * width)
        self.norm = make.ones(width)

    def forward(self, pixels: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """pixels [N, 1176], cos and sin [N, head_dim] -> rows [N / 4, hidden]."""
        x = linear(pixels, self.patch)
        width, heads = x.shape[-1], self.sizes.vision_heads
        for b in self.blocks:
            h = layer_norm(x, (width,), b["n1.g"], b["n1.b"], EPS)
            qkv = linear(h, b["qkv"], b["qkv.bias"]).view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
            q, k = _rotate(qkv[0], cos, sin), _rotate(qkv[1], cos, sin)
            rows = attend(q[None], k[None], qkv[2][None])[0].transpose(0, 1).reshape(len(x), width)
            x = x + linear(rows, b["proj"], b["proj.bias"])
            h = layer_norm(x, (width,), b["n2.g"], b["n2.b"], EPS)
            h = linear(h, b["fc1"], b["fc1.bias"])
            x = x + linear(h * torch.sigmoid(1.702 * h), b["fc2"], b["fc2.bias"])
        x = layer_norm(x, (width,), self.norm, self.norm, EPS).view(len(x) // 4, -1)
        return linear(torch.nn.functional.gelu(linear(x, self.merge[0])), self.merge[1])
