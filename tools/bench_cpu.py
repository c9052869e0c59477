"""Time quantized multimodal models on this CPU against other engines, in one run, taking turns.

    python tools/bench_cpu.py --prepare                  # make all models, once (minutes)
    python tools/bench_cpu.py                            # everything
    python tools/bench_cpu.py --part decoder --only mqc,llama-q4_0 --rounds 3
    python tools/bench_cpu.py --tables --readme docs/speed.md --plot docs/bench_cpu.svg

Parts: linears (one product), decoder (prefill, decode, memory), prompt (vision tower, time to the
first token). Every peer runs in its own process; medians are kept, and merged into the JSON, so
parts and peers can be run one by one; compare rows of one run. A peer that is not installed
(pip install mqc[bench]) is a row that says so. By default AMX is refused to all, so that numbers
compare with processors that have AVX512-VNNI alone; --amx allows it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench_cpu import machine, models, report
from bench_cpu.peers import DECODER, LINEARS, PEERS, PROMPT, missing
from bench_cpu.process import PeerError, Worker, in_turn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tools" / "results" / "bench_cpu.json"
KERNELS = ROOT / "build" / "native" / "backends" / "onnx" / "native" / "libmqc_cpu.so"
COPIES = 16
"""Matrices that a product of few rows is timed on, one after the other: none is in a near cache."""


def say(text: str) -> None:
    """Progress, beside the results."""
    print(text, file=sys.stderr, flush=True)


def requests_of(part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What every peer is asked in one round of a part."""
    if part == DECODER:
        steps = {"do": "decode", "tokens": models.CONTEXT, "steps": models.STEPS}
        prefills = [{"do": "prefill", "name": f"prefill {n}", "tokens": n} for n in (256, 1024)]
        return [*prefills, {**steps, "name": f"decode {models.CONTEXT}"}]
    if part == PROMPT:
        return [{"do": name, "name": name} for name in ("vision", "prompt")]
    requests = []
    for k, n in options.shapes:
        for m in options.rows:
            name = f"k{k} n{n} m{m} {options.threads}T"
            copies = COPIES if m <= 16 else 1
            request = {"do": "linear", "name": name, "k": k, "n": n, "m": m, "copies": copies}
            requests.append({**request, "repeat": 8 if m <= 128 else 3})
    return requests


def run_part(part: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """One part with every chosen peer that takes it; rows by peer."""
    names = [name for name in options.only if part in PEERS[name].parts]
    rows: dict[str, dict[str, Any]] = {}
    workers: dict[str, Worker] = {}
    requests = requests_of(part, options)
    # Matrices of all products at once would be gigabytes: a product at a time.
    batches = [[request] for request in requests] if part == LINEARS else [requests]
    try:
        for name in names:
            start = time.perf_counter()
            try:
                workers[name] = Worker(name, part, options.cache, options.threads, options.amx)
                rows[name] = {"notes": workers[name].loaded.get("notes", {})}
            except PeerError as error:
                rows[name] = {"error": str(error)}
            say(f"{part}: {name} {time.perf_counter() - start:.1f} s {rows[name].get('error', '')}")
        for batch in batches:
            running = {n: w for n, w in workers.items() if "error" not in rows[n]}
            for name, row in in_turn(running, batch, options.rounds, say).items():
                rows[name].update(row)
                say(f"{part}: {name} {summary(row)}")
    finally:
        for worker in workers.values():
            worker.close()
    for row in rows.values():
        if row.keys() - {"notes"}:
            row["threads"] = options.threads
    return rows


def summary(row: dict[str, Any]) -> str:
    """One line of what was measured."""
    if "error" in row:
        return str(row["error"])
    times = [f"{n} {1000 * v['seconds']:.2f} ms" for n, v in row.items() if isinstance(v, dict)]
    return ", ".join([*times, f"peak {row['peak_mb']:.0f} MB"])


def prepare(options: argparse.Namespace) -> None:
    """Make every model of every chosen part and peer."""
    options.cache.mkdir(parents=True, exist_ok=True)
    for part in options.part:
        for name in options.only:
            reason = missing(name)
            if part not in PEERS[name].parts or reason:
                continue
            start = time.perf_counter()
            importlib.import_module(PEERS[name].module).prepare(name, part, options.cache)
            say(f"{part}: {name} ready, {time.perf_counter() - start:.1f} s")


def names(known: tuple[str, ...]) -> Any:
    """A parser of a comma-separated choice."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = sorted(set(chosen) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} unknown: {', '.join(known)}")
        return chosen

    return parse


def shapes(text: str) -> list[tuple[int, int]]:
    """ "1536x8960,8960x1536" as (K, N)."""
    return [(int(k), int(n)) for k, n in (part.split("x") for part in text.split(","))]


def main() -> None:
    """Parse, measure, merge, show."""
    parts = (LINEARS, DECODER, PROMPT)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", type=names(parts), default=list(parts), help=", ".join(parts))
    parser.add_argument(
        "--only", "--peers", type=names(tuple(PEERS)), default=list(PEERS), help=", ".join(PEERS)
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=lambda t: [int(m) for m in t.split(",")],
                        default=[1, 16, 128, 512, 1024], help="of the linears")  # fmt: skip
    parser.add_argument("--shapes", type=shapes, default=[(1536, 8960)], help="KxN,... (linears)")
    parser.add_argument("--amx", action="store_true", help="let peers use AMX")
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "bench_cpu")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--prepare", action="store_true", help="make the models, then end")
    parser.add_argument("--tables", action="store_true", help="show the results, measure nothing")
    parser.add_argument("--readme", type=Path, help="with --tables: put them between its markers")
    parser.add_argument("--plot", type=Path, help="with --tables: draw the decoder's speeds")
    parser.add_argument("--json", action="store_true", help="print this run's rows as JSON")
    options = parser.parse_args()
    results = report.read(options.results)
    if options.prepare:
        return prepare(options)
    if options.tables:
        text = report.tables(results)
        print(text)
        if options.readme:
            report.into_readme(options.readme, text)
        if options.plot:
            report.plot(results, options.plot)
        return None
    mode = "amx" if options.amx else "vnni"
    results["machine"] = machine.describe()
    results["model"] = f"{models.LAYERS} layers, {models.SHAPE}, vocabulary {models.VOCABULARY}"
    fresh: dict[str, Any] = {}
    for part in options.part:
        if part == LINEARS:
            rates = machine.ceilings(KERNELS, "amx" if options.amx else "avx512vnni", [1, 2])
            results.setdefault("ceilings", {})[mode] = rates
        fresh[part] = run_part(part, options)
        report.merge(results, part, mode, fresh[part])
        report.write(options.results, results)
    if options.json:
        print(json.dumps(fresh, indent=1))
    else:
        print(report.tables(results))
    return None


if __name__ == "__main__":
    main()
