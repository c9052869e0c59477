"""``mqc eval``: accuracy, and divergence from another model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mqc.commands import _common as common

if TYPE_CHECKING:
    from mqc.host import EvalReport


def eval_command(
    artifact: Annotated[str, typer.Argument(help="Artifact, or a checkpoint (in float32).")],
    against: Annotated[
        str | None, typer.Option(help="Checkpoint or artifact to measure the divergence from.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help='JSONL rows {"messages": [...], "answer": "..."}.')
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Rows, at most.")] = 2000,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a model call holds.")] = 16,
    out: Annotated[
        Path | None,
        typer.Option(help="Write each row's result to this JSONL file, and go on there if killed."),
    ] = None,
    runtime: common.Runtime = None,
    trust_remote_code: common.Trust = False,
    as_json: common.Json = False,
) -> None:
    """Score an artifact on rows with answers; rows that calibration used are refused.

    Example: mqc eval tiny-w4a8 --against tiny-qwen2-vl --n 2000
    """
    from mqc import api

    with common.progress_bars() as reporter:
        reporter.stage("evaluate", 0, 1)
        result = api.evaluate(
            artifact,
            against=against,
            data=data,
            n=n,
            batch_size=batch_size,
            runtime=common.key_values(runtime or []),
            trust_remote_code=trust_remote_code,
            out=out,
            reporter=reporter,
        )
    if as_json:
        common.print_json(result.to_json())
        return
    rows = [_row(artifact, result.compiled)]
    if result.baseline is not None and against is not None:
        rows.insert(0, _row(against, result.baseline))
    title = f"{result.rows} rows of {result.source}"
    columns = ["model", "accuracy>", "95 % interval>", "loss, nats>", "KL, nats>", "same token>"]
    common.stdout().print(common.table(title, columns, rows))


def _row(name: str, report: EvalReport) -> list[str]:
    return [
        name,
        f"{100 * report.accuracy:.2f} %",
        f"{100 * report.low:.1f} - {100 * report.high:.1f}",
        f"{report.loss:.4f}",
        "-" if report.kl is None else f"{report.kl:.5f}",
        "-" if report.agreement is None else f"{100 * report.agreement:.2f} %",
    ]
