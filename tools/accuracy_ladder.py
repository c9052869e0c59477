"""What each step of the pipeline brings: accuracy and KL divergence, method by method.

    python tools/accuracy_ladder.py                      # all models, int4 and int3
    python tools/accuracy_ladder.py --models tiny-llava --bits 4 --rows 200
    python tools/accuracy_ladder.py --tables             # print what the stored results say

Every row compiles the model afresh for the reference target (integer-exact) with 256 calibration
samples, and scores it on evaluation samples that calibration never saw. Results go to
``tools/results/accuracy.json`` row by row, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
from rich.progress import track

from mqc.capture import capture
from mqc.compiler import CALIBRATION_SAMPLES
from mqc.host import AnswerScore, EvalItem, ProgramEngine, append_answer, evaluate, score
from mqc.ir import Program
from mqc.loading import open_model
from mqc.models import EMBEDDED
from mqc.pipeline import default_passes
from mqc.spec import Scheme, named_scheme
from mqc.testing import vqa
from mqc.transform import PassContext, PassManager

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
VARIANTS = {"w4a8": "vision W8A8", "w4a8-all": "vision as the language model"}
STEPS = (
    "RTN, static per tensor",
    "+ offline rotation",
    "+ online Hadamard",
    "+ RMS",
    "+ MSQ/AIFS",
    "+ GPTQ, clip search",
    "+ percentile ranges",
)
FLOAT = "float"
BATCH = 64


@dataclass(frozen=True)
class Job:
    """One row of a table: a model under the first ``step + 1`` methods."""

    model: str
    bits: int
    variant: str
    step: int
    rows: int

    @property
    def key(self) -> str:
        return f"{self.model}/w{self.bits}/{self.variant}/{self.step}/{self.rows}"

    def scheme(self) -> Scheme:
        full = named_scheme(self.variant)
        components = {}
        for name, part in full.components.items():
            weights = part.weights
            if not weights.quantized:
                continue
            bits = self.bits if weights.bits == 4 else weights.bits
            gptq = self.step >= 5
            weights = replace(weights, bits=bits, method="gptq" if gptq else "rtn", clip=gptq)
            msq = name == "decoder" and self.step >= 4
            observer = part.activations.observer if self.step >= 6 else "minmax"
            activations = replace(part.activations, per_modality=msq, observer=observer)
            components[name] = replace(part, weights=weights, activations=activations)
        return Scheme(
            f"{self.variant}-step{self.step}",
            components,
            rotate=self.step >= 1,
            online_hadamard=self.step >= 2,
            rms_suppress=self.step >= 3,
            aifs=self.step >= 4,
        )


@cache
def captured(model: str) -> Program:
    return capture(model)


@cache
def items(model: str, split: Literal["calibration", "evaluation"], rows: int) -> list[EvalItem]:
    """Generated samples as the model's own processor prepares them."""
    loaded = open_model(model)
    samples = (vqa.sample(split, index) for index in range(rows))
    return [loaded.eval_item(vqa.messages(row), row.answer) for row in samples]


@cache
def exact_scores(model: str, rows: int) -> list[AnswerScore]:
    """The float model's distributions over the answers."""
    engine = ProgramEngine(captured(model))
    return list(score(engine, items(model, "evaluation", rows), batch_size=BATCH))


def run(job: Job) -> tuple[str, dict[str, Any]]:
    """Compile and score one row."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    scheme = job.scheme()
    samples = items(job.model, "calibration", CALIBRATION_SAMPLES)
    prompts = [append_answer(item.prompt, item.answer_ids) for item in samples]
    context = PassContext(scheme, prompts, scheme.seed)
    compiled = PassManager(default_passes(scheme)).run(captured(job.model), context)
    report = evaluate(
        ProgramEngine(compiled),
        items(job.model, "evaluation", job.rows),
        baseline=exact_scores(job.model, job.rows),
        batch_size=BATCH,
    )
    return job.key, {**report.to_json(), "seconds": round(time.perf_counter() - start, 1)}


def run_float(model: str, rows: int) -> tuple[str, dict[str, Any]]:
    torch.set_num_threads(1)
    rows_of = items(model, "evaluation", rows)
    report = evaluate(ProgramEngine(captured(model)), rows_of, batch_size=BATCH)
    return f"{model}/{FLOAT}/{rows}", report.to_json()


def tables(results: dict[str, Any], models: list[str], rows: int) -> str:
    """Markdown: one table a weight width and variant, models as columns."""
    parts = []
    for bits in (4, 3):
        for variant, vision in VARIANTS.items():
            name = variant.replace("4", str(bits))
            lines = [
                f"`{name}`: language model W{bits}A8, {vision}",
                "",
                "| | " + " | ".join(models) + " |",
                "|---|" + "---|" * len(models),
            ]
            cells = [results.get(f"{model}/{FLOAT}/{rows}") for model in models]
            lines.append("| float | " + " | ".join(cell(entry) for entry in cells) + " |")
            for step, label in enumerate(STEPS):
                keys = [Job(model, bits, variant, step, rows).key for model in models]
                lines.append(
                    f"| {label} | " + " | ".join(cell(results.get(key)) for key in keys) + " |"
                )
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def plot(results: dict[str, Any], models: list[str], rows: int, path: Path) -> None:
    """Accuracy step by step, a panel a table, a line a model; float is the dashed line."""
    figure, panels = plt.subplots(2, 2, figsize=(11, 7), sharex=True, sharey=True)
    combinations = [(bits, variant) for bits in (4, 3) for variant in VARIANTS]
    for panel, (bits, variant) in zip(panels.flat, combinations, strict=True):
        for model in models:
            entries = [
                results.get(Job(model, bits, variant, step, rows).key) for step in range(len(STEPS))
            ]
            points = [(at, 100 * e["accuracy"]) for at, e in enumerate(entries) if e is not None]
            if not points:
                continue
            (line,) = panel.plot(*zip(*points, strict=True), marker="o", label=model)
            exact = results.get(f"{model}/{FLOAT}/{rows}")
            if exact is not None:
                panel.axhline(100 * exact["accuracy"], color=line.get_color(), ls="--", lw=0.8)
        panel.set_title(variant.replace("4", str(bits)))
        panel.set_xticks(range(len(STEPS)), STEPS, rotation=25, ha="right", fontsize=8)
        panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("exact match, %")
    panels[1, 0].set_ylabel("exact match, %")
    panels[0, 0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    text = f"{100 * entry['accuracy']:.1f}"
    return text if entry.get("kl") is None else f"{text} (KL {entry['kl']:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=sorted(EMBEDDED), choices=sorted(EMBEDDED))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3], choices=[4, 3])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--rows", type=int, default=2000, help="evaluation samples")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--plot", type=Path, help="also draw the results, e.g. docs/accuracy.svg")
    parser.add_argument("--tables", action="store_true", help="only print stored results")
    args = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if not args.tables:
        jobs = [
            Job(model, bits, variant, step, args.rows)
            for bits in args.bits
            for variant in args.variants
            for step in range(len(STEPS))
            for model in args.models
        ]
        with ProcessPoolExecutor(args.jobs) as pool:
            waiting = [
                pool.submit(run_float, model, args.rows)
                for model in args.models
                if f"{model}/{FLOAT}/{args.rows}" not in results
            ]
            waiting += [pool.submit(run, job) for job in jobs if job.key not in results]
            for done in track(as_completed(waiting), "rows", total=len(waiting)):
                key, entry = done.result()
                results[key] = entry
                RESULTS.parent.mkdir(exist_ok=True)
                draft = RESULTS.with_suffix(".tmp")  # a kill leaves the old rows or the new ones
                draft.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
                draft.replace(RESULTS)
    print(tables(results, args.models, args.rows))
    if args.plot is not None:
        plot(results, args.models, args.rows, args.plot)


if __name__ == "__main__":
    main()
