"""Whole models: prefill, decoding and the tower at the size of Qwen2-VL-7B against bf16, and the
accuracy of tiny-qwen2-vl against the reference.

Every function also runs on a CPU (``dry``): kernels by definition, tiny sizes, wall-clock times.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mqc.backends.cuda.engine import CudaEngine
from mqc.backends.cuda.graphs import Recorder as GraphRecorder
from mqc.backends.cuda.graphs import call_again, record_graph
from mqc.backends.cuda.kernels import Kernels, ReferenceKernels
from mqc.backends.cuda.native import NativeKernels
from mqc.backends.cuda.slots import Sequences
from mqc.cuda.library import Library
from tools.gpu_check import model
from tools.gpu_check.baseline import TextModel, VisionTower
from tools.gpu_check.common import Recorder, median_seconds, stream_of

Run = Callable[[], Any]


@dataclass(frozen=True)
class Plan:
    """What is run: prompt lengths, (batch, past, steps) of decoding, patches, tokens of the prompt
    whose rows are reordered, evaluation rows."""

    prompts: tuple[int, ...] = (1024, 4096, 16384)
    decodes: tuple[int, ...] = (1, 16, 64)
    past: int = 1024
    steps: int = 32
    patches: tuple[int, int] = (64, 64)
    order: int = 4096
    rows: int = 200
    repeats: int = 5


APART = 0.2
"""Two ways through random layers: a sum in another order tips int8 steps, layer after layer."""
DRY = Plan((9, 20), (1, 3), 6, 2, (4, 4), 20, 3, 1)


@dataclass(frozen=True)
class Bench:
    """A prepared model on a device, and where results go.

    ``prepared``: file of :func:`tools.gpu_check.model.prepare`; ``artifact``: tiny-qwen2-vl
    compiled for cuda, or None.
    """

    recorder: Recorder
    prepared: Path
    device: torch.device
    library: Library | None = None
    artifact: Path | None = None
    plan: Plan = Plan()

    @property
    def dry(self) -> bool:
        return self.device.type == "cpu"

    @property
    def kernels(self) -> Kernels:
        if self.library is None:
            return ReferenceKernels()
        return NativeKernels(self.library, self.device, lambda: stream_of(self.device))

    @property
    def record(self) -> GraphRecorder:
        return call_again if self.dry else record_graph

    def seconds(self, run: Run) -> float:
        """Median seconds of a call: device time, or wall-clock time in a dry run."""
        if not self.dry:
            return median_seconds(run, self.plan.repeats, warmup=2)
        times = []
        for _ in range(self.plan.repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def engine(self, kv_cache: str = "float", capacity: int = 1024) -> tuple[CudaEngine, Any]:
        program, sizes = model.load(self.prepared, self.device)
        options: dict[str, Any] = {"kv_cache": kv_cache, "capacity": capacity}
        return CudaEngine(program, self.kernels, record=self.record, **options), sizes

    def compare(self, name: str, ours: float, theirs: float | None, **more: Any) -> None:
        """Record a timing, and how many times faster it is than the baseline."""
        self.recorder.add(name=f"{name} mqc", unit="ms", value=ours * 1e3, **more)
        if theirs is not None:
            self.recorder.add(name=f"{name} bf16", unit="ms", value=theirs * 1e3)
            self.recorder.add(name=f"{name} speedup", unit="x", value=theirs / ours)


def _release(bench: Bench) -> None:
    """Give memory that nobody holds back to the device."""
    gc.collect()
    if not bench.dry:
        torch.cuda.empty_cache()


def prefill_inputs(engine: CudaEngine, tokens: int) -> dict[str, Any]:
    """One prompt whose middle is an image, on the device."""
    decoder = engine.program.components["decoder"]
    device, embeds = engine.kernels.device, decoder.input("inputs_embeds").type
    modality = torch.zeros(1, tokens, dtype=torch.bool, device=device)
    modality[:, tokens // 8 : tokens // 2] = True
    positions = torch.arange(tokens, device=device)
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    if isinstance(engine.kernels, ReferenceKernels):  # reads it
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    return {
        "inputs_embeds": torch.randn(
            1, tokens, int(embeds.shape[-1]), device=device, dtype=embeds.dtype
        ),
        "modality": modality,
        "position_ids": positions.expand(3, 1, tokens),
        "mask": mask.expand(1, 1, tokens, tokens),
        "logit_index": torch.tensor([[tokens - 1]], device=device),
    }


@torch.inference_mode()
def _prefill_ours(bench: Bench) -> tuple[dict[int, float], Any]:
    """Seconds by length, and the model's sizes; the engine's memory is free afterwards."""
    engine, sizes = bench.engine(capacity=max(bench.plan.prompts))
    ours: dict[int, float] = {}
    for tokens in bench.plan.prompts:
        if not bench.recorder.start(f"prefill {tokens}"):
            break
        inputs = prefill_inputs(engine, tokens)
        (sequences,) = engine.empty_cache(1)
        sequences = engine._pool.with_room(sequences, tokens)

        def run(inputs: Any = inputs, sequences: Sequences = sequences) -> Tensor:
            return engine.prefill(dict(inputs), sequences, 0, causal=True)

        wrong = "" if bool(run().isfinite().all()) else "logits are not finite"
        bench.recorder.add(case=f"prefill {tokens} is finite", wrong=wrong)
        ours[tokens] = bench.seconds(run)
        bench.compare(f"prefill {tokens}", ours[tokens], None, arena=engine.arena_bytes())
    return ours, sizes


def prefill(bench: Bench) -> None:
    """One prompt of every length, ours and bf16."""
    ours, sizes = _prefill_ours(bench)
    _release(bench)
    dtype = torch.float32 if bench.dry else torch.bfloat16
    text = TextModel(sizes, bench.device, dtype)
    for tokens, seconds in ours.items():
        if not bench.recorder.start(f"bf16 prefill {tokens}"):
            return
        embeds = torch.randn(1, tokens, sizes.hidden, device=bench.device, dtype=dtype)
        places, caches = torch.arange(tokens, device=bench.device), text.caches(1, tokens)

        def baseline(e: Tensor = embeds, p: Tensor = places, c: Any = caches) -> Tensor:
            return text.forward(e, p, c, causal=True)

        theirs = bench.seconds(baseline)
        bench.recorder.add(name=f"prefill {tokens} bf16", unit="ms", value=theirs * 1e3)
        bench.recorder.add(name=f"prefill {tokens} speedup", unit="x", value=theirs / seconds)


@torch.inference_mode()
def _decode_ours(bench: Bench, engine: CudaEngine, batch: int, name: str) -> float | None:
    """Seconds a step, replays following each other on the device."""
    if not bench.recorder.start(name):
        return None
    past, steps = bench.plan.past, bench.plan.steps
    (sequences,) = engine.empty_cache(batch)
    sequences = engine._pool.with_room(sequences, past + 2 * steps + 8)
    for cache in sequences.lease.slot.caches:
        data = cache.data[:, :, :past]
        if cache.scale is None:
            data.normal_()
        else:
            data.random_(-127, 128)
            cache.scale.fill_(0.01)
    step = engine.decode_step(sequences, (3,))
    tokens = torch.arange(batch) % 100
    mask = torch.ones(batch, 1, 1, past + 1, dtype=torch.bool)

    def begin() -> None:
        step.start(tokens, torch.full((3, batch, 1), past), mask, past)

    begin()
    step.run()
    first = step.tokens[:batch].cpu()
    begin()
    step.run()
    same = bool((step.tokens[:batch].cpu() == first).all())
    finite = bool(step.logits[:batch].isfinite().all())
    wrong = "" if same and finite else "two replays differ, or logits are not finite"
    bench.recorder.add(case=f"{name} repeats itself", wrong=wrong)
    begin()

    def run() -> None:
        for _ in range(steps):
            step.run()

    # The rows attended grow by `steps` a call; start again every time.
    def timed() -> None:
        begin()
        run()

    overhead = bench.seconds(begin)
    return max(bench.seconds(timed) - overhead, 1e-9) / steps


def decode(bench: Bench) -> None:
    """One step of every batch size: float and int8 caches, and bf16."""
    rows = bench.plan.past + 2 * bench.plan.steps + 8
    found: dict[tuple[int, str], float] = {}
    sizes = None
    for kind in ("float", "int8"):
        engine, sizes = bench.engine(kind, rows)
        for batch in bench.plan.decodes:
            label = "decode" if kind == "float" else "decode int8 KV"
            seconds = _decode_ours(bench, engine, batch, f"{label} batch {batch}")
            if seconds is not None:
                found[batch, label] = seconds
                bench.compare(f"{label} batch {batch}", seconds, None)
        del engine
        _release(bench)
    assert sizes is not None
    dtype = torch.float32 if bench.dry else torch.bfloat16
    text = TextModel(sizes, bench.device, dtype)
    for batch in bench.plan.decodes:
        if not bench.recorder.start(f"bf16 decode batch {batch}"):
            return
        caches = text.caches(batch, bench.plan.past + bench.plan.steps // 2)
        for pair in caches:
            for cache in pair:
                cache.normal_()
        ids = torch.zeros(batch, 1, dtype=torch.int64, device=bench.device)
        place = torch.tensor([caches[0][0].shape[2] - 1], device=bench.device)

        def step(ids: Tensor = ids, place: Tensor = place, caches: Any = caches) -> Any:
            with torch.inference_mode():
                return text.step(ids, place, caches)

        replay, _ = bench.record(step)
        theirs = bench.seconds(replay)
        bench.recorder.add(name=f"decode batch {batch} bf16", unit="ms", value=theirs * 1e3)
        for label in ("decode", "decode int8 KV"):
            if (batch, label) in found:
                speedup = theirs / found[batch, label]
                bench.recorder.add(name=f"{label} batch {batch} speedup", unit="x", value=speedup)
        del caches


def order(bench: Bench) -> None:
    """Visual rows in front (``aifs``) against rows that look their scale up, one prompt: whether
    the answers agree, and whether the target's default is what is faster."""
    tokens = bench.plan.order
    seconds, logits, inputs = {}, {}, None
    for name, file in (("rows", bench.prepared), ("aifs", bench.prepared.with_name(model.AIFS))):
        if not bench.recorder.start(f"prefill {tokens}, {name}"):
            return
        engine, _ = replace(bench, prepared=file).engine(capacity=tokens)
        inputs = inputs or prefill_inputs(engine, tokens)
        seconds[name], logits[name] = _prefill_once(bench, engine, inputs, tokens)
        bench.recorder.add(name=f"prefill {tokens}, {name}", unit="ms", value=seconds[name] * 1e3)
        del engine
        _release(bench)
    faster = seconds["aifs"] / seconds["rows"]
    bench.recorder.add(name=f"prefill {tokens}: rows over aifs", unit="x", value=faster)
    apart = float((logits["aifs"] - logits["rows"]).norm() / logits["rows"].norm())
    wrong = "" if apart < APART else f"logits differ by {apart:.3f} of their size"
    bench.recorder.add(case=f"prefill {tokens}: rows and aifs agree", wrong=wrong, apart=apart)


@torch.inference_mode()
def _prefill_once(
    bench: Bench, engine: CudaEngine, inputs: dict[str, Any], tokens: int
) -> tuple[float, Tensor]:
    """Seconds and logits of a prompt; its mask is read where rows are reordered."""
    (sequences,) = engine.empty_cache(1)
    sequences = engine._pool.with_room(sequences, tokens)
    mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    placed = {**inputs, "mask": engine._mask(mask, causal=True)}

    def run() -> Tensor:
        return engine.prefill(dict(placed), sequences, 0, causal=True)

    logits = run().float()
    return bench.seconds(run), logits


@torch.inference_mode()
def _vision_ours(bench: Bench, pixels: Tensor) -> tuple[float, Any]:
    engine, sizes = bench.engine()
    height, width = bench.plan.patches
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(bench.device)
    inputs = {"pixel_values": pixels, "position_ids": grid}
    rows = engine.vision(inputs)
    wrong = "" if bool(rows.isfinite().all()) else "rows are not finite"
    bench.recorder.add(case=f"vision {len(pixels)} patches is finite", wrong=wrong)
    return bench.seconds(lambda: engine.vision(inputs)), sizes


def vision(bench: Bench) -> None:
    """One image through the tower and connector, ours and bf16."""
    if not bench.recorder.start("vision"):
        return
    count = bench.plan.patches[0] * bench.plan.patches[1]
    pixels = torch.randn(count, 3 * 2 * 14 * 14, device=bench.device)
    ours, sizes = _vision_ours(bench, pixels)
    _release(bench)
    dtype = torch.float32 if bench.dry else torch.bfloat16
    tower = VisionTower(sizes, bench.device, dtype)
    head = sizes.vision_width // sizes.vision_heads
    angles = torch.rand(count, head, device=bench.device)
    cos, sin, half = angles.cos().to(dtype), angles.sin().to(dtype), pixels.to(dtype)
    theirs = bench.seconds(lambda: tower.forward(half, cos, sin))
    bench.compare(f"vision {count} patches", ours, theirs)


def accuracy(bench: Bench) -> None:
    """tiny-qwen2-vl: right answers on the device and by definition on the CPU, and agreement."""
    from mqc.backends.cuda.target import open_engine
    from mqc.backends.registry import load_artifact
    from mqc.host import evaluate
    from mqc.testing import vqa

    if bench.artifact is None or not bench.recorder.start("accuracy of tiny-qwen2-vl"):
        return
    reference = load_artifact(bench.artifact, device="reference")
    device = "reference" if bench.dry else "cuda"
    for kind in ("float", "int8"):
        engine = open_engine(
            bench.artifact, device=device, kv_cache=kind, graphs=not bench.dry, capacity=256
        )
        rows = [vqa.sample("evaluation", index) for index in range(bench.plan.rows)]
        items = [reference.eval_item(vqa.messages(row), row.answer) for row in rows]
        report = evaluate(engine, items, baseline=reference.engine)
        name = f"tiny-qwen2-vl {kind} KV"
        add = bench.recorder.add
        add(name=f"{name}: accuracy", unit="%", value=100 * report.accuracy)
        assert report.agreement is not None and report.kl is not None
        add(name=f"{name}: agreement", unit="%", value=100 * report.agreement)
        add(name=f"{name}: KL", unit="nats e-3", value=1e3 * report.kl)
        wrong = "" if report.agreement >= 0.97 else f"agreement {report.agreement:.3f} < 0.97"
        add(case=f"{name} agrees with the reference", wrong=wrong)
