"""A model's ONNX files for the CUDA kernels: through the emulated binding, and in bodies."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

import onnx
import pytest
import torch
from cuda_cases import quantized
from cuda_emulator import compile_emulated
from onnx_cases import inputs_of, relative

import mqc
from mqc.artifact import ArtifactWriter
from mqc.backends.onnx import OnnxTarget, ops_library
from mqc.backends.onnx.library import attention_in_place, build_hint
from mqc.backends.onnx.session import OnnxEngine
from mqc.cuda.library import PATH_VARIABLE
from mqc.errors import UsageError
from mqc.ir import Program
from mqc.models import embedded_model_path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.gpu_check import onnx_cuda, parts, table
from tools.gpu_check.common import Recorder

LIBRARY = ops_library("cuda")
MODEL = "tiny-qwen2-vl"
SIZES = {"blocks": 1}


@pytest.fixture(scope="module")
def lowered() -> Program:
    program = OnnxTarget().for_device("cuda").lower(quantized(MODEL))
    assert program.facts["device"] == "cuda" and program.facts["cache"] == "buffer"
    return program


@pytest.fixture(scope="module")
def artifact(lowered: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prepared") / parts.ONNX_ARTIFACT
    with ArtifactWriter(path) as writer:
        OnnxTarget().emit(lowered, writer)
        writer.copy_model_files(embedded_model_path(MODEL))
        writer.describe(target="onnx", facts=lowered.facts)
    return path


def test_operators_are_those_with_kernels(artifact: Path) -> None:
    """All but the attention of the tower and the logits' rows."""
    found: Counter[str] = Counter()
    for name in ("vision", "embed", "decoder"):
        model = onnx.load(artifact / f"{name}.onnx", load_external_data=False)
        found.update(node.op_type for node in model.graph.node if node.domain == "ai.mqc")
    linears = [name for name in found if name.startswith("Linear")]
    assert linears and all("_s8" in name and "_group" not in name for name in linears)
    assert not [name for name in found if "_u8" in name]
    assert found["Attention_packed_half"] == 4


def test_devices() -> None:
    with pytest.raises(UsageError, match="target 'onnx' knows no device 'tpu'") as caught:
        mqc.compile(MODEL, target="onnx", device="tpu")
    assert caught.value.hint == "use cpu or cuda"
    with pytest.raises(UsageError, match="target 'cuda' has no devices to choose from"):
        mqc.compile(MODEL, target="cuda", device="cuda")


@pytest.mark.skipif(LIBRARY is None, reason=f"no operator library: {build_hint()}")
def test_binding_answers_as_the_bodies(
    artifact: Path, lowered: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder, its caches in place, and the tower. Emulated kernels register for the CPU."""
    monkeypatch.setenv("MQC_ONNX_OPS", "none")
    plain = OnnxEngine(artifact, lowered.facts, threads=1)
    plain.session("vision")
    monkeypatch.setenv("MQC_ONNX_OPS", str(LIBRARY))
    monkeypatch.setenv(PATH_VARIABLE, str(compile_emulated()))
    assert attention_in_place("cuda")
    ours = OnnxEngine(artifact, lowered.facts, threads=1)
    assert ours.chunk is not None  # in place
    pixels = inputs_of(lowered.components["vision"], **SIZES)
    assert relative(ours.vision(pixels), plain.vision(pixels)) <= 1e-2
    caches, past = [engine.empty_cache(2) for engine in (ours, plain)], 0
    generator = torch.Generator().manual_seed(0)
    hidden = lowered.components["decoder"].input("inputs_embeds").type.shape[-1]
    for tokens in (4, 1):
        steps = torch.arange(past, past + tokens)
        values = (
            torch.randn(2, tokens, hidden, generator=generator),
            steps.expand(3, 2, tokens),
            (torch.arange(past + tokens) <= steps[:, None]).expand(2, 1, tokens, past + tokens),
            torch.full((2, 1), tokens - 1),
            (steps < 3).expand(2, tokens),
        )
        (left, mine), (right, other) = (
            engine.decoder(*values, cache)
            for engine, cache in zip((ours, plain), caches, strict=True)
        )
        assert relative(left, right) <= 1e-2
        caches, past = [mine, other], past + tokens


def test_part_of_the_gpu_check(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its comparison in a dry run; without a GPU it is skipped, and says why."""
    recorder = Recorder(None, time.monotonic() + 100)
    parts.dry_run("onnx-cuda", artifact.parent, recorder)
    found = {str(item["name"]): item["value"] for item in recorder.results if "unit" in item}
    assert found["onnx cuda: same next token"] >= 97 and found["onnx cuda: decode"] > 0
    assert [item["wrong"] for item in recorder.results if "wrong" in item] == [""]
    skipped = Recorder(None, time.monotonic() + 100)
    monkeypatch.setattr(onnx_cuda, "missing", lambda artifact: "no GPU here")
    onnx_cuda.run(skipped, artifact, Path("libmqc_cuda.so"))
    part = {"state": "done", "seconds": 1.0, "results": skipped.results}
    report = {"device": "d", "torch": "t", "driver": "v", "parts": {"onnx-cuda": part}}
    assert "skipped: no GPU here" in table.render(report)


def test_what_the_part_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    assert "has no CUDAExecutionProvider" in str(onnx_cuda.missing(tmp_path))
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setenv("MQC_ONNX_CUDA_OPS", "none")
    assert "libmqc_onnx_cuda.so is not built" in str(onnx_cuda.missing(tmp_path))
    (tmp_path / "library.so").touch()
    monkeypatch.setenv("MQC_ONNX_CUDA_OPS", str(tmp_path / "library.so"))
    assert "gpu_check.prepare" in str(onnx_cuda.missing(tmp_path / "none"))
    assert onnx_cuda.missing(tmp_path) is None
