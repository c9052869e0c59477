"""``mqc inspect`` and ``mqc probe``: what an artifact holds, what a checkpoint gives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape

from mqc.commands import _common as common


def inspect_command(artifact: common.ArtifactPath, as_json: common.Json = False) -> None:
    """Show each layer of an artifact: bits, scales per modality, columns split, SQNR.

    Example: mqc inspect tiny-w4a8
    """
    from mqc import api
    from mqc.artifact import format_size

    found = api.inspect(artifact)
    if as_json:
        common.print_json(found.to_json())
        return
    console = common.stdout()
    scheme = found.scheme.describe() if found.scheme else "no scheme"
    console.print(f"[bold]{artifact}[/]  target {found.target}, {format_size(found.bytes)}")
    console.print(f"  {scheme}", markup=False)
    if found.calibration:
        rows, source = found.calibration.get("rows"), found.calibration.get("source")
        console.print(f"  calibrated on {rows} rows of {source}", markup=False)
    console.print("  passes: " + ", ".join(str(entry["pass"]) for entry in found.passes))
    quantized = [layer for layer in found.layers if layer.get("bits") is not None]
    for component in dict.fromkeys(str(layer["component"]) for layer in quantized):
        rows = [layer_row(layer) for layer in quantized if layer["component"] == component]
        console.print(common.table(component, LAYER_COLUMNS, rows))
    if not quantized:
        console.print("  no layer is quantized")


LAYER_COLUMNS = (
    "layer",
    "bits",
    "method",
    "scale text>",
    "scale visual>",
    "split>",
    "Hadamard>",
    "SQNR weight>",
    "SQNR output>",
)


def layer_row(layer: Mapping[str, Any]) -> list[Any]:
    """The cells of one layer's record; what no pass said stays empty.

    Scales are steps of int8; columns split off are named; SQNR in dB, of the weight alone and of
    the layer's output on the calibration data.
    """
    scales = layer.get("scales") or {}
    group = f"g{layer['group_size']}" if layer.get("group_size") else ""
    text, visual = scales.get("text"), scales.get("visual")
    if "all" in scales:
        text, visual = scales["all"], scales["all"]
        if layer["component"] == "vision":
            text = None
    split = ", ".join(map(str, layer.get("columns", ())))
    return [
        str(layer["layer"]).removeprefix("model.").removesuffix(".weight"),
        f"W{layer['bits']}{group}A{8 if scales else 16}",
        layer.get("method"),
        _number(text, "%.4g"),
        _number(visual, "%.4g"),
        split or None,
        layer.get("block"),
        _number(layer.get("weight_sqnr_db"), "%.1f"),
        _number(layer.get("output_sqnr_db"), "%.1f"),
    ]


def _number(value: Any, form: str) -> str | None:
    return None if value is None else form % value


def probe_command(
    model: common.Model,
    revision: common.Revision = None,
    trust_remote_code: common.Trust = False,
    as_json: common.Json = False,
) -> None:
    """Show what of a checkpoint can be captured, and why the rest cannot. Reads no weights.

    Example: mqc probe tiny-qwen2-vl
    """
    from mqc import api

    report = api.probe(model, revision=revision, trust_remote_code=trust_remote_code)
    if as_json:
        common.print_json(report.to_json())
        return
    console = common.stdout()
    layers = ", ".join(f"{name} {count}" for name, count in report.layers.items())
    console.print(f"[bold]{report.name}[/]  {report.model_type}, adapter {report.adapter}")
    console.print(
        f"  {report.parameters / 1e6:.1f} M parameters; layers: {layers}; "
        f"modalities: {', '.join(report.modalities)}",
        markup=False,
    )
    for part in report.components:
        if not part.captured:
            console.print(
                f"[bold red]{part.name}[/] cannot be captured: {escape(str(part.reason))}"
            )
            continue
        console.print(
            f"[bold]{part.name}[/]  {part.nodes} nodes, {part.parameters / 1e6:.2f} M parameters"
        )
        console.print("  in   " + "\n       ".join(fold_ports(part.inputs)), markup=False)
        console.print("  out  " + "\n       ".join(fold_ports(part.outputs)), markup=False)
    if report.analyses:
        _print_analyses(report.analyses)
    if report.weights is not None:
        console.print(f"[bold red]weights:[/] {escape(report.weights)}")
    elif not report.weights_here:
        console.print("weights: none here, so they were not compared with config.json")


def _print_analyses(found: Mapping[str, Any]) -> None:
    console = common.stdout()
    for stream in found["streams"]:
        online = f", {stream['online']} contacts rotated online" if stream["online"] else ""
        console.print(
            f"residual stream of {stream['width']} channels in {', '.join(stream['components'])}: "
            f"{stream['writers']} writers, {stream['adds']} additions, {stream['norms']} norms"
            f"{online}",
            markup=False,
        )
    for kind, name in (("attention", "value/output pairs"), ("feed_forward", "up/down pairs")):
        counts = ", ".join(f"{part} {count}" for part, count in found[kind].items())
        console.print(f"{name}: {counts or 'none'}", markup=False)
    for line in fold_skips(found.get("skips", ())):
        console.print(f"left as it is: {line}", markup=False)


def fold_skips(skips: Sequence[str]) -> list[str]:
    """``pass: component.%node: reason``, with equal reasons of a component counted."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for skip in skips:
        name, where, reason = skip.split(": ", 2)
        counts[name, where.partition(".")[0], reason.partition(" (%")[0]] += 1
    return [
        f"{part} ({name}): {reason}" + (f" ({count} times)" if count > 1 else "")
        for (name, part, reason), count in counts.items()
    ]


def fold_ports(ports: list[str]) -> list[str]:
    """Numbered ports of one kind as one line: ``past_key_0: T`` ... -> ``past_key_0..3: T``."""
    groups: dict[tuple[str, str], list[int]] = {}
    for port in ports:
        name, _, kind = port.partition(": ")
        stem, _, number = name.rpartition("_")
        if stem and number.isdecimal():
            groups.setdefault((f"{stem}_", kind), []).append(int(number))
        else:
            groups[name, kind] = []
    return [f"{stem}{_span(numbers)}: {kind}" for (stem, kind), numbers in groups.items()]


def _span(numbers: list[int]) -> str:
    if len(numbers) < 2:
        return "".join(map(str, numbers))
    return f"{min(numbers)}..{max(numbers)}"
