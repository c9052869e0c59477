"""Mixtures of experts as plain linears.

transformers keeps a layer's experts in stacked tensors and picks rows of tokens per expert, whose
number no graph can hold. It calls what is registered in its ``ExpertsInterface``; mqc registers a
function that applies every expert to every token, zero where the router did not choose it. So each
expert's projections are linears of their own, with their own scales and their own calibration
(rows that are zero do not count), and the graph needs nothing but what every other layer needs.
The price is arithmetic: a layer computes all its experts for every token, not the chosen ones. Pass
route-experts, with which the onnx target lowers for a CPU, takes it back; the cuda target and
``--device cuda`` pay it, since recorded steps cannot depend on how many rows chose an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

NAME = "mqc_dense_experts"


def dense_experts(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Sum of the chosen experts' outputs, weighted by the router.

    Args:
        experts: a module with stacked weights ``gate_up_proj`` (or ``up_proj``) and ``down_proj``,
            each [experts, out, in] (or [experts, in, out], if transposed).
        hidden_states: [rows, hidden].
        top_k_index: int64 [rows, k], the chosen experts.
        top_k_weights: [rows, k].

    Returns:
        [rows, hidden].
    """
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    total = None
    for index in range(experts.num_experts):
        chosen = top_k_index == index
        routed = chosen.any(-1, keepdim=True).to(hidden_states.dtype)
        weight = (top_k_weights * chosen).sum(-1, keepdim=True).to(hidden_states.dtype)
        inner = _project(experts, first, index, hidden_states * routed)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        output = _project(experts, "down_proj", index, inner) * weight
        total = output if total is None else total + output
    assert total is not None
    return total


def _project(experts: Any, name: str, index: int, x: torch.Tensor) -> torch.Tensor:
    weight = getattr(experts, name)[index]
    bias = getattr(experts, f"{name}_bias")[index] if experts.has_bias else None
    return linear(x, weight.T if experts.is_transposed else weight, bias)


def use_dense_experts(model: PreTrainedModel) -> None:
    """Make every mixture of experts in ``model`` call :func:`dense_experts`."""
    ExpertsInterface.register(NAME, dense_experts)
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(module, "has_gate") and hasattr(module, "down_proj") and config is not None:
            config._experts_implementation = NAME
