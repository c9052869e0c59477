"""Do the targets agree? Reference against onnx, and AIFS on against off, sample by sample.

    python tools/agreement.py                     # 200 samples, all embedded models
    python tools/agreement.py --rows 20 --models tiny-llava

Per model: how many samples generate the same tokens, and how far the answer's logits are apart
(largest difference over largest logit). Integer operators are bit-equal between the targets (tested
in tests/ops and tests/backends); what differs is float rounding in between, and a value that lies
within an ulp of a rounding boundary then falls to the other int8 step. The last pair is the measure
of that: the reference against itself, its float arithmetic once in float32 and once in float64.
Writes ``tools/results/agreement.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

import mqc
from mqc.host import ProgramEngine, Runnable, score
from mqc.models import EMBEDDED
from mqc.testing import vqa

RESULTS = Path(__file__).parent / "results" / "agreement.json"


def compare(one: Runnable, two: Runnable, rows: int, label: str) -> dict[str, Any]:
    """Token agreement and logit differences of two runnables on evaluation samples."""
    same, errors = 0, []
    for index in track(range(rows), label):
        row = vqa.sample("evaluation", index)
        messages = vqa.messages(row)
        tokens = [m.generate(messages, max_new_tokens=8).tokens for m in (one, two)]
        same += tokens[0] == tokens[1]
        item = one.eval_item(messages, row.answer)
        left, right = (next(iter(score(m.engine, [item]))).log_probs for m in (one, two))
        errors.append(float((left - right).abs().max() / left.abs().max()))
    errors.sort()
    return {
        "rows": rows,
        "same_tokens": same,
        "relative_error_median": statistics.median(errors),
        "relative_error_p95": errors[int(0.95 * (rows - 1))],
        "relative_error_max": errors[-1],
        "within_1e-4": sum(error <= 1e-4 for error in errors),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=sorted(EMBEDDED), choices=sorted(EMBEDDED))
    parser.add_argument("--rows", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            made = {}
            for name, target, overrides in (
                ("reference", "reference", []),
                ("onnx", "onnx", []),
                ("natural", "reference", ["aifs=false"]),
            ):
                out = Path(folder) / f"{model}-{name}"
                mqc.compile(model, target=target, overrides=overrides, out=out)
                made[name] = mqc.load(out)
            exact = made["reference"].engine
            assert isinstance(exact, ProgramEngine)
            double = Runnable(
                ProgramEngine(exact.program.copy().to(torch.float64)),
                made["reference"].processor,
                made["reference"].adapter,
            )
            results[model] = {
                "reference vs onnx": compare(
                    made["reference"], made["onnx"], args.rows, f"{model} onnx"
                ),
                "aifs on vs off": compare(
                    made["reference"], made["natural"], args.rows, f"{model} aifs"
                ),
                "float32 vs float64": compare(
                    made["reference"], double, args.rows, f"{model} float64"
                ),
            }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    print("| model | pair | same tokens | logits: median, p95, max | within 1e-4 |")
    print("|---|---|---|---|---|")
    for model, pairs in results.items():
        for pair, entry in pairs.items():
            errors = [entry[f"relative_error_{key}"] for key in ("median", "p95", "max")]
            shown = ", ".join(f"{error:.1e}" for error in errors)
            rows = entry["rows"]
            print(
                f"| {model} | {pair} | {entry['same_tokens']}/{rows} | {shown} "
                f"| {entry['within_1e-4']}/{rows} |"
            )


if __name__ == "__main__":
    main()
