"""A family end to end: capture, all passes, two targets, and what came out, as one row."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mqc.analysis.flow import ChannelFlow, is_linear
from mqc.analysis.head import find_head
from mqc.analysis.streams import MIN_ADDS, find_streams
from mqc.backends.onnx.emit import emit
from mqc.backends.onnx.lower import lower
from mqc.backends.onnx.session import OnnxEngine
from mqc.capture import adapter_for, capture
from mqc.errors import MqcError
from mqc.host import Engine, ProgramEngine, Prompt, append_answer, generate_batch
from mqc.ir import Program
from mqc.ir.edit import tensor_type
from mqc.numerics.stats import relative_error
from mqc.passes.route_experts import RouteExperts
from mqc.pipeline import default_passes
from mqc.spec import named_scheme
from mqc.testing.families import FAMILIES, build_family
from mqc.testing.families.run import (
    engine_logits,
    family_prompt,
    family_samples,
    model_logits,
)
from mqc.testing.families.videos import exact_logits, own_logits, takes_videos, video_samples
from mqc.transform import PassContext, PassManager
from mqc.transform.equivalence import end_to_end_error

ANSWER = 8
"""Tokens generated for each prompt."""
_AIFS = "aifs-reorder"
_QUANTIZED = tuple(
    getattr(torch.ops.mqc, name).default
    for name in ("linear_w4a8", "linear_w8a8", "linear_w4a16", "linear_w8a16")
)


@dataclass
class Row:
    """What one family gave; ``reason`` says why it was not captured, if it was not.

    Errors are relative to the largest magnitude: ``capture_error`` of the captured graphs against
    transformers (float32 logits of float64 models), ``float_error`` of all function-preserving
    passes together (float64). ``video_error``: transformers' own logits for prompts with videos
    against the program behind all these passes, both in float64 throughout; None for a family whose
    prompts have none. Streams are (rotated, found). ``linears`` leaves out the head, which stays in
    float by default. Agreements count next tokens, given the same tokens before.
    """

    family: str
    captured: bool
    reason: str | None = None
    capture_error: float | None = None
    float_error: float | None = None
    video_error: float | None = None
    streams: dict[str, tuple[int, int]] = field(default_factory=dict)
    online_rotations: int = 0
    linears: int = 0
    quantized: int = 0
    quantized_weights: float = 0.0
    onnx_agreement: float | None = None
    aifs_agreement: float | None = None
    onnx_error: float | None = None
    skips: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    name: str, scheme: str = "w4a8", take: Callable[[str, torch.dtype], Program] | None = None
) -> Row:
    """The row of family ``name``; what cannot be captured is in it, other failures are raised.

    ``take``: gives the captured program of a family in a dtype, where one is there already.
    """
    start = time.perf_counter()
    row = Row(name, False)
    try:
        _measure(row, scheme, take or _captured)
    except MqcError as error:
        if row.captured:
            raise
        row.reason = error.message
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _captured(name: str, dtype: torch.dtype) -> Program:
    return capture(build_family(name, dtype)[0], dtype=dtype)


def _measure(row: Row, scheme_name: str, take: Callable[[str, torch.dtype], Program]) -> None:
    family = FAMILIES[row.family]
    model, _ = build_family(row.family, torch.float64)
    program = take(row.family, torch.float64)
    row.captured = True
    adapter = adapter_for(model.config)
    samples = family_samples(family, model.config, torch.float64, 5)
    prompts = [family_prompt(adapter, sample) for sample in samples]
    wanted = [model_logits(model, sample) for sample in samples]
    row.capture_error = _error(engine_logits(ProgramEngine(program), prompts), wanted)

    scheme = named_scheme(scheme_name)
    passes = default_passes(scheme)
    wide = program.to(torch.float64)
    exact = PassManager([*(item for item in passes if item.preserves), RouteExperts()])
    rewritten = exact.run(wide, PassContext(scheme))
    row.float_error = end_to_end_error(wide, rewritten)
    if takes_videos(row.family):
        films = video_samples(row.family, wide=True)
        answers = [exact_logits(ProgramEngine(rewritten), film.prompt) for film in films]
        row.video_error = _error(answers, [own_logits(model, film.tensors) for film in films])
        prompts += [film.prompt for film in video_samples(row.family)]

    data = family_samples(family, model.config, torch.float32, 6, seed=1)
    context = PassContext(scheme, [family_prompt(adapter, sample) for sample in data])
    place = [item.name for item in passes].index(_AIFS)
    first, final = PassManager(passes[:place]), PassManager(passes[place:])
    quantized = first.run(program.to(torch.float32), context)
    compiled = final.run(quantized, context)
    natural = {item.name for item in default_passes(scheme.replace(aifs=False))}
    last = [item for item in passes[place:] if item.name in natural]
    plain = PassManager(last).run(quantized, context)
    records = [*first.records, *final.records]
    row.skips = [f"{r.name}: {s.where}: {s.reason}" for r in records for s in r.skips]
    prepared = PassManager(passes[:2]).run(program.to(torch.float32), PassContext(scheme))
    found = Counter(_kind(stream.components) for stream in find_streams(ChannelFlow(prepared)))
    _describe(row, records, compiled, found)

    reference = ProgramEngine(compiled)
    results = generate_batch(
        reference, prompts, max_new_tokens=ANSWER, stop=(), padding="left", chunk=9
    )
    answered = [append_answer(p, r.tokens) for p, r in zip(prompts, results, strict=True)]
    ours = _answers(reference, answered)
    row.aifs_agreement = _agreement(ours, _answers(ProgramEngine(plain), answered))
    with TemporaryDirectory() as folder:
        lowered = lower(PassManager([RouteExperts()]).run(compiled, PassContext()))[0]
        emit(lowered, Path(folder))
        engine = OnnxEngine(Path(folder), lowered.facts)
        theirs = _answers(engine, answered)
        row.onnx_agreement = _agreement(ours, theirs)
        row.onnx_error = _error(theirs, ours)
        generate_batch(engine, prompts, max_new_tokens=ANSWER, stop=())


def _kind(components: Sequence[str]) -> str:
    return "language" if "decoder" in components else "vision"


def _describe(row: Row, records: Sequence[Any], compiled: Program, found: Counter[str]) -> None:
    rotated: Counter[str] = Counter()
    for record in records:
        if record.name == "hadamard-fuse":
            row.online_rotations = record.counts.get("online", 0)
            for detail in record.details:
                stream = detail["stream"]
                if stream["adds"] >= MIN_ADDS:
                    rotated[_kind(stream["components"])] += 1
    row.streams = {kind: (rotated[kind], found[kind]) for kind in ("vision", "language")}
    weights, left = 0, 0
    for component in compiled:
        head = find_head(component)
        for node in component.graph.nodes:
            if node.target in _QUANTIZED:
                row.quantized += 1
                row.linears += 1
                weights += _size(node)
            elif is_linear(node) and node is not head and "keep_float" not in node.meta:
                row.linears += 1
                left += _size(node)
    row.quantized_weights = round(weights / (weights + left), 4) if weights else 0.0


def _size(node: torch.fx.Node) -> int:
    """Elements of a linear's weight."""
    value = node.args[0]
    assert isinstance(value, torch.fx.Node)
    return int(tensor_type(value).shape[-1]) * int(tensor_type(node).shape[-1])


def _answers(engine: Engine, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
    """Logits [ANSWER, vocabulary] that led to the last tokens of each prompt."""
    return [logits[-ANSWER - 1 : -1] for logits in engine_logits(engine, prompts)]


def _agreement(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor]) -> float:
    left, right = torch.cat(list(one)).argmax(-1), torch.cat(list(two)).argmax(-1)
    return round(float((left == right).double().mean()), 4)


def _error(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    return max(relative_error(b, a) for a, b in zip(found, wanted, strict=True))
