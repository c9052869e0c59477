"""Observers: one static symmetric scale per tensor from many calibration batches.

Memory is constant: a running maximum, or a histogram of |x| with 2048 bins over [0, 2^e). The
range is a power of two and grows by merging neighbouring bins, so bins always nest: the result
does not depend on how the data is cut into batches, nor on their order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mqc.errors import CalibrationError, UsageError

BINS = 2048
"""Histogram bins; even, so that pairs merge when the range doubles."""

ZERO_SCALE = 1e-8
"""Scale of a tensor that was zero in all of calibration."""


class Observer(ABC):
    """Collects what a scale needs; `bits` is the width of the signed integers (127 for 8)."""

    def __init__(self, bits: int = 8) -> None:
        if not 2 <= bits <= 16:
            raise UsageError(f"activations of {bits} bits are not supported", hint="use 2 to 16")
        self.levels = 2 ** (bits - 1) - 1
        self.count = 0
        self.amax = 0.0

    def update(self, x: Tensor) -> None:
        """Take in a batch of any shape; an empty one changes nothing.

        Raises:
            CalibrationError: on NaN or infinite values.
        """
        if x.numel() == 0:
            return
        magnitude = x.detach().reshape(-1).to(torch.float64).abs()
        if not bool(torch.isfinite(magnitude).all()):
            raise CalibrationError(
                "a calibration batch holds NaN or infinite activations",
                hint="run calibration in float32 and check the model's output on this sample",
            )
        self.amax = max(self.amax, float(magnitude.max()))
        self.count += magnitude.numel()
        self._collect(magnitude)

    def scale(self) -> float:
        """The step between two integers, > 0; `ZERO_SCALE` where all data was zero.

        Raises:
            CalibrationError: where no value was ever observed.
        """
        if self.count == 0:
            raise CalibrationError(
                "no calibration value was observed",
                hint="check that the calibration samples reach this layer and modality",
            )
        return float(max(self._clip() / self.levels, ZERO_SCALE))

    def _collect(self, magnitude: Tensor) -> None:
        """Take in |x|, float64 [n], n > 0; `amax` is up to date. Default: nothing more."""
        return None

    @abstractmethod
    def _clip(self) -> float:
        """The magnitude that is mapped to the largest integer."""


class MinMaxObserver(Observer):
    """The largest magnitude seen."""

    def _clip(self) -> float:
        return self.amax


class HistogramObserver(Observer):
    """Base of the observers that look at the distribution of |x|."""

    def __init__(self, bits: int = 8) -> None:
        super().__init__(bits)
        self.counts = torch.zeros(BINS, dtype=torch.int64)
        self.range = 0.0

    def _collect(self, magnitude: Tensor) -> None:
        if self.amax > 0.0:
            # frexp: amax = m * 2^e with m < 1, so amax < 2^e
            self._grow(math.ldexp(1.0, max(math.frexp(self.amax)[1], -1000)))
        if self.range == 0.0:
            self.counts[0] += magnitude.numel()
            return
        index = (magnitude * (BINS / self.range)).to(torch.int64).clamp_(max=BINS - 1)
        self.counts += torch.bincount(index, minlength=BINS)

    def _grow(self, wanted: float) -> None:
        if self.range == 0.0:
            self.range = wanted  # everything so far was zero and lies in bin 0
        while self.range < wanted:
            merged = self.counts.reshape(-1, 2).sum(dim=1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.range *= 2.0


class PercentileObserver(HistogramObserver):
    """The magnitude below which `percentile` per cent of the values lie."""

    def __init__(self, bits: int = 8, percentile: float = 99.99) -> None:
        super().__init__(bits)
        if not 0.0 < percentile <= 100.0:
            raise UsageError(f"percentile {percentile} is not in (0, 100]")
        self.percentile = percentile

    def _clip(self) -> float:
        if self.percentile == 100.0 or self.range == 0.0:
            return self.amax
        cumulative = self.counts.cumsum(0)
        wanted = math.ceil(self.count * self.percentile / 100.0)
        index = int(torch.searchsorted(cumulative, wanted))
        return min(self.amax, (index + 1) * self.range / BINS)


class MseObserver(HistogramObserver):
    """The clip with the least squared error of quantizing the histogram.

    Candidates are amax * i / candidates; each bin stands for `POINTS` equally spaced values.
    """

    POINTS = 4

    def __init__(self, bits: int = 8, candidates: int = 200) -> None:
        super().__init__(bits)
        if candidates < 1:
            raise UsageError(f"mse needs at least one candidate, got {candidates}")
        self.candidates = candidates

    def _clip(self) -> float:
        if self.range == 0.0:
            return self.amax
        used = int(self.counts.nonzero().max()) + 1
        counts = self.counts[:used].to(torch.float64)
        counts[0] = 0.0  # zeros and near-zeros round to 0 under every candidate
        offsets = (torch.arange(self.POINTS, dtype=torch.float64) + 0.5) / self.POINTS
        edges = torch.arange(used, dtype=torch.float64)
        values = ((edges[:, None] + offsets) * (self.range / BINS)).clamp_(max=self.amax)
        best, best_error = self.amax, math.inf
        for step in range(self.candidates, 0, -1):
            clip = self.amax * step / self.candidates
            unit = clip / self.levels
            rounded = torch.round(values / unit).clamp_(max=self.levels) * unit
            error = float(((values - rounded).square_() * counts[:, None]).sum())
            if error < best_error:
                best, best_error = clip, error
        return best


def make_observer(kind: str, bits: int = 8, **options: float) -> Observer:
    """Make an observer: "minmax", "percentile" (percentile=99.99) or "mse" (candidates=200).

    Raises:
        UsageError: on an unknown kind or option.
    """
    kinds: dict[str, type[Observer]] = {
        "minmax": MinMaxObserver,
        "percentile": PercentileObserver,
        "mse": MseObserver,
    }
    if kind not in kinds:
        raise UsageError(f"unknown observer {kind!r}", hint=f"choose one of {', '.join(kinds)}")
    allowed = {"percentile": {"percentile"}, "mse": {"candidates"}}.get(kind, set())
    unknown = set(options) - allowed
    if unknown:
        raise UsageError(
            f"observer {kind!r} has no option {', '.join(sorted(unknown))}",
            hint=f"its options: {', '.join(sorted(allowed)) or 'none'}",
        )
    if kind == "mse" and "candidates" in options:
        return MseObserver(bits, candidates=int(options["candidates"]))
    return kinds[kind](bits, **options)
