"""The parts of the check by name: what each runs, and how long it may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mqc.cuda.library import Library
from tools.gpu_check import ceilings, end_to_end, onnx_cuda, rows, sweep, timings
from tools.gpu_check.common import Recorder
from tools.gpu_check.prepare import FOLDER, ONNX_ARTIFACT, prepared


@dataclass(frozen=True)
class Context:
    """What a part gets."""

    library: Library
    recorder: Recorder
    generator: torch.Generator
    architecture: int

    @property
    def device(self) -> torch.device:
        return self.generator.device


STALL = 60


@dataclass(frozen=True)
class Part:
    """A part: its time limit in seconds, its function, and after how many seconds without a new
    line in its log it counts as hung."""

    seconds: int
    run: Callable[[Context], None]
    stall: int = STALL


def _sweep(context: Context, wgmma: bool, floats: bool = False) -> None:
    c = context
    weights = sweep.FLOATS if floats else sweep.INTEGERS
    how = {"architecture": c.architecture, "wgmma": wgmma, "weights": weights}
    sweep.run(c.library, c.recorder, c.generator, **how)


def _small(context: Context) -> None:
    """One small case of every kernel: what runs under the memory checker."""
    c = context
    integers, floats = sweep.INTEGERS, sweep.FLOATS
    for wgmma, weights in ((False, integers), (False, floats), (True, integers)):
        sweep.run(
            c.library,
            c.recorder,
            c.generator,
            architecture=c.architecture,
            wgmma=wgmma,
            shapes=((200, 640),),
            rows=(3, 140),
            weights=weights,
        )
    rows.run(c.library, c.recorder, c.generator, small=True)


def _model(run: Callable[[end_to_end.Bench], None]) -> Callable[[Context], None]:
    """A part over whole models, from what :mod:`tools.gpu_check.prepare` made."""

    def part(context: Context) -> None:
        file, artifact = prepared(FOLDER)
        c = context
        run(end_to_end.Bench(c.recorder, file, c.device, c.library, artifact))

    return part


PARTS = {
    "ceilings": Part(60, lambda c: ceilings.run(c.recorder)),
    "small": Part(60, _small),
    "rows": Part(60, lambda c: rows.run(c.library, c.recorder, c.generator)),
    "sweep": Part(120, lambda c: _sweep(c, wgmma=False)),
    "sweep-wgmma": Part(60, lambda c: _sweep(c, wgmma=True)),
    "sweep-floats": Part(60, lambda c: _sweep(c, wgmma=False, floats=True)),
    "linear-timings": Part(
        150, lambda c: timings.linears(c.library, c.recorder, c.generator, c.architecture)
    ),
    "row-timings": Part(40, lambda c: timings.rows(c.library, c.recorder, c.device)),
    "attention-timings": Part(40, lambda c: timings.attention(c.library, c.recorder, c.device)),
    "model-accuracy": Part(120, _model(end_to_end.accuracy), stall=150),
    "model-decode": Part(120, _model(end_to_end.decode)),
    "model-prefill": Part(90, _model(end_to_end.prefill)),
    "model-vision": Part(60, _model(end_to_end.vision)),
    "model-order": Part(60, _model(end_to_end.order)),
    "onnx-cuda": Part(
        60, lambda c: onnx_cuda.run(c.recorder, FOLDER / ONNX_ARTIFACT, c.library.path)
    ),
}
# Whether anything is wrong, the speed of whole models and their answers, then every kernel at every
# size, then what explains the speed: a call may not reach the end.
ORDER = (
    *("small", "ceilings", "sweep-wgmma", "model-decode", "model-prefill", "model-accuracy"),
    *("sweep", "rows", "linear-timings", "model-vision", "model-order"),
    *("attention-timings", "row-timings", "sweep-floats", "sanitizer", "onnx-cuda"),
)
MODEL_PARTS = tuple(name for name in PARTS if name.startswith("model-"))


def dry_run(name: str, folder: Path, recorder: Recorder) -> None:
    """A model part on the CPU: kernels by definition, on what ``prepare --tiny`` made."""
    if name == "onnx-cuda":
        onnx_cuda.dry_run(recorder, folder / ONNX_ARTIFACT)
        return
    file, artifact = prepared(folder)
    device, plan = torch.device("cpu"), end_to_end.DRY
    bench = end_to_end.Bench(recorder, file, device, artifact=artifact, plan=plan)
    getattr(end_to_end, name.removeprefix("model-"))(bench)


def run_part(name: str, library: Path, out: Path, seconds: float) -> None:
    """Run one part in this process; results go to `out`, one JSON object a line."""
    device = torch.device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    major, minor = torch.cuda.get_device_capability()
    generator = torch.Generator(device).manual_seed(20250131)
    recorder = Recorder(out, time.monotonic() + seconds)
    loaded = Library(library)
    loaded.check_device()
    with torch.no_grad():
        PARTS[name].run(Context(loaded, recorder, generator, 10 * major + minor))
