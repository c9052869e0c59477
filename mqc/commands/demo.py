"""``mqc demo``: the whole way once, on an embedded model: compile, ask, compare with float."""

from __future__ import annotations

import statistics
import sys
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from mqc.commands import _common as common
from mqc.commands.compile import print_report

if TYPE_CHECKING:
    from PIL.Image import Image

    from mqc.host import Prompt, Runnable

QUESTIONS = {
    "what is at row 4 column 2 ?": "red ring",
    "read row 1 .": "6 F J",
    "what colour is row 2 column 3 ?": "purple",
}
"""About ``demo.png``, scene 700001 of the evaluation split of ``mqc.testing.vqa``."""

FIRST_SAMPLE = 500_000
"""Where the demo's evaluation samples start: away from those of other reports."""

DECODE_TOKENS = 33


def demo_command(
    model: Annotated[str, typer.Argument(help="Embedded model.")] = "tiny-qwen2-vl",
    n: Annotated[int, typer.Option("--n", min=1, help="Samples to score.")] = 500,
    out: Annotated[Path, typer.Option(help="Folder for the artifacts.")] = Path("out/demo"),
    as_json: common.Json = False,
) -> None:
    """Compile an embedded model for onnxruntime, ask it about an image, compare it with float.

    Example: mqc demo tiny-llava --n 1000
    """
    from mqc import api

    console = common.stdout()
    with common.progress_bars() as reporter:
        float_report = api.compile(
            model, scheme="float", out=out / f"{model}-float", reporter=reporter
        )
        report = api.compile(model, scheme="w4a8", out=out / f"{model}-w4a8", reporter=reporter)
    if not as_json:
        print_report(report)
    compiled, plain = api.load(report.artifact), api.load(float_report.artifact)
    with as_file(files("mqc.commands") / "demo.png") as path:
        from mqc.host.images import open_image

        image = open_image(path)
    if not as_json:
        console.print()
        if console.is_terminal:
            console.print(picture(image))
        for question in QUESTIONS:
            ask(compiled, image, question)
    with common.progress_bars() as reporter:
        reporter.stage(f"scoring {n} fresh samples", 0, 1)
        result = api.evaluate(
            compiled,
            against=plain,
            data=f"tiny-vqa:evaluation:{n}:{FIRST_SAMPLE}",
            n=n,
            reporter=reporter,
        )
    prompt = next(iter(QUESTIONS))
    assert result.baseline is not None
    entries = [
        entry("float", plain, result.baseline, float_report.artifact_bytes, image, prompt),
        entry("w4a8", compiled, result.compiled, report.artifact_bytes, image, prompt),
    ]
    if as_json:
        common.print_json({"model": model, "samples": n, "rows": entries})
        return
    console.print()
    console.print(comparison(f"{model} in onnxruntime, {n} fresh samples", entries))
    console.print(f'try: mqc run {report.artifact} --image IMAGE --prompt "{prompt}"')
    console.print(f"     mqc inspect {report.artifact}")


def ask(runnable: Runnable, image: Image, question: str) -> None:
    """Print a question, the answer as it is written, and the right one."""
    sys.stdout.write(f"{question}  ")
    for piece in runnable.stream(prompt=question, images=[image], max_new_tokens=16):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write(f"   (right: {QUESTIONS[question]})\n")


def entry(
    name: str, runnable: Runnable, report: Any, size: int, image: Image, question: str
) -> dict[str, Any]:
    """One model's row: quality, bytes, seconds to the first token, tokens a second."""
    first, rate = speed(runnable, runnable.prompt(prompt=question, images=[image]))
    return {
        "model": name,
        "accuracy": report.accuracy,
        "kl": report.kl,
        "bytes": size,
        "time_to_first_token": first,
        "tokens_per_second": rate,
    }


def speed(runnable: Runnable, prompt: Prompt, runs: int = 5) -> tuple[float, float]:
    """Seconds until the first token, and tokens a second after it; medians after a warm-up.

    Decoding goes on over the end of the answer: answers are too short to time.
    """
    from mqc.host import generate_batch

    def once() -> tuple[float, float]:
        result = generate_batch(runnable.engine, [prompt], max_new_tokens=DECODE_TOKENS, stop=())[0]
        return result.time_to_first_token, result.tokens_per_second

    once()
    times, rates = zip(*(once() for _ in range(runs)), strict=True)
    return statistics.median(times), statistics.median(rates)


def comparison(title: str, entries: list[dict[str, Any]]) -> Any:
    """The table of the demo."""
    from mqc.artifact import format_size

    rows = [
        [
            row["model"],
            f"{100 * row['accuracy']:.1f} %",
            "-" if row["kl"] is None else f"{row['kl']:.4f}",
            format_size(row["bytes"]),
            f"{1000 * row['time_to_first_token']:.1f} ms",
            f"{row['tokens_per_second']:.0f}",
        ]
        for row in entries
    ]
    columns = [
        "model", "accuracy>", "KL from float>", "on disk>", "first token after>", "tokens/s>"
    ]  # fmt: skip
    return common.table(title, columns, rows)


def picture(image: Image, width: int = 32) -> Text:
    """The image in half blocks, two pixels a character, for terminals with colours."""
    height = max(2, round(width * image.height / image.width) // 2 * 2)
    small = image.convert("RGB").resize((width, height))
    text = Text()
    for row in range(0, height, 2):
        for column in range(width):
            upper, lower = (_hex(small, column, row + offset) for offset in (0, 1))
            text.append("\u2580", style=f"{upper} on {lower}")
        text.append("\n")
    return text


def _hex(image: Image, column: int, row: int) -> str:
    red, green, blue = image.getpixel((column, row))  # type: ignore[misc]
    return f"#{red:02x}{green:02x}{blue:02x}"
