"""``probe``: what of a checkpoint can be captured, and what the analyses see in its graphs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mqc.analysis.attention import Unpaired, find_attention
from mqc.analysis.flow import ChannelFlow
from mqc.analysis.mlp import find_feed_forward
from mqc.analysis.streams import find_streams
from mqc.capture import ProbeReport, capture_shapes
from mqc.capture import probe as probe_capture
from mqc.ir import Program
from mqc.passes.canonicalize import Canonicalize
from mqc.passes.fuse_norm import FuseNorm
from mqc.passes.hadamard_fuse import HadamardFuse
from mqc.passes.hadamard_online import HadamardOnline
from mqc.transform import PassContext, PassManager

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def probe(
    model_or_path: str | Path | PreTrainedModel,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ProbeReport:
    """Components, layers and modalities, and, where all was captured, the streams and pairs.

    ``analyses["skips"]`` says what rotation would leave as it is, or at run time, and why.

    No checkpoint that can be named makes this fail: what cannot be captured is in the report.
    Raises :class:`~mqc.errors.CheckpointError` where there is nothing to probe.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    report = probe_capture(model_or_path, **options)
    if report.captured:
        program = capture_shapes(model_or_path, **options)
        manager = PassManager([Canonicalize(), FuseNorm(), HadamardFuse(), HadamardOnline()])
        report.analyses.update(analyse(PassManager([Canonicalize()]).run(program, PassContext())))
        manager.run(program, PassContext())
        report.analyses["skips"] = [
            f"{record.name}: {skip.where}: {skip.reason}"
            for record in manager.records
            for skip in record.skips
        ]
    return report


def analyse(program: Program) -> dict[str, Any]:
    """What rotations and splits work from, found in a canonical program; JSON data.

    ``streams``: residual streams; ``attention`` and ``feed_forward``: pairs by component;
    ``unpaired``: attentions whose value heads stay as they are, with the reasons.
    """
    attention = find_attention(program)
    unpaired = [item for item in attention if isinstance(item, Unpaired)]
    flow = ChannelFlow(program, norms_open=True)  # as if norms were fused: that reads weights
    paired = Counter(item.component for item in attention if not isinstance(item, Unpaired))
    return {
        "streams": [stream.describe() for stream in find_streams(flow)],
        "attention": dict(paired),
        "feed_forward": dict(Counter(item.component for item in find_feed_forward(program))),
        "unpaired": [
            f"{item.component}.%{item.attention.name}: {item.reason}" for item in unpaired
        ],
    }
