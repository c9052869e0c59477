"""What all subcommands share: options, tables, progress bars, JSON output, errors as messages."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

from mqc.errors import MqcError, UsageError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells report it (128 + SIGINT)."""

PIPE_WIDTH = 160
"""Columns of tables that go to a file or pipe."""

STEP_SECONDS = 30.0
"""How often a stage says how far it is where no terminal shows bars."""

QUANTIZATION, CALIBRATION = "Quantization", "Calibration"
FAULTS, CHECKPOINT = "Finding faults", "Checkpoint"
"""Headings of options in help texts."""

_OUTSIDE = {
    getattr(errno, name)
    for name in "EACCES EDQUOT EEXIST EFBIG EIO EISDIR EMFILE ENOSPC ENOTDIR EPERM EROFS".split()
}
"""What the system refuses for reasons of its own: no fault of mqc's to report."""

Model = Annotated[
    str, typer.Argument(help="Checkpoint folder, hub id, or embedded model such as tiny-qwen2-vl.")
]
ArtifactPath = Annotated[Path, typer.Argument(help="Folder that mqc compile wrote.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let transformers run the checkpoint's code.",
        rich_help_panel=CHECKPOINT,
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(
        "--revision", help="Branch, tag or commit of a hub id.", rich_help_panel=CHECKPOINT
    ),
]
VerifyEach = Annotated[
    bool,
    typer.Option(
        "--verify-each",
        help="Prove, in float64, that each such pass leaves the logits as they are.",
        rich_help_panel=FAULTS,
    ),
]
DumpAfter = Annotated[
    list[str] | None,
    typer.Option(
        "--dump-after",
        help="Write the program's text after this pass, or after all.",
        rich_help_panel=FAULTS,
    ),
]
DumpFolder = Annotated[
    Path, typer.Option("--dump-dir", help="Folder for these texts.", rich_help_panel=FAULTS)
]
PassLimit = Annotated[
    int | None,
    typer.Option(
        "--pass-limit",
        min=0,
        help="Stop rewriting after this many rewrites (bisect).",
        rich_help_panel=FAULTS,
    ),
]
SchemeName = Annotated[
    str | None,
    typer.Option(
        "--scheme",
        help="Named scheme: w4a8 (default), w4a8-all, w8a8, w4a16, float...",
        rich_help_panel=QUANTIZATION,
    ),
]
RecipeSource = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="YAML recipe, or the name of a shipped one.",
        rich_help_panel=QUANTIZATION,
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Override a field: --set decoder.weights.bits=3 (repeatable).",
        rich_help_panel=QUANTIZATION,
    ),
]
Runtime = Annotated[
    list[str] | None,
    typer.Option(help="Option of the target: --runtime kv_cache=int8 (repeatable)."),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", help="Seed of the rotations' signs.", rich_help_panel=QUANTIZATION),
]


def stdout() -> Console:
    """The console of results, wide where no terminal limits it. Made at each use."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def stderr() -> Console:
    """The console of progress, warnings and errors."""
    return Console(stderr=True, highlight=False)


def print_json(data: Any) -> None:
    """``data`` as JSON on stdout, in ASCII where stdout is not UTF-8."""
    encoding = getattr(sys.stdout, "encoding", None) or ""
    ascii_only = encoding.lower().replace("-", "") != "utf8"
    typer.echo(json.dumps(data, indent=2, ensure_ascii=ascii_only, default=str))


def prepare_streams() -> None:
    """A closed stream swallows what is written; characters it cannot show are no error."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            sink = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  (until the exit)
            setattr(sys, name, sink)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if name == "stderr" else "replace")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table; columns whose name ends with ``>`` are aligned right."""
    result = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for column in columns:
        right = column.endswith(">")
        justify: Literal["left", "right"] = "right" if right else "left"
        result.add_column(column.removesuffix(">"), justify=justify, overflow="fold")
    for row in rows:
        result.add_row(*(escape("-" if cell is None else str(cell)) for cell in row))
    return result


class ProgressReporter:
    """Two bars on stderr: stages of the whole call, and steps inside the stage.

    Only terminals see bars; elsewhere each stage is a line, and a long one says now and then how
    far it is.
    """

    def __init__(self, progress: Progress, console: Console) -> None:
        self.interrupted = False
        self._progress = progress
        self._console = console
        self._stage = progress.add_task("starting", total=None)
        self._step = progress.add_task("", total=None, visible=False)
        self._told = time.monotonic()

    def _go_on(self) -> None:
        if self.interrupted:
            raise KeyboardInterrupt

    def stage(self, name: str, index: int, count: int) -> None:
        """Stage ``name``, the ``index``-th of ``count``, begins."""
        self._go_on()
        self._progress.update(self._stage, description=name, completed=index, total=count)
        self._progress.update(self._step, visible=False)
        if not self._console.is_terminal and name != "done":
            self._console.print(f"[{index + 1}/{count}] {name}", markup=False)
            self._told = time.monotonic()

    def step(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of ``what`` inside the stage are finished."""
        self._go_on()
        self._progress.update(
            self._step, description=f"  {what}", completed=done, total=total, visible=done < total
        )
        if not self._console.is_terminal and time.monotonic() - self._told > STEP_SECONDS:
            self._console.print(f"  {what}: {done} of {total}", markup=False)
            self._told = time.monotonic()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, markup=False, soft_wrap=True)


def key_values(texts: Sequence[str]) -> dict[str, Any]:
    """``["kv_cache=int8", "graphs=false"]`` as a mapping, values read as YAML.

    Raises :class:`UsageError` for a text without ``=``.
    """
    import yaml

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (equals and key.strip()):
            raise UsageError(f"{text!r} is not key=value", hint="for example: kv_cache=int8")
        found[key.strip()] = yaml.safe_load(value)
    return found


@contextmanager
def progress_bars() -> Iterator[ProgressReporter]:
    """A reporter whose bars vanish at the end."""
    console = stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        reporter = ProgressReporter(progress, console)
        with _remembered_interrupts(reporter):
            yield reporter


@contextmanager
def _remembered_interrupts(reporter: ProgressReporter) -> Iterator[None]:
    """A Ctrl-C that falls into a callback of the garbage collector is only printed by Python;
    remember it instead, and stop at the next step."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            reporter.interrupted = True
        else:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def quiet_libraries() -> None:
    """Keep transformers' and torch's warnings from the user's screen, unless asked for."""
    if "MQC_DEBUG" not in os.environ:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def report_error(error: BaseException, *, debug: bool, as_json: bool) -> int:
    """Print ``error`` for people (stderr), with ``as_json`` also on stdout; return the exit code.

    2 for a wrong argument, 1 for anything else, 130 for Ctrl-C.
    """
    console = stderr()
    if debug:
        traceback.print_exception(error)
    told = list(getattr(error, "__notes__", ()))
    if isinstance(error, KeyboardInterrupt):
        told = told or ["nothing was written"]
        console.print("; ".join(["interrupted", *told]), markup=False, soft_wrap=True)
        return INTERRUPTED
    hint: str | None
    notes = "".join(f" ({note})" for note in told)
    if isinstance(error, MqcError):
        message, hint = error.message + notes, error.hint
        console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    elif isinstance(error, OSError) and error.errno in _OUTSIDE:
        place = f": {error.filename}" if error.filename else ""
        message = f"{error.strerror}{place}{notes}"
        hint = "check the place, its permissions and the free space"
        console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    else:
        message = f"{type(error).__name__}: {error}{notes}"
        hint = "run again with --debug for the trace, and report it"
        console.print(f"[bold red]internal error:[/] {escape(message)}", soft_wrap=True)
    if hint:
        console.print(f"[bold]hint:[/] {escape(hint)}", soft_wrap=True)
    if as_json:
        kind = type(error).__name__
        print_json({"error": {"type": kind, "message": message, "hint": hint}})
    return 2 if isinstance(error, UsageError) else 1


class Group(TyperGroup):
    """The command group: errors become messages and exit codes; ``--debug`` may stand anywhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        options = args[:end]
        ctx.ensure_object(dict).update(debug="--debug" in options, json="--json" in options)
        if ctx.obj["debug"]:
            os.environ["MQC_DEBUG"] = "1"
        rest = [item for item in options if item != "--debug"]
        parsed: list[str] = super().parse_args(ctx, rest + args[end:])
        return parsed

    def invoke(self, ctx: Any) -> Any:
        quiet_libraries()
        try:
            return super().invoke(ctx)
        except (MqcError, KeyboardInterrupt) as error:
            raise typer.Exit(self._report(ctx, error)) from error
        except Exception as error:
            # The parser's own errors (wrong option, Exit) and a closed pipe are the framework's.
            if _is_frameworks(error):
                if ctx.obj["json"] and hasattr(error, "format_message"):
                    message = str(error.format_message())
                    entry = {"type": "UsageError", "message": message, "hint": None}
                    print_json({"error": entry})
                raise
            raise typer.Exit(self._report(ctx, error)) from error

    def _report(self, ctx: Any, error: BaseException) -> int:
        return report_error(error, debug=ctx.obj["debug"], as_json=ctx.obj["json"])


def _is_frameworks(error: Exception) -> bool:
    if isinstance(error, BrokenPipeError):
        return True
    return any(name in type(error).__module__ for name in ("click", "typer"))
