"""tiny-qwen2-vl as ONNX files on onnxruntime's CUDA provider, with the same kernels bound to it,
against the same files on the CPU.

Needs onnxruntime-gpu, ``libmqc_onnx_cuda.so`` and what ``python -m tools.gpu_check.prepare`` made;
it is skipped with the reason where one of them is missing. In a dry run the files run on the CPU
twice, through the native library and through the operators' bodies.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mqc.cuda.library import PATH_VARIABLE
from tools.gpu_check.common import Recorder

AGREE = 0.97
"""Rounding at the border of an int8 step differs by arithmetic, and can turn a close decision."""


@dataclass(frozen=True)
class Plan:
    """Evaluation rows, and decoding steps of each."""

    rows: int = 40
    steps: int = 8


DRY = Plan(2, 2)


def missing(artifact: Path) -> str | None:
    """What the part lacks here, or None."""
    from mqc.backends.onnx.library import ops_library

    try:
        import onnxruntime
    except ImportError:
        return "onnxruntime is not installed"
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return f"onnxruntime {onnxruntime.__version__} here has no CUDAExecutionProvider"
    if ops_library("cuda") is None:
        return "libmqc_onnx_cuda.so is not built: make native"
    if not artifact.is_dir():
        return f"{artifact.name} is not there: python -m tools.gpu_check.prepare"
    return None


def run(recorder: Recorder, artifact: Path, library: Path) -> None:
    """The part on a GPU; ``library`` is the libmqc_cuda.so that is checked."""
    from mqc.backends.registry import load_artifact

    reason = missing(artifact)
    if reason is not None:
        recorder.add(name="onnx cuda", skipped=reason)
        return
    os.environ[PATH_VARIABLE] = str(library)
    wanted, found = (load_artifact(artifact, provider=name) for name in ("cpu", "cuda"))
    compare(recorder, found, wanted)


def dry_run(recorder: Recorder, artifact: Path) -> None:
    """The comparison on this machine's CPU."""
    from mqc.backends.onnx.library import VARIABLE
    from mqc.backends.registry import load_artifact

    wanted, before = load_artifact(artifact), os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "none"
    try:
        compare(recorder, load_artifact(artifact), wanted, DRY)
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def compare(recorder: Recorder, found: Any, wanted: Any, plan: Plan | None = None) -> None:
    """Read and decode the same tokens in two runnables: agreement, distance, ``found``'s times."""
    from mqc.host import decode_step, prefill
    from mqc.testing import vqa

    plan, same, distances = plan or Plan(), [], []
    times: dict[str, list[float]] = {"prefill": [], "decode": []}
    for index in range(plan.rows):
        if not recorder.start(f"onnx cuda: row {index}"):
            break
        prompt = wanted.prompt(vqa.messages(vqa.sample("evaluation", index)))
        expected = prefill(wanted.engine, [prompt], plan.steps)
        got = _timed(times["prefill"], lambda p=prompt: prefill(found.engine, [p], plan.steps))
        for step in range(plan.steps + 1):
            left, right = got.logits, expected.logits
            tokens = right.argmax(-1)
            same.append(bool((left.argmax(-1) == tokens).all()))
            distances.append(float((left - right).abs().max() / right.abs().max()))
            if step < plan.steps:
                expected = decode_step(wanted.engine, expected, tokens)
                got = _timed(
                    times["decode"], lambda s=got, t=tokens: decode_step(found.engine, s, t)
                )
    if not same:
        return
    agreement = sum(same) / len(same)
    median = float(torch.tensor(distances).median())
    recorder.add(name="onnx cuda: same next token", unit="%", value=100 * agreement)
    recorder.add(name="onnx cuda: logits apart, median", unit="e-3", value=1e3 * median)
    for name, seconds in times.items():
        value = 1e3 * float(torch.tensor(seconds).median())
        recorder.add(name=f"onnx cuda: {name}", unit="ms", value=value)
    wrong = "" if agreement >= AGREE else f"the same next token in {agreement:.3f} < {AGREE}"
    recorder.add(case="onnx files on the GPU agree with the CPU", wrong=wrong)


def _timed(times: list[float], call: Callable[[], Any]) -> Any:
    """The call's result; the logits it returns are on the host, so the device is done."""
    start = time.perf_counter()
    result = call()
    times.append(time.perf_counter() - start)
    return result
