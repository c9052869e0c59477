"""GPTQ: second-order weight quantization (Frantar et al., arXiv 2210.17323).

Columns are rounded one after the other; the rounding error of each is pushed onto the columns
that are still free, weighted by the inverse Hessian of ``|| X (W - Q)^T ||^2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mqc.errors import CalibrationError, UsageError
from mqc.numerics.quantize import (
    ClipSearch,
    QuantizedWeight,
    require_finite,
    weight_range,
    weight_scale,
)

_DAMPING_RETRIES = 4


class HessianAccumulator:
    """Running H = 2 X^T X over batches of a linear layer's inputs.

    Args:
        k: input channels.
        dtype: float32 (default; K^2 * 4 bytes) or float64.
        device: where the sum lives and is computed; the CPU by default.
    """

    def __init__(
        self, k: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        self._h = torch.zeros(k, k, dtype=dtype, device=device)
        self._pending: list[Tensor] = []
        self.rows = 0

    def add(self, x: Tensor) -> None:
        """Add a batch of inputs [..., K].

        Raises:
            CalibrationError: on NaN or infinite values; the sum is then left as it was.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.shape[1] != self._h.shape[0]:
            raise UsageError(
                f"the Hessian is over {self._h.shape[0]} channels, the batch has {rows.shape[1]}"
            )
        require_finite("a calibration batch", rows)
        self._pending.append(rows.to(device=self._h.device, dtype=self._h.dtype))
        self.rows += rows.shape[0]
        if 4 * sum(len(part) for part in self._pending) >= len(self._h):
            self._flush()

    def _flush(self) -> None:
        """Add what waits. A few rows alone cost as much as many: all K^2 sums are rewritten."""
        if self._pending:
            rows = torch.cat(self._pending)
            self._h.addmm_(rows.T, rows, alpha=2.0)
            self._pending.clear()

    def hessian(self) -> Tensor:
        """A copy of H, [K, K].

        Raises:
            CalibrationError: where no row was ever added.
        """
        if self.rows == 0:
            raise CalibrationError(
                "no calibration input reached this layer",
                hint="check that the calibration samples exercise it (images for vision layers)",
            )
        self._flush()
        return self._h.clone()


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    *,
    bits: int = 4,
    group_size: int | None = None,
    clip: ClipSearch | None = None,
    damping: float = 0.01,
    act_order: bool = True,
    block_size: int = 128,
    frozen: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> QuantizedWeight:
    """Quantize a weight [N, K] against a Hessian [K, K]; the inputs are not modified.

    Scales are fixed beforehand from the original weight (static groups), so act-order leaves a
    column in its own group. A row where GPTQ ends with a larger ``e H e^T`` than rounding to
    nearest takes the latter: the result is never worse than RTN with the same scales.

    Args:
        clip: search clipped scales; None takes the full range.
        damping: fraction of mean(diag H) added to the diagonal, times 10 on each failed Cholesky
            factorisation, at most four times.
        act_order: process columns by falling diagonal of H.
        frozen: bool [K], columns that must stay exactly zero (a split-off column); their weights
            must be zero. Inputs never active in calibration (zero diagonal) are rounded to
            nearest: they carry no second-order information.
        dtype: float32 or float64, of all computations.

    Raises:
        CalibrationError: on NaN or infinite inputs, or where no damping makes H definite.
        UsageError: on shapes that do not fit, or a nonzero frozen column.
    """
    n, k = weight.shape
    if hessian.shape != (k, k):
        raise UsageError(
            f"a weight with {k} input channels needs a [{k}, {k}] Hessian, "
            f"got {tuple(hessian.shape)}"
        )
    require_finite("the Hessian", hessian)
    scale = weight_scale(weight, bits, group_size=group_size, clip=clip)
    w = weight.detach().to(dtype).clone()
    given = hessian.to(device=w.device, dtype=dtype)
    h = given.clone()
    keep_zero = torch.zeros(k, dtype=torch.bool) if frozen is None else frozen.to(torch.bool)
    keep_zero = keep_zero.to(w.device)
    if keep_zero.shape != (k,):
        raise UsageError(f"frozen must be bool [{k}], got {tuple(keep_zero.shape)}")
    if bool(w[:, keep_zero].any()):
        raise UsageError("a frozen column holds nonzero weights", hint="split it off first")

    dead = keep_zero | (h.diagonal() <= 0)
    h[dead, :] = 0
    h[:, dead] = 0
    mean = float(h.diagonal()[~dead].mean()) if bool((~dead).any()) else 1.0
    h.diagonal()[dead] = mean

    # [N, K]: the scale of each column's own group.
    column_scale = (
        scale.to(dtype)
        .reshape(n, -1)
        .repeat_interleave(k if group_size is None else group_size, dim=1)
    )
    low, high = weight_range(bits)
    nearest = torch.round(w / column_scale).clamp_(low, high)

    order = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else None
    if order is not None:
        w, h, column_scale = w[:, order], h[order][:, order], column_scale[:, order]
    factor = _inverse_factor(h, damping, mean)
    q = _solve(w, factor, column_scale, low, high, block_size)
    if order is not None:
        inverse = torch.argsort(order)
        q, column_scale = q[:, inverse], column_scale[:, inverse]

    original = weight.detach().to(dtype)
    gptq_error = row_energy(original - q * column_scale, given)
    rtn_error = row_energy(original - nearest * column_scale, given)
    better = torch.isfinite(gptq_error) & (gptq_error <= rtn_error)
    q = torch.where(better[:, None], q, nearest)
    q[:, keep_zero] = 0
    return QuantizedWeight(q.to(torch.int8), scale, bits, group_size)


def row_energy(rows: Tensor, h: Tensor) -> Tensor:
    """``r H r^T`` of each row r of ``rows`` [N, K], for ``h`` [K, K]; [N].

    With a layer's Hessian, twice the energy of what the rows, as weights, make of the inputs.
    """
    return ((rows @ h) * rows).sum(dim=1)


def _inverse_factor(h: Tensor, damping: float, mean: float) -> Tensor:
    """Upper Cholesky factor U of (H + damping * mean(diag) I)^-1 = U^T U.

    Writes to H's diagonal: K^2 values may be gigabytes, so there are no copies to spare.
    """
    diagonal = h.diagonal().clone()
    for attempt in range(_DAMPING_RETRIES + 1):
        h.diagonal().copy_(diagonal + damping * 10**attempt * mean)
        lower, info = torch.linalg.cholesky_ex(h)
        if int(info) != 0:
            continue
        inverse = torch.cholesky_inverse(lower)
        del lower
        upper: Tensor
        upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
        if int(info) == 0 and bool(torch.isfinite(upper).all()):
            return upper
    raise CalibrationError(
        f"the Hessian of {h.shape[0]} channels is not positive definite, even with damping "
        f"{damping * 10**_DAMPING_RETRIES:g}",
        hint="use more or more varied calibration samples, or float64 for GPTQ",
    )


def _solve(
    w: Tensor, factor: Tensor, column_scale: Tensor, low: int, high: int, block_size: int
) -> Tensor:
    """Round the columns of w [N, K] in order, feeding errors forward; integers as floats."""
    k = w.shape[1]
    w = w.clone()
    q = torch.zeros_like(w)
    for start in range(0, k, block_size):
        stop = min(start + block_size, k)
        block = w[:, start:stop].T.contiguous()  # [block, N]: a column is contiguous
        errors = torch.zeros_like(block)
        u = factor[start:stop, start:stop]
        for i in range(stop - start):
            scale = column_scale[:, start + i]
            level = torch.round(block[i] / scale).clamp_(low, high)
            q[:, start + i] = level
            error = (block[i] - level * scale) / u[i, i]
            errors[i] = error
            block[i + 1 :].addr_(u[i, i + 1 :], error, alpha=-1.0)
        w[:, stop:].addmm_(errors.T, factor[start:stop, stop:], alpha=-1.0)
    return q
