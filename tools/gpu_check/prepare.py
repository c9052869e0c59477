"""Make here what the model parts need there: graphs of the large model, tiny-qwen2-vl compiled.

``python -m tools.gpu_check.prepare`` needs transformers and a processor; the files it writes, a few
megabytes, need neither. Without them the check makes them itself, if it can.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mqc.backends.cuda.launches import META, count_launches
from tools.gpu_check import ROOT, model

FOLDER = ROOT / "out" / "prepared"
ARTIFACT = "tiny-qwen2-vl"
ONNX_ARTIFACT = "tiny-qwen2-vl-onnx"


def prepare(folder: Path, sizes: model.Sizes, dtype: str, *, quick: bool = False) -> None:
    """Write both into ``folder``; ``quick`` rounds weights and calibrates on few rows."""
    import mqc

    file = model.prepare(folder, sizes, dtype)
    print(f"{file}: {file.stat().st_size / 1e3:.0f} kB", flush=True)
    for phase, kinds in count_launches(model.load(file, META)[0]).items():
        named = ", ".join(f"{name} {count}" for name, count in kinds.items())
        print(f"  launches, {phase}: {sum(kinds.values())} ({named})", flush=True)
    overrides = ["weights.method=rtn", "weights.clip=false"] if quick else []
    out, samples = folder / ARTIFACT, 8 if quick else 256
    report = mqc.compile(
        "tiny-qwen2-vl", target="cuda", overrides=overrides, samples=samples, out=out
    )
    print(f"{report.artifact}: {report.artifact_bytes / 1e6:.1f} MB", flush=True)


def prepare_onnx(folder: Path, *, quick: bool = False) -> None:
    """Write the ONNX files for the part "onnx-cuda" into ``folder``."""
    import mqc

    report = mqc.compile(
        "tiny-qwen2-vl",
        target="onnx",
        device="cuda",
        overrides=["weights.method=rtn", "weights.clip=false"] if quick else [],
        samples=8 if quick else 256,
        out=folder / ONNX_ARTIFACT,
    )
    print(f"{report.artifact}: {report.artifact_bytes / 1e6:.1f} MB", flush=True)


def prepared(folder: Path) -> tuple[Path, Path]:
    """Places of the large model's graphs and of the artifact, made where they are missing."""
    file, artifact = folder / model.PREPARED, folder / ARTIFACT
    if not (file.is_file() and (folder / model.AIFS).is_file() and artifact.is_dir()):
        prepare(folder, model.Sizes(), "bf16")
    return file, artifact


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check.prepare")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--tiny", action="store_true", help="sizes for a dry run")
    chosen = parser.parse_args()
    tiny = chosen.tiny
    prepare(chosen.out, model.TINY if tiny else model.Sizes(), "bf16", quick=tiny)
    prepare_onnx(chosen.out, quick=tiny)
