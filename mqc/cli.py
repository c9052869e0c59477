"""The command line: ``mqc`` and its subcommands.

Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mqc import __version__
from mqc.commands import _common as common
from mqc.commands.compile import compile_command
from mqc.commands.demo import demo_command
from mqc.commands.doctor import doctor_command
from mqc.commands.evaluate import eval_command
from mqc.commands.inspect import inspect_command, probe_command
from mqc.commands.listing import passes_command, targets_command
from mqc.commands.opt import opt_command
from mqc.commands.plan import plan_command
from mqc.commands.run import run_command

app = typer.Typer(
    name="mqc",
    cls=common.Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mqc {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the trace of an error (allowed anywhere).")
    ] = False,
) -> None:
    """A compiler for quantized multimodal large language models."""


app.command("compile")(compile_command)
app.command("run")(run_command)
app.command("eval")(eval_command)
app.command("inspect")(inspect_command)
app.command("probe")(probe_command)
app.command("plan")(plan_command)
app.command("opt")(opt_command)
app.command("passes")(passes_command)
app.command("targets")(targets_command)
app.command("doctor")(doctor_command)
app.command("demo", hidden=True)(demo_command)


def main() -> None:
    """Entry point of the console script."""
    common.prepare_streams()
    try:
        app()
    except KeyboardInterrupt:  # before a command runs, or while it ends
        sys.exit(common.INTERRUPTED)


if __name__ == "__main__":
    main()
