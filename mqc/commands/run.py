"""``mqc run``: ask an artifact about images and videos, and read the answer as it is written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mqc.commands import _common as common
from mqc.errors import UsageError


def run_command(
    artifact: common.ArtifactPath,
    prompt: Annotated[str, typer.Option(help="The question or instruction.")],
    images: Annotated[
        list[Path] | None, typer.Option("--image", help="Image file (repeatable, in order).")
    ] = None,
    videos: Annotated[
        list[Path] | None,
        typer.Option(
            "--video", help="Animation, video file or folder of frames (repeatable, in order)."
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(help="Frames a second: to take of a file; those of a folder's frames."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from this mass.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Read the prompt in chunks of this many tokens.")
    ] = None,
    runtime: common.Runtime = None,
    trust_remote_code: common.Trust = False,
    as_json: common.Json = False,
) -> None:
    """Ask an artifact about images and videos; the answer is streamed.

    Example: mqc run tiny-w4a8 --image scene.png --prompt "how many circles ?"
    """
    if fps is not None and not videos:
        raise UsageError("--fps is given, and no video", hint="name the video with --video")
    from mqc import api
    from mqc.host import Sampling

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    options: dict[str, Any] = common.key_values(runtime or [])
    if trust_remote_code:
        options["trust_remote_code"] = True
    runnable = api.load(artifact, **options)
    result = runnable.generate(
        prompt=prompt,
        images=list(images or ()),
        videos=[{"type": "video", "video": path, "fps": fps} for path in videos or ()],
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_p, seed),
        chunk=chunk,
        on_text=None if as_json else write,
    )
    if as_json:
        common.print_json(
            {
                "text": result.text,
                "finish": result.finish,
                "prompt_tokens": result.prompt_tokens,
                "tokens": len(result.tokens),
                "time_to_first_token": result.time_to_first_token,
                "tokens_per_second": result.tokens_per_second,
            }
        )
        return
    write("\n")
    common.stderr().print(
        f"{result.prompt_tokens} prompt tokens, first token after "
        f"{result.time_to_first_token * 1000:.0f} ms, {len(result.tokens)} tokens"
        + (f", {result.tokens_per_second:.0f} tokens/s" if result.tokens_per_second else ""),
        style="dim",
    )
