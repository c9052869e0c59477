"""``mqc compile``: a checkpoint in, an artifact out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mqc.commands import _common as common
from mqc.config import component_override, make_recipe

if TYPE_CHECKING:
    from mqc.api import CompileReport
    from mqc.transform import PassRecord

Vision = Annotated[
    str | None,
    typer.Option(
        help="Bits of the vision tower: w8a8, w4a8, w8a16, float...",
        rich_help_panel=common.QUANTIZATION,
    ),
]
Decoder = Annotated[
    str | None,
    typer.Option(
        help="Bits of the language model: w4a8, w3g64a8, w4a16, float...",
        rich_help_panel=common.QUANTIZATION,
    ),
]
Head = Annotated[
    int | None,
    typer.Option(
        help="Weight bits of the head that gives the logits.", rich_help_panel=common.QUANTIZATION
    ),
]
Embeddings = Annotated[
    bool | None,
    typer.Option(
        "--embeddings/--no-embeddings",
        help="8-bit embedding table.",
        rich_help_panel=common.QUANTIZATION,
    ),
]
KvCache = Annotated[
    str | None,
    typer.Option(
        "--kv-cache",
        help="Keys and values as float (default), or int8 by rows.",
        rich_help_panel=common.QUANTIZATION,
    ),
]
CalibrationSource = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Folder of images, or JSONL of chat messages.",
        rich_help_panel=common.CALIBRATION,
    ),
]
Samples = Annotated[
    int,
    typer.Option(min=1, help="Calibration rows used, at most.", rich_help_panel=common.CALIBRATION),
]


def compile_command(
    model: common.Model,
    target: Annotated[str, typer.Option(help="onnx, cuda or reference; see mqc targets.")] = "onnx",
    device: Annotated[
        str | None, typer.Option(help="Of target onnx: write the files for cpu (default) or cuda.")
    ] = None,
    scheme: common.SchemeName = None,
    recipe: common.RecipeSource = None,
    sets: common.Sets = None,
    vision: Vision = None,
    decoder: Decoder = None,
    head: Head = None,
    embeddings: Embeddings = None,
    kv_cache: KvCache = None,
    passes: Annotated[
        list[str] | None,
        typer.Option(
            "--pass",
            help="Custom pass, module:Class (repeatable).",
            rich_help_panel=common.QUANTIZATION,
        ),
    ] = None,
    calibration: CalibrationSource = None,
    samples: Samples = 256,
    out: Annotated[Path | None, typer.Option(help="Artifact folder to write.")] = None,
    seed: common.Seed = None,
    verify_each: common.VerifyEach = False,
    dump_after: common.DumpAfter = None,
    dump_folder: common.DumpFolder = Path("mqc-dump"),
    pass_limit: common.PassLimit = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over; drop what an unfinished compile kept.")
    ] = False,
    revision: common.Revision = None,
    trust_remote_code: common.Trust = False,
    as_json: common.Json = False,
) -> None:
    """Compile a checkpoint into an artifact.

    What a long compile has finished is kept in OUT.partial until the artifact stands, at most one
    copy of the weights in float32 and one in int8. After a kill or an error the same command goes
    on there.

    Example: mqc compile tiny-qwen2-vl --target onnx --scheme w4a8 --out tiny-w4a8
    """
    overrides = _overrides(vision, decoder, head, embeddings, kv_cache, sets or [])
    chosen = make_recipe(scheme, recipe, overrides)  # wrong values are told before torch loads
    from mqc import api

    chosen = make_recipe(scheme, recipe, overrides, target)
    with common.progress_bars() as reporter:
        report = api.compile(
            model,
            target=target,
            device=device,
            scheme=chosen.scheme,
            passes=[*chosen.passes, *(passes or [])],
            calibration=calibration,
            samples=samples,
            out=out,
            seed=seed,
            options=api.PassOptions(verify_each, dump_after or [], dump_folder, pass_limit),
            revision=revision,
            trust_remote_code=trust_remote_code,
            resume=not fresh,
            reporter=reporter,
        )
    if as_json:
        common.print_json(report.to_json())
    else:
        print_report(report)


def _overrides(
    vision: str | None,
    decoder: str | None,
    head: int | None,
    embeddings: bool | None,
    kv_cache: str | None,
    sets: list[str],
) -> list[str | dict[str, Any]]:
    """The flags as recipe-like mappings, ``--set`` last."""
    result: list[str | dict[str, Any]] = []
    if vision is not None:
        result.append(component_override("vision", vision))
    if decoder is not None:
        result.append(component_override("decoder", decoder))
    if head is not None:
        result.append({"decoder": {"head": {"bits": head}}})
    if embeddings is not None:
        result.append({"quantize_embeddings": embeddings})
    if kv_cache is not None:
        result.append({"kv_cache": kv_cache})
    return [*result, *sets]


def print_report(report: CompileReport) -> None:
    """What each pass did, what it had to leave, and the sizes."""
    from mqc.artifact import format_size

    console = common.stdout()
    console.print(passes_table(report.records))
    print_skips(report.records)
    rows = report.calibration["rows"] if report.calibration else 0
    console.print(f"[bold]{report.artifact}[/]  target {report.target}, {report.scheme.name}")
    console.print(f"  {report.scheme.describe()}")
    console.print(
        f"  {format_size(report.artifact_bytes)} on disk (checkpoint weights "
        f"{format_size(report.source_bytes)}), {rows} calibration rows, {report.seconds:.1f} s"
    )
    console.print(f'  next: mqc run {report.artifact} --image a.png --prompt "..."')


def passes_table(records: list[PassRecord]) -> Any:
    """One row a pass: counts, skips, seconds, and the verified error where there is one."""
    verified = any(record.error is not None for record in records)
    columns = [
        "pass",
        "rewrites",
        "skips>",
        "seconds>",
        *(["error (float64)>"] if verified else []),
    ]
    rows = []
    for record in records:
        counts = ", ".join(f"{count} {what}" for what, count in record.counts.items() if count)
        row = [record.name, counts or "nothing", len(record.skips), f"{record.seconds:.1f}"]
        if verified:
            row.append("-" if record.error is None else f"{record.error:.1e}")
        rows.append(row)
    return common.table("passes", columns, rows)


def print_skips(records: list[PassRecord], limit: int = 8) -> None:
    """The first reasons why something was left as it is, equal ones together."""
    console = common.stdout()
    reasons: dict[tuple[str, str], list[str]] = {}
    for record in records:
        for skip in record.skips:
            reasons.setdefault((record.name, skip.reason), []).append(skip.where)
    for (name, reason), places in list(reasons.items())[:limit]:
        where = places[0] + (f" and {len(places) - 1} more" if len(places) > 1 else "")
        console.print(f"  skipped by {name}: {where}: {reason}", markup=False)
    if len(reasons) > limit:
        console.print(f"  ... {len(reasons) - limit} more reasons, see --json", markup=False)
