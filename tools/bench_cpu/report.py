"""The JSON of results, tables and plot made from it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench_cpu.peers import PEERS

LAYERS = 4
Results = dict[str, Any]


def read(path: Path) -> Results:
    """The results so far."""
    return json.loads(path.read_text()) if path.is_file() else {"parts": {}}


def write(path: Path, results: Results) -> None:
    """All results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def merge(results: Results, part: str, mode: str, rows: dict[str, dict[str, Any]]) -> None:
    """Put rows of one run in the place of older ones of the same peers and requests."""
    place = results["parts"].setdefault(part, {}).setdefault(mode, {})
    for name, row in rows.items():
        old = place.setdefault(name, {})
        if "error" in row:
            old.setdefault("error", row["error"])
            if not any(isinstance(value, dict) for value in old.values()):
                old["error"] = row["error"]
            continue
        old.pop("error", None)
        old.update(row)
    results["parts"][part][mode] = {name: place[name] for name in PEERS if name in place}


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _seconds(row: dict[str, Any], request: str) -> float | None:
    entry = row.get(request)
    return entry["seconds"] if entry else None


def linear_table(part: dict[str, dict[str, Any]], threads: int) -> list[str]:
    """Products by rows: microseconds at one row, GOP/s else."""
    pattern = re.compile(rf"k(\d+) n(\d+) m(\d+) {threads}T")
    keys = sorted(
        {tuple(map(int, found.groups())) for row in part.values() for name in row
         if (found := pattern.fullmatch(name))},
        key=lambda key: (key[0], key[2]),
    )  # fmt: skip
    if not keys:
        return []
    heads = [f"M={m}, {k}->{n}" + (", us" if m == 1 else "") for k, n, m in keys]
    lines = [f"| {threads} thread{'s' * (threads > 1)} | " + " | ".join(heads) + " |"]
    lines.append("|---" * (len(keys) + 1) + "|")
    for name in PEERS:
        row = part.get(name)
        if row is None:
            continue
        cells = []
        for k, n, m in keys:
            seconds = _seconds(row, f"k{k} n{n} m{m} {threads}T")
            if seconds is None:
                cells.append("-")
            elif m == 1:
                cells.append(f"{seconds * 1e6:.0f}")
            else:
                cells.append(f"{2e-9 * k * n * m / seconds:.0f}")
        note = f" ({row['error'][:60]})" if "error" in row and set(cells) == {"-"} else ""
        lines.append(f"| {PEERS[name].title}{note} | " + " | ".join(cells) + " |")
    return lines


def decoder_table(part: dict[str, dict[str, Any]]) -> list[str]:
    """Tokens a second, milliseconds a layer, memory."""
    lines = [
        (
            "| 4-layer decoder | prefill 256 tok/s | prefill 1024 tok/s "
            "| decode tok/s (ms a layer) | peak RSS MB |"
        ),
        "|---|---|---|---|---|",
    ]
    for name, row in part.items():
        if "decode 256" not in row:
            lines.append(f"| {PEERS[name].title} | {row.get('error', 'not run')[:80]} | | | |")
            continue
        tokens = [_seconds(row, f"prefill {n}") for n in (256, 1024)]
        rates = [_cell(n / s if s else None, 0) for n, s in zip((256, 1024), tokens, strict=True)]
        step = row["decode 256"]["seconds"]
        lines.append(
            f"| {PEERS[name].title} | {rates[0]} | {rates[1]} | {1 / step:.0f} "
            f"({1000 * step / LAYERS:.2f}) | {row.get('peak_mb', 0):.0f} |"
        )
    return lines


def prompt_table(part: dict[str, dict[str, Any]]) -> list[str]:
    """Milliseconds of the vision tower and to the first token."""
    lines = [
        (
            "| 448 x 448 image prompt, 4 + 4 layers | vision tower ms | time to first token ms "
            "| against the best other |"
        ),
        "|---|---|---|---|",
    ]
    others = [
        row["prompt"]["seconds"]
        for name, row in part.items()
        if "prompt" in row and "mqc" not in name
    ]
    best = min(others, default=0.0)
    for name, row in part.items():
        if "prompt" not in row:
            lines.append(f"| {PEERS[name].title} | {row.get('error', 'not run')[:80]} | | |")
            continue
        seconds, tower = row["prompt"]["seconds"], _seconds(row, "vision")
        tower_ms = _cell(tower * 1000 if tower else None, 0)
        ratio = f"{best / seconds:.2f}x" if best else "-"
        title = PEERS[name].title
        lines.append(f"| {title} | {tower_ms} | {seconds * 1000:.0f} | {ratio} |")
    return lines


def tables(results: Results) -> str:
    """All tables, in Markdown."""
    machine = results.get("machine", {})
    used = ", ".join(f"{name} {v}" for name, v in machine.get("versions", {}).items())
    text = [
        (
            f"{machine.get('processor', '?')}, {machine.get('cores', '?')} cores "
            f"({', '.join(machine.get('flags', []))}); {used}."
        )
    ]
    for mode, title in (("vnni", "AVX512-VNNI (AMX refused to all)"), ("amx", "with AMX")):
        section: list[str] = []
        for row in results.get("ceilings", {}).get(mode, []):
            section.append(
                f"{row['threads']} thread(s): {row['isa']} {row['gops']:.0f} GOP/s, "
                f"read {row['read_gb_per_s']:.0f} GB/s. "
            )
        for threads in (1, 2):
            lines = linear_table(results["parts"].get("linears", {}).get(mode, {}), threads)
            section += ["", *lines] if lines else []
        for name, make in (("decoder", decoder_table), ("prompt", prompt_table)):
            part = results["parts"].get(name, {}).get(mode)
            if part:
                section += ["", *make({n: part[n] for n in PEERS if n in part})]
        if section:
            text += ["", f"**{title}**", "", *section]
    return "\n".join(text) + "\n"


def into_readme(readme: Path, text: str, marker: str = "bench-cpu") -> None:
    """Replace what stands between ``<!-- marker -->`` and ``<!-- /marker -->``.

    Raises:
        ValueError: the markers are not there.
    """
    old = readme.read_text()
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if start not in old or end not in old:
        raise ValueError(f"{readme} lacks the markers {start} and {end}")
    before, rest = old.split(start, 1)
    readme.write_text(f"{before}{start}\n{text}{end}{rest.split(end, 1)[1]}")


def plot(results: Results, path: Path) -> None:
    """Prefill and decode speed of every peer, as bars."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    mpl.rcParams["svg.hashsalt"] = "bench_cpu"
    panels = [
        ("prefill 1024", "prefill 1024, tokens/s", 1024.0),
        ("decode 256", "decode, tokens/s", 1.0),
    ]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    for axis, (request, title, tokens) in zip(axes, panels, strict=True):
        part = results["parts"].get("decoder", {}).get("vnni", {})
        names = [name for name in reversed(PEERS) if request in part.get(name, {})]
        rates = [tokens / part[name][request]["seconds"] for name in names]
        colours = ["#d1495b" if name.startswith("mqc") else "#8d99ae" for name in names]
        bars = axis.barh([PEERS[name].title for name in names], rates, color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.set_title(title)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.15)
    axes[1].set_yticklabels([])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
