"""``plan``: what a compile would do to a model, and what would come out, from its shapes alone."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mqc.analysis.flow import is_linear
from mqc.analysis.head import find_head
from mqc.analysis.liveness import peak_bytes
from mqc.analysis.modality import MIXED, find_domains
from mqc.analysis.routing import find_routers
from mqc.capture import capture_shapes
from mqc.ir import Component, Program, TensorType
from mqc.ir.edit import aten
from mqc.ir.symbols import ExampleSizes
from mqc.pipeline import make_passes, pass_names
from mqc.spec import Scheme, WeightSpec, named_scheme
from mqc.transform import PassContext, PassManager

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NEEDS_VALUES = frozenset({"rms-suppress", "quantize-weights", "static-scales"})
"""Passes that look at weights or activations, which a plan does not have."""


@dataclass
class ComponentPlan:
    """One component: its linears, and bytes of its weights before and after."""

    name: str
    linears: int = 0
    quantized: int = 0
    mixed: int = 0
    """Quantized linears that read rows of both modalities: two activation scales each."""
    hadamards: dict[str, int] = field(default_factory=dict)
    """Online transforms by "width / block"."""
    parameters: int = 0
    float_bytes: int = 0
    compiled_bytes: int = 0
    activation_bytes: int = 0
    """Peak of the float graph's values at the plan's sizes."""


@dataclass
class Plan:
    """What :func:`plan` found; JSON-able through :meth:`to_json`."""

    name: str
    scheme: str
    streams: list[dict[str, Any]]
    online_rotations: int
    """Rotations of streams that stay in the graph because a fold cannot reach them."""
    value_heads: int
    components: list[ComponentPlan]
    kv_bytes_per_token: int
    tokens: int
    image_tokens: int
    passes: list[dict[str, Any]]
    skips: list[dict[str, Any]]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def float_bytes(self) -> int:
        return sum(part.float_bytes for part in self.components)

    @property
    def compiled_bytes(self) -> int:
        return sum(part.compiled_bytes for part in self.components)


def plan(
    model: str | Path | PretrainedConfig | PreTrainedModel,
    scheme: str | Scheme = "w4a8",
    *,
    tokens: int = 1024,
    image_tokens: int = 256,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Capture a model without weights, run the passes that need none, and forecast memory.

    Args:
        model: a folder (``config.json`` is enough), a hub id, a configuration, or a model.
        scheme: what a compile would quantize: a scheme, or the name of one.
        tokens: length of the prompt that activations are forecast for.
        image_tokens: visual tokens of an image, for towers of a variable grid.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: let transformers run code that comes with the checkpoint.

    Returns:
        Streams, rotations and, for each component, linears and bytes; see :class:`Plan`. Columns
        that ``rms-suppress`` would split are not known (it reads weights and activations); each
        costs 4 bytes for every output channel.

    Raises:
        UsageError: no scheme has this name.
        CheckpointError: there is no such model, or of another kind.
        CaptureError: a component could not be turned into a graph.
    """
    start = time.perf_counter()
    scheme = named_scheme(scheme) if isinstance(scheme, str) else scheme
    program = capture_shapes(model, revision=revision, trust_remote_code=trust_remote_code)
    sizes = ExampleSizes(1, tokens=tokens, past=0, rows=1)
    rows = str(program.components["vision"].output("image_embeds").type.shape[0])
    visual = ExampleSizes(1, **({rows: image_tokens} if rows.isidentifier() else {}))
    activations = {
        part.name: peak_bytes(part, visual if part.name == "vision" else sizes) for part in program
    }
    names = [name for name in pass_names(scheme) if name not in NEEDS_VALUES]
    names = [name for name in names if name not in ("aifs-reorder", "cleanup")]
    program = PassManager(make_passes(names, scheme)).run(program, PassContext(seed=scheme.seed))
    domains = find_domains(program)
    parts = []
    for component in program:
        part = _describe(component, scheme)
        part.mixed = sum(
            domains.get(node) == MIXED for node in component.graph.nodes if is_linear(node)
        )
        part.activation_bytes = activations[component.name]
        parts.append(part)
    history = {entry["pass"]: entry for entry in program.history}
    rotations = history.get("hadamard-fuse", {})
    counts = rotations.get("counts", {})
    facts = program.facts
    return Plan(
        name=str(facts["source"]["name"]),
        scheme=scheme.name,
        streams=[item["stream"] for item in rotations.get("details", ())],
        online_rotations=counts.get("online", 0),
        value_heads=counts.get("value_heads", 0),
        components=parts,
        kv_bytes_per_token=_kv_bytes(program, scheme),
        tokens=tokens,
        image_tokens=image_tokens,
        passes=[{"pass": name, **entry.get("counts", {})} for name, entry in history.items()],
        skips=[skip for entry in program.history for skip in entry.get("skips", ())],
        seconds=time.perf_counter() - start,
    )


def _describe(component: Component, scheme: Scheme) -> ComponentPlan:
    """Count what the scheme quantizes, as ``quantize-weights`` chooses it."""
    part = ComponentPlan(component.name)
    spec, head = scheme.component(component.name), find_head(component)
    routers = find_routers(component)
    seen: dict[str, int] = {}
    hadamards: Counter[str] = Counter()
    for node in component.graph.nodes:
        if node.target == torch.ops.mqc.hadamard.default:
            width = node.meta["type"].shape[-1]
            hadamards[f"{width} / {node.args[1]}"] += 1
        linear = is_linear(node)
        weights = spec.head if node is head else spec.weights
        part.linears += linear
        if node.target == aten.embedding.default and component.name == "embed":
            table = node.args[0]
        elif linear:
            table = node.args[1]
        else:
            continue
        kept = "keep_float" in node.meta or node in routers
        if weights is not None and weights.quantized and not kept:
            part.quantized += linear
            seen[str(table.target)] = _quantized_bytes(table.meta["type"], weights)
    for node in component.graph.find_nodes(op="get_attr"):
        kind = node.meta["type"]
        count = _count(kind)
        if kind.dtype.is_floating_point and str(node.target) not in seen:
            seen[str(node.target)] = count * kind.dtype.itemsize
        part.parameters += count
        part.float_bytes += count * kind.dtype.itemsize
    part.hadamards = dict(hadamards)
    part.compiled_bytes = sum(seen.values())
    return part


def _quantized_bytes(kind: TensorType, spec: WeightSpec) -> int:
    """Bytes of a packed weight [N, K] and its float32 scales."""
    count, rows = _count(kind), int(kind.shape[0])
    columns = count // rows
    group = spec.group_size
    groups = columns // group if group and columns % group == 0 else 1
    packed = count if spec.bits == 8 else rows * ((columns + 1) // 2)
    return packed + 4 * rows * groups


def _count(kind: TensorType) -> int:
    count = 1
    for size in kind.shape:
        count *= int(size)
    return count


def _kv_bytes(program: Program, scheme: Scheme) -> int:
    """Bytes that one token takes in the KV cache of one sequence; int8 rows have a float scale."""
    int8 = scheme.kv_cache == "int8"
    ports = program.components["decoder"].inputs
    caches = [port for port in ports if port.axis("past") is not None and port.name != "mask"]
    return sum(
        int(port.type.shape[1])
        * (
            int(port.type.shape[3]) + 4
            if int8
            else int(port.type.shape[3]) * port.type.dtype.itemsize
        )
        for port in caches
    )
