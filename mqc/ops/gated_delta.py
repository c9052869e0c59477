"""mqc::gated_delta: the gated delta rule, a recurrence over tokens (arXiv 2412.06464)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mqc.ops._library import Arguments, OnnxForm, OpDef, register

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body


def reference(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> Tensor:
    """Read and rewrite an associative memory, token by token.

    ``M <- exp(decay_t) M;  M <- M + k_t (beta_t (v_t - M^T k_t))^T;  y_t = M^T q_t``

    Args:
        q, k: float [B, H, S, D].
        v: float [B, H, S, E].
        decay: float [B, H, S], at most 0; 0 keeps the memory.
        beta: float [B, H, S] in [0, 1]; 0 writes nothing.
        state: float [B, H, D, E], the memory before the first token.

    Returns:
        float [B, H, S + D, E]: the rows y, then the memory after the last token.
    """
    rows = []
    for t in range(q.shape[2]):
        state = state * decay[:, :, t].exp()[..., None, None]
        known = (state * k[:, :, t, :, None]).sum(-2)
        update = (v[:, :, t] - known) * beta[:, :, t, None]
        state = state + k[:, :, t, :, None] * update[:, :, None]
        rows.append((state * q[:, :, t, :, None]).sum(-2))
    return torch.cat([torch.stack(rows, 2), state], 2)


def fake(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """Shape function: [B, H, S + D, E]."""
    return v.new_empty((*v.shape[:2], v.shape[2] + q.shape[3], v.shape[3]))


def _flags(arguments: Arguments) -> tuple[str, ...]:
    return ()


def _inputs(flags: Sequence[str]) -> tuple[str, ...]:
    return ("q", "k", "v", "decay", "beta", "state")


def _body(body: Body, flags: Sequence[str]) -> str:
    memory, rows = body.scan("state", ("q", "k", "v", "decay", "beta"), 2, _step, (4, 3))
    return body("Concat", rows, memory, axis=2)


def _step(body: Body, state: str, values: Sequence[str]) -> tuple[str, str]:
    """One token: q, k [B, H, D], v [B, H, E], decay, beta [B, H]; the new memory and y."""
    q, k, v, decay, beta = values
    kept = body("Mul", state, body("Unsqueeze", body("Exp", decay), body.axes(-1, -2)))
    key = body("Unsqueeze", k, body.axes(-1))
    known = body("ReduceSum", body("Mul", kept, key), body.axes(-2), keepdims=0)
    update = body("Mul", body("Sub", v, known), body("Unsqueeze", beta, body.axes(-1)))
    new = body("Add", kept, body("Mul", key, body("Unsqueeze", update, body.axes(-2))))
    query = body("Unsqueeze", q, body.axes(-1))
    return new, body("ReduceSum", body("Mul", new, query), body.axes(-2), keepdims=0)


OP = register(
    OpDef(
        "gated_delta",
        "(Tensor q, Tensor k, Tensor v, Tensor decay, Tensor beta, Tensor state) -> Tensor",
        reference,
        fake,
        OnnxForm("GatedDelta", _flags, _inputs, _body, {}),
    )
)
