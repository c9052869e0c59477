"""``mqc inspect`` and ``mqc probe``: what an artifact holds, what a checkpoint gives."""

from __future__ import annotations

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
    columns = ["layer", "weights", "scale text>", "scale visual>", "split>", "SQNR, dB>"]
    console.print(common.table("layers", columns, map(layer_row, found.layers)))


def layer_row(layer: dict[str, Any]) -> list[Any]:
    """The cells of one layer's record; what a pass did not say stays empty."""
    bits = layer.get("bits")
    weights = None
    if bits is not None:
        group = f"g{layer['group_size']}" if layer.get("group_size") else ""
        weights = f"W{bits}{group} {layer.get('method', '')}".strip()
    scales = [_number(value) for value in layer.get("scales", ())]
    if len(scales) == 1:
        scales = [scales[0], scales[0]] if layer.get("modality") != "visual" else [None, scales[0]]
    text, visual = (*scales, None, None)[:2]
    split = layer.get("columns_split")
    count = len(split) if isinstance(split, list) else split
    return [layer["layer"], weights, text, visual, count, _number(layer.get("sqnr_db"), "%.1f")]


def _number(value: Any, form: str = "%.4g") -> str | None:
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
    from mqc.capture import probe

    report = probe(model, revision=revision, trust_remote_code=trust_remote_code)
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
    for name, value in report.analyses.items():
        console.print(f"  {name}: {value}", markup=False)
    if report.weights is not None:
        console.print(f"[bold red]weights:[/] {escape(report.weights)}")


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
