"""The parts of the check by name: what each runs, and how long it may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mqc.cuda.library import Library
from tools.gpu_check import ceilings, rows, sweep, timings
from tools.gpu_check.common import Recorder


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


@dataclass(frozen=True)
class Part:
    """A part: its time limit in seconds and its function."""

    seconds: int
    run: Callable[[Context], None]


def _sweep(context: Context, wgmma: bool) -> None:
    c = context
    sweep.run(c.library, c.recorder, c.generator, architecture=c.architecture, wgmma=wgmma)


def _small(context: Context) -> None:
    """One small case of every kernel: what runs under the memory checker."""
    c = context
    for wgmma in (False, True):
        sweep.run(
            c.library,
            c.recorder,
            c.generator,
            architecture=c.architecture,
            wgmma=wgmma,
            shapes=((200, 520),),
            rows=(3, 140),
        )
    rows.run(c.library, c.recorder, c.generator, small=True)


# In this order: what later parts are compared with first, then correctness, then speed.
PARTS = {
    "ceilings": Part(60, lambda c: ceilings.run(c.recorder)),
    "small": Part(60, _small),
    "rows": Part(60, lambda c: rows.run(c.library, c.recorder, c.generator)),
    "sweep": Part(120, lambda c: _sweep(c, wgmma=False)),
    "sweep-wgmma": Part(60, lambda c: _sweep(c, wgmma=True)),
    "linear-timings": Part(
        150, lambda c: timings.linears(c.library, c.recorder, c.generator, c.architecture)
    ),
    "row-timings": Part(40, lambda c: timings.rows(c.library, c.recorder, c.device)),
    "attention-timings": Part(40, lambda c: timings.attention(c.library, c.recorder, c.device)),
}


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
