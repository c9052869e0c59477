"""Checkpoint to artifact, and passes by hand: ``compile`` and ``opt``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mqc.artifact import ArtifactWriter, folder_size
from mqc.backends.registry import Target, get_target
from mqc.calib.dataset import Dataset, load_dataset
from mqc.capture import Processor, adapter_for, capture, check_processor, checkpoint_folder
from mqc.config import make_recipe
from mqc.errors import TargetError, UsageError
from mqc.host import ProgramEngine, Runnable, append_answer
from mqc.host.cache import KV_CACHE
from mqc.host.score import answer_ids
from mqc.ir import Program, Scratch, load_program, save_program
from mqc.models import EMBEDDED
from mqc.partial import Partial, asked_key, data_key
from mqc.pipeline import default_passes, make_passes
from mqc.progress import Reporter, Silent, Stages
from mqc.spec import Scheme
from mqc.transform import Pass, PassContext, PassManager, PassRecord
from mqc.transform.checkpoint import Checkpoints

if TYPE_CHECKING:
    from mqc.host import Prompt

CALIBRATION_SAMPLES = 256


class FolderDump:
    """Writes a program's text after a pass as ``NN-pass.txt`` into a folder.

    ``first``: the number of the first text, where an earlier run wrote those before it.
    """

    def __init__(self, folder: str | Path, first: int = 0) -> None:
        self.folder = Path(folder)
        self.first = first
        self.files: list[Path] = []

    def __call__(self, pass_name: str, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.first + len(self.files):02d}-{pass_name}.txt"
        path.write_text(text, encoding="utf-8")
        self.files.append(path)


@dataclass(frozen=True)
class CompileReport:
    """A finished compile: where the artifact is, what was done, sizes in bytes.

    ``resumed`` says what an earlier, unfinished run had done; ``seconds`` are those of this run.
    """

    artifact: Path
    target: str
    scheme: Scheme
    records: list[PassRecord]
    calibration: dict[str, Any] | None
    source_bytes: int
    artifact_bytes: int
    seconds: float
    resumed: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "artifact": str(self.artifact),
            "target": self.target,
            "scheme": self.scheme.to_json(),
            "passes": [{**r.to_json(), "seconds": round(r.seconds, 3)} for r in self.records],
            "calibration_rows": (self.calibration or {}).get("rows", 0),
            "source_bytes": self.source_bytes,
            "artifact_bytes": self.artifact_bytes,
            "seconds": round(self.seconds, 3),
            "resumed": self.resumed,
        }


@dataclass
class PassOptions:
    """How passes are run, beside which: see :class:`mqc.transform.PassManager`."""

    verify_each: bool = False
    dump_after: Collection[str] = ()
    dump_folder: str | Path = "mqc-dump"
    limit: int | None = None

    def key(self) -> dict[str, Any]:
        """The options as JSON data."""
        dumps = {"after": sorted(self.dump_after), "folder": str(self.dump_folder)}
        return {
            "verify_each": self.verify_each,
            "limit": self.limit,
            "dumps": dumps if self.dump_after else None,
        }


def compile(  # noqa: A001  (mqc.compile)
    model: str | Path,
    *,
    target: str = "onnx",
    device: str | None = None,
    scheme: str | Scheme | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str | Mapping[str, Any]] = (),
    passes: Sequence[str] = (),
    calibration: str | Path | Sequence[Any] | None = None,
    samples: int = CALIBRATION_SAMPLES,
    out: str | Path | None = None,
    seed: int | None = None,
    options: PassOptions | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    resume: bool = True,
    reporter: Reporter | None = None,
) -> CompileReport:
    """Compile a checkpoint into an artifact folder.

    A long compile keeps what it has finished in the folder ``<out>.partial``, at most one copy of
    the weights in float32 and one in int8, until the artifact stands. Where a compile was killed or
    failed, the next one with the same arguments goes on there, and writes the same bytes.

    Args:
        model: folder in the Hugging Face layout, hub id, or embedded model's name.
        target: name of a target (``mqc targets``).
        device: of a target with several: "cpu" (default) or "cuda" for ``onnx``.
        scheme, recipe, overrides: what is quantized and how; see :func:`mqc.config.make_recipe`.
        passes: custom passes, ``module:Class``, beside those that the scheme asks for.
        calibration: see :func:`mqc.calib.dataset.load_dataset`; embedded models have a generated
            set.
        samples: at most this many calibration rows are used.
        out: artifact folder; ``<model>-<scheme>-<target>`` in the current folder by default.
        seed: of the rotations' signs; the scheme's where None.
        options: verification, dumps, bisection.
        revision, trust_remote_code: as in transformers.
        resume: go on where an unfinished compile of the same arguments stopped; False throws away
            what it kept.
        reporter: told how far the compile is.

    Raises:
        MqcError: of the kind that fits; nothing stands at ``out`` then. :class:`UsageError` where
            an unfinished compile of other arguments is kept; :class:`ArtifactError` where another
            process compiles into ``out``.
    """
    start = time.perf_counter()
    report = reporter or Silent()
    chosen = make_recipe(scheme, recipe, overrides, target)
    plan = chosen.scheme if seed is None else chosen.scheme.replace(seed=seed)
    backend = _usable_target(target, device)
    pipeline = default_passes(plan, [*chosen.passes, *passes])
    stages = Stages(report, ["capture", *(item.name for item in pipeline), "emit"])
    # What can be wrong in a user's files is found before anything that takes time.
    folder = checkpoint_folder(model, revision)
    processor = check_processor(folder, trust_remote_code)
    data = _calibration_rows(plan, folder.name, calibration, samples)
    place = Path(out) if out else Path(f"{Path(model).name}-{plan.name}-{backend.name}")
    chosen_options = options or PassOptions()
    _check_dumps(chosen_options, pipeline)
    with Partial(place, fresh=not resume) as partial, ArtifactWriter(place) as writer:
        asked = asked_key(plan, pipeline, chosen_options.key())
        partial.require(asked)
        stages.enter("capture")
        program = capture(
            model,
            revision=revision,
            trust_remote_code=trust_remote_code,
            progress=report.step,
        )
        program.params.scratch = partial.scratch
        key = {**asked, **data_key(program, folder, data)}
        partial.require(key)
        checkpoints = Checkpoints(partial.folder, program, partial.keep_key(key), report.note)
        calibrated = None
        if data is not None:
            calibrated = _prompts(data, program, folder, processor, trust_remote_code)
        context = PassContext(plan, calibrated, plan.seed, limit=chosen_options.limit)
        program, records, resumed = _run_passes(
            pipeline, program, context, chosen_options, stages, checkpoints
        )
        stages.enter("emit")
        if plan.kv_cache != "float":
            program.facts = {**program.facts, KV_CACHE: plan.kv_cache}
        lowered = backend.lower(program)
        backend.emit(lowered, writer)
        writer.copy_model_files(folder)
        provenance = data.provenance() if data is not None else None
        writer.describe(
            target=backend.name,
            scheme=plan.to_json(),
            history=lowered.history,
            facts=lowered.facts,
            calibration=provenance,
        )
    stages.enter("done")
    return CompileReport(
        place,
        backend.name,
        plan,
        records,
        provenance,
        sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        folder_size(place),
        time.perf_counter() - start,
        resumed,
    )


def opt(
    source: str | Path,
    passes: Sequence[str],
    *,
    scheme: str | Scheme | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str | Mapping[str, Any]] = (),
    calibration: str | Path | Sequence[Any] | None = None,
    samples: int = CALIBRATION_SAMPLES,
    out: str | Path | None = None,
    options: PassOptions | None = None,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> tuple[Program, list[PassRecord]]:
    """Run passes by name on a saved program, or on a checkpoint captured for it.

    ``out`` is a folder for the result (:func:`mqc.ir.save_program`). Raises as :func:`compile`.
    """
    report = reporter or Silent()
    plan = make_recipe(scheme, recipe, overrides).scheme
    pipeline = make_passes(passes, plan)
    saved = (Path(source) / "program.json").is_file()
    stages = Stages(report, ["read", *(item.name for item in pipeline)])
    stages.enter("read")
    program = (
        load_program(Path(source))
        if saved
        else capture(source, trust_remote_code=trust_remote_code, progress=report.step)
    )
    program.params.scratch = Scratch(Path(tempfile.gettempdir()))
    calibrated = None
    if {"static-scales", "quantize-weights", "rms-suppress"} & {item.name for item in pipeline}:
        name = program.facts.get("source", {}).get("name")
        data = _calibration_rows(plan, name, calibration, samples)
        if data is not None:
            folder = _model_folder(source, program)
            processor = check_processor(folder, trust_remote_code)
            calibrated = _prompts(data, program, folder, processor, trust_remote_code)
    chosen_options = options or PassOptions()
    _check_dumps(chosen_options, pipeline)
    context = PassContext(plan, calibrated, plan.seed, limit=chosen_options.limit)
    program, records, _ = _run_passes(pipeline, program, context, chosen_options, stages)
    if out is not None:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        save_program(program, folder)
    stages.enter("done")
    return program, records


def _usable_target(name: str, device: str | None) -> Target:
    target = get_target(name)
    reason = target.available()
    if reason is not None:
        raise TargetError(f"target {name!r} cannot be used: {reason}", hint="see mqc doctor")
    if device is None:
        return target
    for_device = getattr(target, "for_device", None)
    if for_device is None:
        raise UsageError(
            f"target {name!r} has no devices to choose from", hint="leave out the device"
        )
    chosen: Target = for_device(device)
    return chosen


def _check_dumps(options: PassOptions, pipeline: Sequence[Pass]) -> None:
    names = [item.name for item in pipeline]
    unknown = set(options.dump_after) - set(names) - {"all"}
    if unknown:
        raise UsageError(
            f"--dump-after names {', '.join(sorted(unknown))}, which is not in the pipeline",
            hint=f"the passes are: {', '.join(names)}, or all",
        )


def _run_passes(
    pipeline: Sequence[Pass],
    program: Program,
    context: PassContext,
    options: PassOptions,
    stages: Stages,
    checkpoints: Checkpoints | None = None,
) -> tuple[Program, list[PassRecord], str | None]:
    """The program after all passes, their records, and where they went on, if not at the start."""
    names = [item.name for item in pipeline]

    def progress(what: str, done: int, total: int) -> None:
        if what in names or what == "done":
            stages.enter(what if what != "done" else "")
        else:
            stages.reporter.step(what, done, total)

    context.progress = progress
    state, resumed = None, None
    if checkpoints is not None:
        state = checkpoints.restore()
        resumed = checkpoints.kept(names, state)
        if resumed is not None:
            stages.reporter.note(f"continues {resumed}; --fresh starts over")
    done = [] if state is None else [record.name for record in state.records]
    dumped = sum("all" in options.dump_after or name in options.dump_after for name in done)
    manager = PassManager(
        pipeline,
        verify_each=options.verify_each,
        dump_after=tuple(options.dump_after),
        dump=FolderDump(options.dump_folder, dumped),
        checkpoints=checkpoints,
    )
    return manager.run(program, context, state), manager.records, resumed


def _calibration_rows(
    scheme: Scheme,
    name: str | None,
    source: str | Path | Sequence[Any] | None,
    samples: int,
) -> Dataset | None:
    if not scheme.needs_calibration:
        return None
    if samples < 1:
        raise UsageError(f"{samples} calibration samples", hint="use 128 or more")
    if source is None and name in EMBEDDED:
        source = f"tiny-vqa:calibration:{samples}"
    if source is None:
        raise UsageError(
            f"scheme {scheme.name!r} needs calibration data, and none is given",
            hint="--calibration FOLDER or FILE.jsonl with images and chat messages like those "
            "the model will see; 128 to 512 rows",
        )
    return load_dataset(source, limit=samples)


def _prompts(
    data: Dataset, program: Program, folder: Path, processor: Processor, trust_remote_code: bool
) -> list[Prompt]:
    """The rows as prompts; where a row has an answer, its tokens follow the prompt."""
    adapter = adapter_for(folder, trust_remote_code)
    runnable = Runnable(ProgramEngine(program), processor, adapter)
    prompts: list[Prompt] = []
    for row in data:
        with row.named():
            prompt = runnable.prompt(row.loaded())
            if row.answer is not None:
                tokens = answer_ids(row.answer, runnable.tokenizer, program.facts)
                prompt = append_answer(prompt, tokens)
        prompts.append(prompt)
    return prompts


def _model_folder(source: str | Path, program: Program) -> Path:
    if (Path(source) / "config.json").is_file():
        return Path(source)
    return checkpoint_folder(str(program.facts.get("source", {}).get("name", source)))
