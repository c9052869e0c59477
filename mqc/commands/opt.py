"""``mqc opt``: passes by hand on a saved program, as LLVM's opt does on a module."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mqc.commands import _common as common
from mqc.commands.compile import (
    CalibrationSource,
    Samples,
    passes_table,
    print_skips,
)
from mqc.config import make_recipe
from mqc.errors import UsageError


def opt_command(
    program: Annotated[str, typer.Argument(help="Folder of a saved program, or a checkpoint.")],
    passes: Annotated[
        str, typer.Option("--passes", help="Names or module:Class, separated by commas.")
    ],
    scheme: common.SchemeName = None,
    recipe: common.RecipeSource = None,
    sets: common.Sets = None,
    calibration: CalibrationSource = None,
    samples: Samples = 256,
    out: Annotated[Path | None, typer.Option(help="Folder for the resulting program.")] = None,
    verify_each: common.VerifyEach = False,
    dump_after: common.DumpAfter = None,
    dump_folder: common.DumpFolder = Path("mqc-dump"),
    pass_limit: common.PassLimit = None,
    trust_remote_code: common.Trust = False,
    as_json: common.Json = False,
) -> None:
    """Run chosen passes on a program.

    Example: mqc opt tiny-qwen2-vl --passes canonicalize,fuse-norm --dump-after all
    """
    names = [name.strip() for name in passes.split(",") if name.strip()]
    if not names:
        raise UsageError("--passes names no pass", hint="see mqc passes")
    chosen = make_recipe(scheme, recipe, sets or [])
    from mqc import api

    with common.progress_bars() as reporter:
        result, records = api.opt(
            program,
            names,
            scheme=chosen.scheme,
            calibration=calibration,
            samples=samples,
            out=out,
            options=api.PassOptions(verify_each, dump_after or [], dump_folder, pass_limit),
            trust_remote_code=trust_remote_code,
            reporter=reporter,
        )
    sizes = {part.name: len(part.graph.nodes) for part in result}
    if as_json:
        entries = [{**r.to_json(), "seconds": round(r.seconds, 3)} for r in records]
        common.print_json(
            {"passes": entries, "nodes": sizes, "dialect": result.dialect, "out": out}
        )
        return
    console = common.stdout()
    console.print(passes_table(records))
    print_skips(records)
    console.print("nodes: " + ", ".join(f"{name} {count}" for name, count in sizes.items()))
    if dump_after:
        console.print(f"texts: {dump_folder}", markup=False)
    if out is not None:
        console.print(f"program: {out}", markup=False)
