"""``probe``: what of a model can be captured, and why the rest cannot."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mqc.capture.build import Source, component_exporters, link_weights
from mqc.capture.importer import Imported, import_component
from mqc.capture.weights import NoWeights
from mqc.errors import CheckpointError, MqcError
from mqc.ir import TensorType
from mqc.ir.serialize import target_name


@dataclass
class ComponentReport:
    """One component: its interface and size, or the reason why it could not be captured."""

    name: str
    captured: bool
    reason: str | None = None
    nodes: int = 0
    parameters: int = 0
    """Scalars in the weights that the graph reads (a tied weight counts in each component)."""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    operators: dict[str, int] = field(default_factory=dict)


@dataclass
class ProbeReport:
    """What :func:`probe` found; JSON-able through :meth:`to_json`."""

    name: str
    model_type: str
    adapter: str
    modalities: list[str]
    layers: dict[str, int | None]
    """Layers of the ``vision`` tower and the ``language`` model."""
    parameters: int
    components: list[ComponentReport]
    weights: str | None = None
    """What is wrong with the weights; None if nothing is, or if none are here."""
    weights_here: bool = True
    """Whether weight files were there to be compared with the configuration."""
    analyses: dict[str, Any] = field(default_factory=dict)
    """Filled by analyses that run on the captured graphs (stream counts and the like)."""

    @property
    def captured(self) -> bool:
        """Whether everything was captured, and the weights, where they are here, fit."""
        return self.weights is None and all(item.captured for item in self.components)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "captured": self.captured}


def probe(
    model_or_path: PreTrainedModel | str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ProbeReport:
    """Try to capture every component of a model and report the result.

    No weights are read, and of a hub id none are downloaded: the headers of files that are on this
    machine are compared with the configuration.

    Raises :class:`~mqc.errors.CheckpointError` only where there is nothing to probe (no
    checkpoint, no configuration, no vision-language model).
    """
    weights: str | None = None
    try:
        source = Source(model_or_path, revision, trust_remote_code, weights=None)
    except CheckpointError as error:  # of the weights, or of what is needed in any case
        source = Source(model_or_path, revision, trust_remote_code, weights=False)
        weights = error.message
    weights_here = weights is not None or not isinstance(source.weights, NoWeights)
    skeleton = source.skeleton(dtype)
    tied = skeleton.tied()
    imported: dict[str, Imported] = {}
    reports = []
    for name, export in component_exporters(source.adapter, skeleton, dtype).items():
        try:
            imported[name] = import_component(export(), tied)
            reports.append(_describe(imported[name]))
        except MqcError as error:
            reports.append(ComponentReport(name, False, error.message))
    try:
        link_weights(source, skeleton, imported)
    except MqcError as error:
        weights = error.message
    vision = source.adapter.vision_config
    tower = getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", None)
    video = source.adapter.video_reader is not None
    has_token = hasattr(source.config, "video_token_id")
    return ProbeReport(
        name=str(source.facts["name"]),
        model_type=str(source.config.model_type),
        adapter=type(source.adapter).__name__,
        modalities=["text", "image", *_video(video, has_token)],
        layers={"vision": tower, "language": source.adapter.text_config.num_hidden_layers},
        parameters=sum(p.numel() for p in skeleton.model.parameters()),
        components=reports,
        weights=weights,
        weights_here=weights_here,
    )


def _video(taken: bool, named: bool) -> list[str]:
    """What to say of videos; ``named``: the configuration has a token for them."""
    return ["video"] if taken else ["video (not compiled)"] if named else []


def _describe(imported: Imported) -> ComponentReport:
    component = imported.component
    sizes: dict[str, int] = {}
    for node in component.graph.find_nodes(op="get_attr"):
        kind = node.meta["type"]
        if isinstance(kind, TensorType) and str(node.target) not in imported.constants:
            size = 1
            for dim in kind.shape:
                size *= int(dim)
            sizes[str(node.target)] = size
    calls = [node for node in component.graph.nodes if node.op == "call_function"]
    operators = Counter(target_name(node.target) for node in calls)
    return ComponentReport(
        component.name,
        True,
        nodes=len(calls),
        parameters=sum(sizes.values()),
        inputs=[f"{port.name}: {port.type}" for port in component.inputs],
        outputs=[f"{port.name}: {port.type}" for port in component.outputs],
        operators=dict(operators.most_common()),
    )
