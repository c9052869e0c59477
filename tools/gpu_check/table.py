"""The results as text: what failed first, then ceilings, correctness, timings."""

from __future__ import annotations

from typing import Any


def _counts(results: list[dict[str, Any]]) -> str:
    done = [r for r in results if "wrong" in r]
    bad = [r for r in done if r["wrong"]]
    text = f"{len(done)} checks, {len(bad)} wrong"
    for r in bad[:8]:
        kernel = f" {r['kernel']} split {r['split_k']}" if "kernel" in r else ""
        text += f"\n      {r['case']}{kernel}: {r['wrong']} {r.get('first', '')}"
    return text


def _timings(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for r in (r for r in results if "microseconds" in r):
        rate = f"{r['weight_tb_s']:7.2f} TB/s" if "weight_tb_s" in r else " " * 12
        tops = f"{r['tops']:8.1f} T/s" if "tops" in r else ""
        kernel = r.get("kernel", "")
        if kernel == "AUTO":
            kernel = f"AUTO={r['used']}/{r['split_k']}"
        lines.append(f"  {r['name']:44} {kernel:16} {r['microseconds']:10.1f} us {rate} {tops}")
    return lines


def render(report: dict[str, Any]) -> str:
    """A report of `__main__` as lines of text."""
    lines = [f"device {report['device']}, torch {report['torch']}, driver {report['driver']}"]
    for name, part in report["parts"].items():
        state = part["state"] if part["state"] == "done" else part["state"].upper()
        lines.append(f"{name}: {state}, {part['seconds']:.0f} s")
        if part["state"] != "done":
            lines.append(f"      in: {part['last']}\n      {part['error']}")
        if "blocking" in part:
            again = part["blocking"]
            lines.append(f"      launch by launch: {again['state']} in {again['last']}")
            lines.append(f"      {again['error'][-1500:]}")
        lines += [f"  skipped: {r['skipped']}" for r in part["results"] if "skipped" in r]
        for r in (r for r in part["results"] if "unit" in r):
            lines.append(f"  {r['name']:44} {r['value']:10.1f} {r['unit']}")
        if "counts" in part:
            lines.append(f"  {part['counts']}")
        elif any("wrong" in r for r in part["results"]):
            lines.append(f"  {_counts(part['results'])}")
        lines += _timings(part["results"])
        if "summary" in part:
            lines.append(f"  {part['summary']}")
    return "\n".join(lines)


def summary(report: dict[str, Any]) -> str:
    """The same for a terminal that keeps the last lines: of the timings, only the kernel chosen and
    torch's."""
    parts = {}
    for name, part in report["parts"].items():
        kept = (None, "AUTO", "torch bf16", "torch SDPA")
        shown = [r for r in part["results"] if r.get("kernel") in kept or r.get("wrong")]
        parts[name] = {**part, "results": shown, "error": part["error"][-800:]}
        if any("wrong" in r for r in part["results"]):
            parts[name]["counts"] = _counts(part["results"])
    return render({**report, "parts": parts})
