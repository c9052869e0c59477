"""The gated delta rule over a prompt in chunks, by matrix products (arXiv 2412.06464, section 3.3).

Token by token, a prompt would be ten launches a token and layer. Within a chunk the rows that are
written to the memory solve a triangular system; from chunk to chunk the memory is carried.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from mqc.ops.gated_delta import reference

FEW = 8
"""Up to this many tokens are read one after the other."""
CHUNK = 64
"""Tokens of a chunk: the triangular systems grow with it, the steps from chunk to chunk shrink."""


def by_length(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> Tensor:
    """``mqc::gated_delta`` by its definition for few tokens, in chunks for more."""
    how = reference if q.shape[2] <= FEW else gated_delta
    return how(q, k, v, decay, beta, state)


def gated_delta(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor, chunk: int = CHUNK
) -> Tensor:
    """``mqc::gated_delta``: its arguments and result; sums are in another order.

    With g the sums of ``decay`` within a chunk, M the memory before it and u_t what token t writes,
    ``u_t = beta_t (v_t - exp(g_t) M^T k_t - sum_{j<t} exp(g_t - g_j) (k_j . k_t) u_j)`` and
    ``y_t = exp(g_t) M^T q_t + sum_{j<=t} exp(g_t - g_j) (k_j . q_t) u_j``.
    """
    tokens = q.shape[2]
    missing = -tokens % chunk  # rows that write nothing and keep the memory
    q, k, v = (pad(x, (0, 0, 0, missing)).unflatten(2, (-1, chunk)) for x in (q, k, v))
    decay, beta = (pad(x, (0, missing)).unflatten(2, (-1, chunk)) for x in (decay, beta))
    total = decay.cumsum(-1)
    # Above the diagonal the difference is positive, and its exponential might be infinite.
    fade = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    known = torch.exp(total)[..., None]
    system = (beta[..., None] * fade * (k @ k.mT)).tril(-1)
    wanted = beta[..., None] * torch.cat([v, known * k], -1)
    # The diagonal is taken as ones.
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    values, keys = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    read, attend = known * q, fade * (q @ k.mT)
    kept, last = known[..., -1:, :], (fade[..., -1, :, None] * k).mT
    rows = []
    for index in range(q.shape[2]):
        written = values[:, :, index] - keys[:, :, index] @ state
        rows.append(read[:, :, index] @ state + attend[:, :, index] @ written)
        state = kept[:, :, index] * state + last[:, :, index] @ written
    return torch.cat([torch.cat(rows, 2)[:, :, :tokens], state], 2)
