"""Linear-attention layers (gated DeltaNet) as graphs: a recurrence is one operator.

transformers computes the recurrence in chunks, by loops whose number depends on the text's length,
and another way for one token; no graph holds that. :func:`use_gated_delta` gives these layers a
``forward`` that computes the same with :mod:`mqc.ops.gated_delta`, on two tensors of memory that
come in and go out of the graph: the last inputs of the short convolution, and the associative
memory. Padding rows (``valid`` False) leave both as they are.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.nn.functional import conv1d, softplus
from transformers import PretrainedConfig, PreTrainedModel

import mqc.ops  # noqa: F401  (registers the operator)
from mqc.capture.adapters import LINEAR_ATTENTION
from mqc.errors import CaptureError

_PARTS = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "conv1d", "A_log", "dt_bias")


class Memory:
    """What one layer keeps: the last inputs of its convolution, and its associative memory.

    ``conv``: [batch, channels, taps - 1]; ``state``: [batch, heads, D, E].
    """

    def __init__(self, conv: torch.Tensor, state: torch.Tensor) -> None:
        self.conv, self.state = conv, state

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.conv, self.state


def memory_shapes(config: PretrainedConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a layer's ``conv`` and ``state`` without the batch."""
    keys = config.linear_key_head_dim * config.linear_num_key_heads
    values = config.linear_value_head_dim * config.linear_num_value_heads
    conv = (2 * keys + values, config.linear_conv_kernel_dim - 1)
    heads = config.linear_num_value_heads
    return conv, (heads, config.linear_key_head_dim, config.linear_value_head_dim)


def use_gated_delta(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Replace the linear-attention layers of ``model``.

    Raises :class:`CaptureError` where a layer of that kind is built otherwise.
    """
    wanted = list(getattr(config, "layer_types", None) or ()).count(LINEAR_ATTENTION)
    layers = [m for m in model.modules() if all(hasattr(m, part) for part in _PARTS)]
    if len(layers) != wanted:
        raise CaptureError(
            f"{wanted - len(layers)} linear-attention layers of {config.model_type!r} are no "
            "gated DeltaNet with separate projections",
            hint="only that form of linear attention is supported",
        )
    for layer in layers:
        layer.forward = MethodType(_forward, layer)


def _forward(
    layer: Any,
    hidden_states: torch.Tensor,
    cache_params: Any,
    attention_mask: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """One layer; ``hidden_states`` [batch, tokens, hidden], ``attention_mask`` (valid) bool
    [batch, tokens]."""
    memory: Memory = cache_params.layers[layer.layer_idx]
    valid = attention_mask[..., None].to(hidden_states.dtype)
    mixed = (layer.in_proj_qkv(hidden_states) * valid).transpose(1, 2)
    wide = torch.cat([memory.conv, mixed], dim=-1)
    memory.conv = _last(wide, attention_mask, memory.conv.shape[-1])
    mixed = torch.nn.functional.silu(
        conv1d(wide, layer.conv1d.weight, layer.conv1d.bias, groups=layer.conv_dim)
    ).transpose(1, 2)
    sizes = [layer.key_dim, layer.key_dim, layer.value_dim]
    query, key, value = mixed.split(sizes, dim=-1)
    heads, groups = layer.num_v_heads, layer.num_v_heads // layer.num_k_heads
    query, key = (_unit(t.unflatten(-1, (-1, layer.head_k_dim))) for t in (query, key))
    query, key = (t.transpose(1, 2).repeat_interleave(groups, dim=1) for t in (query, key))
    value = value.unflatten(-1, (heads, layer.head_v_dim)).transpose(1, 2)
    beta = (layer.in_proj_b(hidden_states).sigmoid() * valid).transpose(1, 2)
    rate = softplus(layer.in_proj_a(hidden_states) + layer.dt_bias)
    decay = (-layer.A_log.exp() * rate * valid).transpose(1, 2)
    query = query * layer.head_k_dim**-0.5
    both = torch.ops.mqc.gated_delta(query, key, value, decay, beta, memory.state)
    memory.state = both[:, :, -layer.head_k_dim :]
    rows = both[:, :, : -layer.head_k_dim].transpose(1, 2)
    gate = layer.in_proj_z(hidden_states).unflatten(-1, (heads, layer.head_v_dim))
    output: torch.Tensor = layer.out_proj(layer.norm(rows, gate).flatten(-2))
    return output


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of length one, as transformers normalises them."""
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def _last(wide: torch.Tensor, valid: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` columns up to each sequence's last valid row.

    ``wide`` [batch, channels, count + tokens]: what was kept, then the new rows. Rows of padding
    may stand before the valid ones (where all is zero anyway) or behind them.
    """
    places = torch.arange(1, valid.shape[1] + 1)
    end = (valid * places).amax(dim=-1)
    index = (end[:, None] + torch.arange(count))[:, None].expand(-1, wide.shape[1], -1)
    return wide.gather(2, index)
