"""Error statistics between a reference and an approximation, all computed in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _pair(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if reference.shape != other.shape:
        raise ValueError(f"shapes differ: {tuple(reference.shape)} and {tuple(other.shape)}")
    return reference.detach().to(torch.float64), other.detach().to(torch.float64)


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization-noise ratio in decibels; +inf where the two are equal."""
    a, b = _pair(reference, other)
    noise = float((a - b).square().sum())
    signal = float(a.square().sum())
    if noise == 0.0:
        return math.inf
    if signal == 0.0:
        return -math.inf
    return 10.0 * math.log10(signal / noise)


def cosine(reference: Tensor, other: Tensor) -> float:
    """Cosine of the angle between the two, flattened; 1 where both are zero, 0 where one is."""
    a, b = _pair(reference, other)
    norm_a, norm_b = float(a.norm()), float(b.norm())
    if norm_a == 0.0 or norm_b == 0.0:
        return 1.0 if norm_a == norm_b else 0.0
    return float((a / norm_a * (b / norm_b)).sum())


def max_abs(reference: Tensor, other: Tensor) -> float:
    """Largest absolute difference; 0 for empty tensors."""
    a, b = _pair(reference, other)
    return float((a - b).abs().max()) if a.numel() else 0.0


def relative_error(reference: Tensor, other: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference; +inf on a zero reference."""
    a, b = _pair(reference, other)
    difference = float((a - b).norm())
    norm = float(a.norm())
    if norm == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / norm


def kl_divergence(reference_logits: Tensor, logits: Tensor) -> float:
    """Mean over rows of KL(softmax(reference) || softmax(other)) in nats; logits are [..., V]."""
    a, b = _pair(reference_logits, logits)
    log_p = torch.log_softmax(a, dim=-1)
    log_q = torch.log_softmax(b, dim=-1)
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))
    return float(terms.sum(dim=-1).mean())
