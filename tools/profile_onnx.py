"""Where the time of an ONNX artifact goes, by operator: the image prompt, and a decode step.

    python tools/profile_onnx.py ARTIFACT --image a.png --prompt "What does the sign say?"

onnxruntime's own profiler measures; the traces of single nodes (chrome://tracing) are kept with
--keep FOLDER. Times are of the middle run of --rounds, after a warm-up. --without-amx refuses AMX
to the kernels, as tools/bench_cpu.py does by default.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS = 16
"""Decode steps that follow one prompt."""


def traces(folder: Path, artifact: Path, act: Callable[[Any], None]) -> dict[str, list[Any]]:
    """Events of every session that ``act(runnable)`` used, by component."""
    import mqc

    runnable = mqc.load(artifact, profile=folder)
    act(runnable)
    engine: Any = runnable.engine
    return {
        name: json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        for name, session in engine.sessions.items()
    }


def middle_run(events: list[Any], skip: int) -> tuple[float, Counter[str], Counter[str]]:
    """Milliseconds of the median run behind the first ``skip``, and its time and nodes by operator.

    Runs of one session do not overlap, so a node belongs to the run whose span holds it.
    """
    runs = sorted((e for e in events if e.get("name") == "model_run"), key=lambda e: e["ts"])[skip:]
    run = sorted(runs, key=lambda e: e["dur"])[len(runs) // 2]
    time: Counter[str] = Counter()
    nodes: Counter[str] = Counter()
    for event in events:
        inside = run["ts"] <= event.get("ts", -1) <= run["ts"] + run["dur"]
        if inside and str(event["name"]).endswith("_kernel_time"):
            name = str(event["args"]["op_name"])
            time[name] += event["dur"]
            nodes[name] += 1
    return run["dur"] / 1e3, time, nodes


def table(title: str, events: list[Any], skip: int) -> str:
    """The operators of a run that take 1 % of it or more."""
    total, time, nodes = middle_run(events, skip)
    lines = [f"| {title}, {total:.1f} ms | nodes | ms | share |", "|---|---|---|---|"]
    rest = total
    for name, micro in time.most_common():
        if micro / 1e3 < 0.01 * total:
            break
        rest -= micro / 1e3
        lines.append(f"| {name} | {nodes[name]} | {micro / 1e3:.2f} | {micro / 10 / total:.0f} % |")
    lines.append(f"| all else | | {rest:.2f} | {100 * rest / total:.0f} % |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path, help="folder that mqc compile --target onnx wrote")
    parser.add_argument("--image", type=Path, action="append", default=[])
    parser.add_argument("--prompt", default="What is in the picture?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="folder for onnxruntime's traces")
    parser.add_argument("--without-amx", action="store_true")
    options = parser.parse_args()
    if options.without_amx:
        from bench_cpu.without_amx import refuse_amx

        refuse_amx()
    import torch

    from mqc.host import decode_step, prefill

    def prompt(runnable: Any) -> None:
        asked = runnable.prompt(prompt=options.prompt, images=options.image)
        for _ in range(1 + options.rounds):
            prefill(runnable.engine, [asked])

    def steps(runnable: Any) -> None:
        asked = runnable.prompt(prompt=options.prompt, images=options.image)
        state = prefill(runnable.engine, [asked])
        for _ in range(STEPS):
            state = decode_step(runnable.engine, state, torch.tensor([0]))

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        found = traces(folder, options.artifact, prompt)
        for name in ("vision", "decoder"):
            if name in found:
                print(table(f"{name}, prompt", found[name], 1), end="\n\n")
        print(table("decoder, one token", traces(folder, options.artifact, steps)["decoder"], 4))


if __name__ == "__main__":
    main()
