"""Forward passes on batches: what transformers' classes compute, several times faster.

Plain functions over the modules' own weights. They run a batch of pictures of one size, several
questions to a picture in one sequence (each question sees the picture and itself, at the
positions it would have alone), with no lists or masks built on the way, so that torch.compile
makes one graph of each. ``check_forward`` compares them with the models' own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids

from tiny_vlm.architectures import IMAGE, PATCH


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention over (batch, length, heads, width), to (batch, length, features) and weights."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # the fused kernel's backward is slow here
    if mask is not None:
        scores = scores + mask
    weights = scores.float().softmax(-1)
    mixed = weights.to(v.dtype) @ v
    return mixed.transpose(1, 2).flatten(2), weights


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions on (batch, length, heads, width); the tables are (length, width)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cosine[:, None].to(x.dtype) + turned * sine[:, None].to(x.dtype)


def heads(x: Tensor, width: int) -> Tensor:
    """(batch, length, features) to (batch, length, heads, width)."""
    return x.unflatten(-1, (-1, width))


def decode(
    model: Any, x: Tensor, mask: Tensor, tables: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The language model on embeddings (batch, length, hidden), to logits and what is half way.

    Half way are the hidden states, and the attention of two heads that follows them.
    """
    text = model.model.language_model
    middle = watched = x
    for index, layer in enumerate(text.layers):
        if index == 2:
            middle = x
        attention = layer.self_attn
        y = layer.input_layernorm(x)
        q = rotate(heads(attention.q_proj(y), 32), *tables)
        k = rotate(heads(attention.k_proj(y), 32), *tables)
        v = heads(attention.v_proj(y), 32)
        mixed, weights = attend(q, k, v, mask.to(q.dtype))
        if index == 2:
            watched = weights[:, ::3]
        x = x + attention.o_proj(mixed)
        y = layer.post_attention_layernorm(x)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
    return model.lm_head(text.norm(x)), middle, watched


def patches(images: Tensor) -> Tensor:
    """(batch, 3, height, width) to (batch, patches, 3 * 8 * 8), rows of patches in order."""
    x = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    return x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def see_qwen2_vl(model: Any, images: Tensor) -> Tensor:
    """Visual tokens (batch, tokens, hidden) of Qwen2-VL's tower."""
    tower = model.model.visual
    high, wide = images.shape[2] // PATCH, images.shape[3] // PATCH
    weight = tower.patch_embed.proj.weight.sum(2).flatten(1)  # both frames are the same picture
    x = F.linear(patches(images), weight)
    x = x.unflatten(1, (high // 2, 2, wide // 2, 2)).transpose(2, 3).flatten(1, 4)
    cosine, sine = vision_tables(tower, high, wide)
    for block in tower.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 5, 32)).unbind(2)
        x = x + block.attn.proj(attend(rotate(q, cosine, sine), rotate(k, cosine, sine), v)[0])
        x = x + block.mlp(block.norm2(x))
    x = tower.merger.ln_q(x)
    return tower.merger.mlp(x.reshape(len(x), -1, 4 * x.shape[-1]))


def vision_tables(tower: Any, high: int, wide: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables (patches, head width) of Qwen2-VL's tower."""
    key = f"_tables_{high}_{wide}"
    if not hasattr(tower, key):
        grid = torch.tensor([[1, high, wide]])
        with torch.no_grad():
            cosine, sine = tower.rotary_pos_emb(torch.zeros(1), get_vision_position_ids(grid, 2))
        setattr(tower, key, (cosine, sine))
    tables: tuple[Tensor, Tensor] = getattr(tower, key)
    return tables


def see_llava(model: Any, images: Tensor) -> Tensor:
    """Visual tokens of LLaVA's CLIP tower."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    x = F.linear(patches(images), tower.embeddings.patch_embedding.weight.flatten(1))
    first = tower.embeddings.class_embedding.expand(len(x), 1, -1)
    x = torch.cat((first, x.float()), dim=1) + tower.embeddings.position_embedding.weight
    x = tower.pre_layrnorm(x)
    for layer in tower.encoder.layers[:-1]:
        attention = layer.self_attn
        y = layer.layer_norm1(x)
        q, k, v = (
            heads(part(y), 32) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        x = x + attention.out_proj(attend(q, k, v)[0])
        x = x + layer.mlp(layer.layer_norm2(x))
    return model.model.multi_modal_projector(x[:, 1:])


def see_internvl(model: Any, images: Tensor) -> Tensor:
    """Visual tokens of InternVL's tower."""
    tower = model.model.vision_tower
    embeddings = tower.embeddings
    projection = embeddings.patch_embeddings.projection
    x = F.linear(patches(images), projection.weight.flatten(1), projection.bias)
    x = torch.cat((embeddings.cls_token.expand(len(x), -1, -1), x.float()), dim=1)
    x = x + embeddings.position_embeddings
    for layer in tower.encoder.layer:
        attention = layer.attention
        y = layer.layernorm_before(x)
        q, k, v = (
            heads(part(y), 32) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        x = x + layer.lambda_1 * attention.projection_layer(attend(q, k, v)[0])
        x = x + layer.lambda_2 * layer.mlp(layer.layernorm_after(x))
    x = tower.layernorm(x)[:, 1:]
    side = IMAGE // PATCH
    x = model.model.pixel_shuffle(x.unflatten(1, (side, side)), 0.5).flatten(1, 2)
    return model.model.multi_modal_projector(x)


SEE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "tiny-qwen2-vl": see_qwen2_vl,
    "tiny-llava": see_llava,
    "tiny-internvl": see_internvl,
}


@dataclass
class Layout:
    """What the sequences of one picture size and number of questions have in common."""

    prefix: Tensor
    """Token ids up to the end of the picture."""
    visual: tuple[int, int]
    """Where the visual tokens are in the prefix."""
    mask: Tensor
    """(1, 1, length, length) additive attention mask."""
    tables: tuple[Tensor, Tensor]
    """Cosine and sine tables of the rotary positions."""


def forward(name: str, model: Any, layout: Layout, images: Tensor, slots: Tensor) -> Tensor:
    """Logits (batch, questions * slot, vocabulary) for normalised pictures and slots' ids."""
    return forward_both(name, model, layout, images, slots)[0]


def forward_both(
    name: str, model: Any, layout: Layout, images: Tensor, slots: Tensor, frozen: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`forward`, and what :func:`decode` gives from half way through."""
    first, last = layout.visual
    embed = model.model.language_model.embed_tokens
    seen = SEE[name](model, images).float()
    if frozen:
        seen = seen.detach()
    before = embed(layout.prefix).expand(len(images), -1, -1)
    x = torch.cat((before[:, :first], seen, before[:, last:], embed(slots.flatten(1))), dim=1)
    logits, middle, watched = decode(model, x, layout.mask, layout.tables)
    return logits[:, len(layout.prefix) :], middle, watched


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Which answers (pictures, questions) are right in every token, the end token included."""
    guess = logits.argmax(-1).view(labels.shape)
    return ((guess == labels) | (labels == -100)).all(-1)
