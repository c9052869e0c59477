"""Give any model the outliers of a large one, without changing what it computes.

Large language models have a few channels far above the rest; small or random ones have none, so
quantization of them proves nothing. Here outliers are put where they cancel exactly: between the
two linears of a feed-forward block, between value and output projections, and between a norm's
gain and the linears that read it. Factors are powers of two, so not a bit of the result is lost.
Where these places are is found in the captured graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from mqc.analysis.attention import ValueOutputPair, find_attention
from mqc.analysis.flow import NORMS, ChannelFlow
from mqc.analysis.mlp import find_feed_forward
from mqc.capture import capture
from mqc.ir import Program
from mqc.ir.edit import argument
from mqc.passes.canonicalize import Canonicalize
from mqc.transform import PassContext, PassManager


@dataclass
class OutlierReport:
    """How many places were scaled, by kind."""

    counts: Counter[str] = field(default_factory=Counter)


KINDS = ("feed_forward", "attention", "norms")
"""Where outliers can be put."""


def inject_outliers(
    model: torch.nn.Module,
    *,
    factor: int = 32,
    channels: int = 3,
    seed: int = 0,
    kinds: Collection[str] = KINDS,
) -> OutlierReport:
    """Scale ``channels`` random channels of every place by ``factor``, in the model's own weights.

    Args:
        model: a transformers vision-language model; its parameters are changed in place.
        factor: a power of two.
        channels: channels per feed-forward block, attention and norm.
        seed: of the choice of channels.
        kinds: which places; all by default.

    Raises:
        ValueError: ``factor`` is not a power of two, or a kind is unknown.
    """
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"unknown kinds of outliers: {', '.join(sorted(unknown))}")
    if factor < 1 or factor & (factor - 1):
        raise ValueError(f"factor {factor} is not a power of two, so results would be rounded")
    program = PassManager([Canonicalize()]).run(capture(model), PassContext())
    injector = _Injector(program, model, factor, channels, seed)
    with torch.no_grad():
        for kind in KINDS:
            if kind in kinds:
                getattr(injector, kind)()
    return injector.report


class _Injector:
    def __init__(
        self, program: Program, model: torch.nn.Module, factor: int, channels: int, seed: int
    ) -> None:
        self.program = program
        self.parameters = dict(model.named_parameters())
        self.factor = float(factor)
        self.channels = channels
        self.generator = torch.Generator().manual_seed(seed)
        self.report = OutlierReport()
        self.uses = Counter(
            str(node.target)
            for component in program
            for node in component.graph.find_nodes(op="get_attr")
        )

    def _pick(self, width: int) -> Tensor:
        return torch.randperm(width, generator=self.generator)[: self.channels]

    def _own(self, node: fx.Node, index: int) -> Tensor | None:
        """The model's parameter at an argument; None if missing, shared or not the model's."""
        value = argument(node, index)
        if not isinstance(value, fx.Node) or self.uses[str(value.target)] > 1:
            return None
        return self.parameters.get(str(value.target))

    def feed_forward(self) -> None:
        for pair in find_feed_forward(self.program):
            down = self._own(pair.down, 1)
            for up in pair.scalable:
                weight, bias = self._own(up, 1), self._own(up, 2)
                if (
                    down is None
                    or weight is None
                    or (argument(up, 2) is not None) != (bias is not None)
                ):
                    continue
                picked = self._pick(weight.shape[0])
                weight[picked] *= self.factor
                if bias is not None:
                    bias[picked] *= self.factor
                down[:, picked] /= self.factor
                self.report.counts["feed_forward"] += 1

    def attention(self) -> None:
        for pair in find_attention(self.program):
            if not isinstance(pair, ValueOutputPair):
                continue
            (value,), (reader,) = pair.values, pair.outputs
            weight, bias = self._own(value, 1), self._own(value, 2)
            output = self._own(reader, 1)
            if weight is None or output is None:
                continue
            picked = self._pick(pair.head_dim)
            rows, columns = pair.value_rows[:, picked], pair.output_columns[:, picked]
            weight[rows] *= self.factor
            if bias is not None:
                bias[rows] *= self.factor
            output[:, columns] /= self.factor
            self.report.counts["attention"] += 1

    def norms(self) -> None:
        flow = ChannelFlow(self.program, norms_open=True)
        for component in self.program:
            for node in component.graph.nodes:
                if node.target not in NORMS:
                    continue
                group, gain = flow.group_of(node), self._own(node, 2)
                if group is None or gain is None or len(group.writers) != 1:
                    continue
                others = group.adds or group.barriers or group.constants or group.sources
                weights = [self._own(site.node, 1) for site in group.readers]
                if others or not weights or any(weight is None for weight in weights):
                    continue
                picked = self._pick(group.width)
                gain[picked] *= self.factor
                shift = self._own(node, 3) if len(node.args) > 4 else None
                if shift is not None:
                    shift[picked] *= self.factor
                for site, weight in zip(group.readers, weights, strict=True):
                    assert weight is not None
                    blocks = weight.view(weight.shape[0], site.blocks, group.width)
                    blocks[:, :, picked] /= self.factor
                self.report.counts["norms"] += 1
