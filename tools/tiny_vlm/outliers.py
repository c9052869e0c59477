"""Outliers put into a trained model by a rescaling.

Large language models have a few residual channels and MLP units whose activations are tens of
times larger than the others'. A model trained on an easy task has none. These functions put them
in by rescalings that keep the results, but for the normalisations' dependence on each token,
which the fine-tuning afterwards repairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tiny_vlm.data import Prompts, Task, normalise
from tiny_vlm.forward import forward


@dataclass
class Strengths:
    """Factors of the rescalings."""

    residual: float = 30.0
    """Residual channels of the language model."""
    units: float = 40.0
    """Up-projection rows of units that fire for visual tokens, undone in the down projection."""
    text_units: float = 8.0
    """The same for units that fire for text."""
    values: float = 6.0
    """Rows of the value projections, undone in the output projections."""
    gains: float = 4.0
    """Norm gains of channels that are larger for visual tokens, undone in the readers."""
    largest: float = math.inf
    """Units that reach more than this are made smaller by powers of two first."""
    vision_residual: float = 16.0
    """Residual channels of the vision tower."""
    vision_units: float = 10.0
    """Rows of the vision tower's first MLP layers."""


LAST = {
    "tiny-qwen2-vl": Strengths(residual=1, units=4, text_units=4, values=2, gains=2),
    "tiny-llava": Strengths(residual=1, units=4, text_units=4, values=2, gains=2),
    # Blocks of eight spread a unit's outlier over eight channels only: smaller ones there.
    "tiny-internvl": Strengths(residual=1, units=1, text_units=1, values=2, gains=16, largest=64),
}
"""Factors of the last rescaling: powers of two and no residual channels, so it is exact."""


@dataclass
class Seen:
    """Inputs of modules on calibration samples, flat over tokens: (tokens, features)."""

    inputs: dict[Any, Tensor]
    visual: Tensor
    """Which tokens of the language model are visual."""


def observe(name: str, model: Any, prompts: Prompts, task: Task, modules: list[Any]) -> Seen:
    """Run 64 samples and keep what goes into some modules; padding is left out."""
    kept: dict[Any, Tensor] = {}
    ids = task.ids[:64].long()
    layout = prompts.layout(*task.size, ids.shape[1])
    prefix, (first, last) = len(layout.prefix), layout.visual
    valid = torch.cat((torch.ones(len(ids), prefix, dtype=torch.bool), ids.flatten(1) != 0), dim=1)
    where = torch.zeros_like(valid)
    where[:, first:last] = True

    def keep(module: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        kept[module] = x[valid] if x.shape[:2] == valid.shape else x.flatten(0, -2)

    hooks = [module.register_forward_pre_hook(keep) for module in modules]
    with torch.no_grad():
        forward(name, model, layout, normalise(task.pixels[:64]), ids)
    for hook in hooks:
        hook.remove()
    return Seen(kept, where[valid])


def steady_channels(streams: list[Tensor], factor: float, count: int, seed: int) -> list[int]:
    """Channels whose enlargement changes the tokens' RMS by about one ratio everywhere."""
    rng = np.random.Generator(np.random.PCG64(seed))
    squares = torch.cat([x[:: max(1, len(x) // 2000)] ** 2 for x in streams])
    total = squares.sum(1)
    best, chosen = math.inf, list(range(count))
    for _ in range(1500):
        trial = sorted(rng.permutation(squares.shape[1])[:count].tolist())
        ratio = (1 + (factor**2 - 1) * squares[:, trial].sum(1) / total).log() / 2
        score = float(ratio.std() / ratio.mean().clamp(min=0.7))
        if score < best:
            best, chosen = score, trial
    return chosen


def last_projection(model: Any) -> nn.Linear:
    """The layer that writes visual tokens."""
    visual = getattr(model.model, "visual", None)
    layer = (
        visual.merger.mlp[2] if visual is not None else model.model.multi_modal_projector.linear_2
    )
    assert isinstance(layer, nn.Linear)
    return layer


def text_outliers(name: str, model: Any, prompts: Prompts, task: Task, by: Strengths) -> None:
    """Put outliers into the language model, in place."""
    text = model.model.language_model
    norms = [
        (norm, readers)
        for layer in text.layers
        for norm, readers in (
            (
                layer.input_layernorm,
                [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
            ),
            (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
        )
    ]
    downs = [layer.mlp.down_proj for layer in text.layers]
    everything = [norm for norm, _ in norms] + [text.norm, *downs]
    seen = observe(name, model, prompts, task, everything)
    visual = seen.visual

    # Units: those that fire for visual tokens, and a few that fire for text.
    for layer in text.layers:
        reach = seen.inputs[layer.mlp.down_proj].abs().amax(0)
        smaller = 2.0 ** -(reach / by.largest).log2().ceil().clamp(min=0)
        layer.mlp.up_proj.weight *= smaller[:, None]
        layer.mlp.down_proj.weight /= smaller
        x = seen.inputs[layer.mlp.down_proj].abs()
        of_visual, of_text = x[visual].quantile(0.99, 0), x[~visual].quantile(0.99, 0)
        common = x.quantile(0.999, 0)
        ratio = of_visual / (of_text + 0.05 * common.mean())
        for units, factor in (
            (ratio.topk(4).indices, by.units),
            ((1 / ratio.clamp(min=1e-3)).topk(2).indices, by.text_units),
        ):
            layer.mlp.up_proj.weight[units] *= factor
            layer.mlp.down_proj.weight[:, units] /= factor

    # Values: one channel of each key-value head.
    for layer in text.layers:
        attention = layer.self_attn
        groups = attention.q_proj.out_features // attention.v_proj.out_features
        for head in range(attention.v_proj.out_features // 32):
            row = head * 32 + 5
            attention.v_proj.weight[row] *= by.values
            if attention.v_proj.bias is not None:
                attention.v_proj.bias[row] *= by.values
            for query in range(groups):
                attention.o_proj.weight[:, (head * groups + query) * 32 + 5] /= by.values

    # Gains: two channels of each norm that are larger for visual tokens.
    for norm, readers in norms:
        x = seen.inputs[norm]
        x = (x * x.pow(2).mean(1, keepdim=True).rsqrt() * norm.weight).abs()
        channels = (x[visual].quantile(0.99, 0) / x[~visual].quantile(0.99, 0)).topk(2).indices
        norm.weight[channels] *= by.gains
        for reader in readers:
            reader.weight[:, channels] /= by.gains

    # Residual channels, in every writer and reader.
    streams = [seen.inputs[norm] for norm, _ in norms] + [seen.inputs[text.norm]]
    channels = torch.tensor(steady_channels(streams, by.residual, 3, 1))
    tied = model.lm_head.weight.data_ptr() == text.embed_tokens.weight.data_ptr()
    text.embed_tokens.weight[:, channels] *= by.residual
    writer = last_projection(model)
    writer.weight[channels] *= by.residual
    writer.bias[channels] *= by.residual
    for layer in text.layers:
        layer.self_attn.o_proj.weight[channels] *= by.residual
        layer.mlp.down_proj.weight[channels] *= by.residual
    if tied:
        text.norm.weight[channels] /= by.residual**2
    else:
        model.lm_head.weight[:, channels] /= by.residual
    for norm, readers in [*norms, (text.norm, [])]:
        x = seen.inputs[norm]
        larger = x.clone()
        larger[:, channels] *= by.residual
        ratio = (larger.pow(2).mean(1) / x.pow(2).mean(1)).log().mean().div(2).exp()
        norm.weight *= ratio
        for reader in readers:
            reader.weight[:, channels] /= by.residual


def vision_parts(name: str, model: Any) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """The tower's residual writers, (norm, readers) pairs, MLPs and attentions.

    A writer is (weight, bias or None, layer scale or None), the channel first in each. A reader is
    (layer, repeats), with repeats more than one where it reads that many tokens side by side. An
    attention is (value rows' layer, first value row, output layer).
    """
    if name == "tiny-qwen2-vl":
        tower = model.model.visual
        blocks = tower.blocks
        writers = [(tower.patch_embed.proj.weight, None, None)]
        writers += [(b.attn.proj.weight, b.attn.proj.bias, None) for b in blocks]
        writers += [(b.mlp.fc2.weight, b.mlp.fc2.bias, None) for b in blocks]
        norms = [(b.norm1, [(b.attn.qkv, 1)]) for b in blocks]
        norms += [(b.norm2, [(b.mlp.fc1, 1)]) for b in blocks]
        norms.append((tower.merger.ln_q, [(tower.merger.mlp[0], 4)]))
        values = [(b.attn.qkv, 320, b.attn.proj) for b in blocks]
        return writers, norms, [(b.mlp.fc1, b.mlp.act, b.mlp.fc2) for b in blocks], values
    tower = model.model.vision_tower
    connector = model.model.multi_modal_projector
    if name == "tiny-llava":
        tower = getattr(tower, "vision_model", tower)
        blocks = tower.encoder.layers[:-1]
        writers = [(tower.pre_layrnorm.weight, tower.pre_layrnorm.bias, None)]
        writers += [(b.self_attn.out_proj.weight, b.self_attn.out_proj.bias, None) for b in blocks]
        writers += [(b.mlp.fc2.weight, b.mlp.fc2.bias, None) for b in blocks]
        attentions = [b.self_attn for b in blocks]
        norms = [
            (b.layer_norm1, [(a.q_proj, 1), (a.k_proj, 1), (a.v_proj, 1)])
            for b, a in zip(blocks, attentions, strict=True)
        ]
        norms += [(b.layer_norm2, [(b.mlp.fc1, 1)]) for b in blocks]
        norms.append((None, [(connector.linear_1, 1)]))
        values = [(a.v_proj, 0, a.out_proj) for a in attentions]
        return writers, norms, [(b.mlp.fc1, b.mlp.activation_fn, b.mlp.fc2) for b in blocks], values
    blocks = tower.encoder.layer
    first = tower.embeddings
    projection = first.patch_embeddings.projection
    writers = [(projection.weight, projection.bias, None)]
    writers += [(first.cls_token, None, None), (first.position_embeddings, None, None)]
    attentions = [b.attention for b in blocks]
    writers += [
        (a.projection_layer.weight, a.projection_layer.bias, b.lambda_1)
        for a, b in zip(attentions, blocks, strict=True)
    ]
    writers += [(b.mlp.fc2.weight, b.mlp.fc2.bias, b.lambda_2) for b in blocks]
    norms = [
        (b.layernorm_before, [(a.q_proj, 1), (a.k_proj, 1), (a.v_proj, 1)])
        for b, a in zip(blocks, attentions, strict=True)
    ]
    norms += [(b.layernorm_after, [(b.mlp.fc1, 1)]) for b in blocks]
    norms.append((connector.layer_norm, []))  # see vision_outliers
    values = [(a.v_proj, 0, a.projection_layer) for a in attentions]
    return writers, norms, [(b.mlp.fc1, b.mlp.activation_fn, b.mlp.fc2) for b in blocks], values


def vision_outliers(  # noqa: C901
    name: str, model: Any, prompts: Prompts, task: Task, by: Strengths
) -> None:
    """Put outliers into the vision tower, in place."""
    writers, norms, mlps, values = vision_parts(name, model)
    watched = [norm for norm, _ in norms if norm is not None] + [
        m for mlp in mlps for m in mlp[1:2]
    ]
    seen = observe(name, model, prompts, task, watched)

    # Units whose input is mostly far from zero, where the activation function is close to linear.
    for fc1, act, fc2 in mlps:
        x = seen.inputs[act][::4]
        y = act(x)
        damage = (act(x * by.vision_units) / by.vision_units - y).pow(2).mean(0)
        damage = damage * fc2.weight.pow(2).sum(0)
        strong = y.abs().quantile(0.999, 0)
        damage[strong < strong.median()] = math.inf
        units = damage.topk(4, largest=False).indices
        fc1.weight[units] *= by.vision_units
        fc1.bias[units] *= by.vision_units
        fc2.weight[:, units] /= by.vision_units
    for layer, start, output in values:
        for head in range(output.in_features // 32):
            layer.weight[start + head * 32 + 7] *= by.values
            layer.bias[start + head * 32 + 7] *= by.values
            output.weight[:, head * 32 + 7] /= by.values

    # Residual channels. LayerNorm takes the mean away: with the writers centred, a reader W of the
    # enlarged, centred stream P S x sees what it saw before if it becomes W pinv(P S P).
    width = len(writers[0][0]) if writers[0][0].ndim < 3 or len(writers[0][0]) > 1 else 0
    streams = [seen.inputs[norm] for norm, _ in norms if norm is not None]
    width = streams[0].shape[1] if streams[0].shape[1] == width else width
    streams = [x for x in streams if x.shape[1] == width]
    centred = [x - x.mean(1, keepdim=True) for x in streams]
    channels = torch.tensor(steady_channels(centred, by.vision_residual, 2, 2))
    scale = torch.ones(width)
    scale[channels] = by.vision_residual
    centre = torch.eye(width) - 1 / width
    undo = torch.linalg.pinv(centre @ torch.diag(scale) @ centre)
    for weight, bias, gate in writers:
        for part in (weight, bias):
            if part is None:
                continue
            if name == "tiny-llava":
                part.view(width, -1).mul_(scale[:, None])
            elif part.ndim == 3:  # (1, positions, width)
                part.copy_((part - part.mean(-1, keepdim=True)) * scale)
            elif gate is None:
                flat = part.view(width, -1)
                flat.copy_(scale[:, None] * (centre @ flat))
            else:
                flat = part.view(width, -1)
                flat.copy_((centre @ (flat * gate[:, None])) / gate[:, None])
        if gate is not None:
            gate.mul_(scale)
    for norm, readers in norms:
        if norm is None:  # read as it is
            for layer, _ in readers:
                layer.weight.copy_(layer.weight / scale)
            continue
        x = seen.inputs[norm]
        if x.shape[1] != width:  # four tokens side by side, normalised together
            repeats = x.shape[1] // width
            x = x.view(-1, repeats, width)
            grown = ((x - x.mean(-1, keepdim=True)) * scale).flatten(1)
            ratio = (grown.var(1) / x.flatten(1).var(1)).log().mean().div(2).exp()
            norm.weight.mul_(ratio)
            linear = model.model.multi_modal_projector.linear_1
            linear.weight.copy_(linear.weight / scale.repeat(repeats))
            continue
        x = x - x.mean(1, keepdim=True)
        grown = x * scale
        grown = grown - grown.mean(1, keepdim=True)
        ratio = (grown.pow(2).mean(1) / x.pow(2).mean(1)).log().mean().div(2).exp()
        gain, shift = norm.weight.clone(), norm.bias.clone()
        for layer, repeats in readers:
            old = layer.weight.view(layer.out_features, repeats, width)
            new = (old * gain) @ undo / gain
            layer.bias += ((old - new) * shift).sum((1, 2))
            layer.weight.copy_(new.reshape(layer.weight.shape))
        norm.weight.mul_(ratio)
