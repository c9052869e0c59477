"""The table of model families in docs/families.md: what each gives, end to end.

    python tools/family_table.py                    # all families, one after the other
    python tools/family_table.py qwen3_vl gemma3    # some rows again
    python tools/family_table.py --missing          # those that have no row yet
    python tools/family_table.py --show             # write docs/families.md from the results

Each family is a small model with random weights, built from transformers' own classes
(mqc/testing/families). It is captured, goes through all passes of scheme w4a8, and generates on the
targets reference and onnx, for prompts with no image, one and several, and with videos where the
family takes them. Rows are kept in
``tools/results/families.json`` and written as they come, so that a run can be cut off and go on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mqc.testing.families import FAMILIES
from mqc.testing.families.row import measure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tools" / "results" / "families.json"
PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
HEAD = (
    "| family | captured | streams rotated: vision, LLM | online rotations left "
    "| linears quantized | float64 error | videos | onnx = reference | AIFS on = off | s |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def table(rows: dict[str, Any]) -> str:
    """The results as Markdown, in the order of the families."""
    return "\n".join([HEAD, *(line(rows[name]) for name in FAMILIES if name in rows)])


def line(row: dict[str, Any]) -> str:
    if not row["captured"]:
        return f"| {row['family']} | no: {row['reason']} |" + " |" * 8
    streams = ", ".join("{}/{}".format(*row["streams"][kind]) for kind in ("vision", "language"))
    cells = [
        row["family"],
        "yes",
        streams,
        str(row["online_rotations"]),
        f"{row['quantized']}/{row['linears']}",
        f"{row['float_error']:.0e}",
        "no such prompts" if row["video_error"] is None else f"yes, {row['video_error']:.0e}",
        percent(row["onnx_agreement"]),
        percent(row["aifs_agreement"]),
        f"{row['seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"


def write_page(rows: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--missing", action="store_true", help="families without a row")
    parser.add_argument("--show", action="store_true", help="only write docs/families.md")
    args = parser.parse_args()
    unknown = sorted(set(args.families) - set(FAMILIES))
    if unknown:
        parser.error(f"no family {', '.join(unknown)}; there are: {', '.join(FAMILIES)}")
    torch.manual_seed(0)
    rows: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    names = [] if args.show else args.families or list(FAMILIES)
    if args.missing:
        names = [name for name in FAMILIES if name not in rows]
    console = Console()
    for name in names:
        rows[name] = measure(name).to_json()
        RESULTS.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
        console.print(line(rows[name]))
    write_page(rows)


if __name__ == "__main__":
    main()
