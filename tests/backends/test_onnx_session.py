"""The onnx target as a whole: artifact, engine, errors, and a run without mqc."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from onnx_cases import expected, float_program, inputs_of, quantize, relative

from mqc.artifact import ArtifactWriter
from mqc.backends.onnx import OnnxTarget, ops_library
from mqc.backends.onnx import library as library_module
from mqc.backends.onnx import target as target_module
from mqc.backends.onnx.emit import emit
from mqc.backends.onnx.session import OnnxEngine, open_session
from mqc.backends.registry import load_artifact
from mqc.errors import ArtifactError, TargetError
from mqc.host import ProgramEngine, Runnable, decode_step, prefill
from mqc.ir import Program
from mqc.models import embedded_model_path

FAMILY = "internvl"
MODEL = "tiny-qwen2-vl"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    """A quantized program, emitted."""
    program = quantize(float_program(FAMILY))
    folder = tmp_path_factory.mktemp("files")
    emit(program, folder)
    return program, folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float embedded model as an artifact."""
    path, target, program = tmp_path_factory.mktemp("out") / "a", OnnxTarget(), tiny.program(MODEL)
    with ArtifactWriter(path) as writer:
        target.emit(target.lower(program), writer)
        writer.copy_model_files(embedded_model_path(MODEL))
        writer.describe(target="onnx", facts=program.facts)
    return path


def test_artifact_answers_like_the_program(artifact: Path) -> None:
    assert {f.name for f in artifact.glob("*.onnx")} == {
        "vision.onnx",
        "embed.onnx",
        "decoder.onnx",
    }
    loaded, plain = load_artifact(artifact), tiny.runnable(MODEL)
    assert isinstance(loaded, Runnable)
    prompts = [plain.prompt(messages) for messages in tiny.conversations().values()]
    states = [prefill(run.engine, prompts, 9) for run in (loaded, plain)]
    for _ in range(3):
        found, wanted = states
        assert relative(found.logits, wanted.logits) <= 1e-5
        tokens = wanted.logits.argmax(-1)
        states = [
            decode_step(run.engine, state, tokens)
            for run, state in zip((loaded, plain), states, strict=True)
        ]


def test_engine_equals_reference(files: tuple[Program, Path]) -> None:
    program, folder = files
    engine, oracle = OnnxEngine(folder, {"a": 1}, threads=1), ProgramEngine(program)
    assert engine.facts == {"a": 1}
    caches = [e.empty_cache(2) for e in (engine, oracle)]
    past = 0
    for tokens in (6, 1, 1):
        sizes = {"batch": 2, "tokens": tokens, "past": past, "rows": 1}
        inputs = inputs_of(program.components["decoder"], **sizes)
        names = ("inputs_embeds", "position_ids", "mask", "logit_index", "modality")
        values = [inputs[name] for name in names]
        results = [
            e.decoder(*values, cache) for e, cache in zip((engine, oracle), caches, strict=True)
        ]
        (got, cache), (want, other) = results
        assert relative(got, want) <= 1e-4
        caches, past = [cache, other], past + tokens
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(engine.embed(ids), oracle.embed(ids))
    pixels = inputs_of(program.components["vision"], images=2)
    assert relative(engine.vision(pixels), oracle.vision(pixels)) <= 1e-5


def test_engine_takes_other_layouts_and_types(files: tuple[Program, Path]) -> None:
    program, folder = files
    engine = OnnxEngine(folder, {}, threads=1)
    ids = torch.tensor([[1, 2], [3, 4], [5, 6]])
    assert torch.equal(engine.embed(ids.t()), engine.embed(ids.t().contiguous()))
    assert torch.equal(engine.embed(ids.int()), engine.embed(ids))
    pixels = inputs_of(program.components["vision"], images=1)["pixel_values"]
    half = engine.vision({"pixel_values": pixels.bfloat16()})
    assert torch.equal(half, engine.vision({"pixel_values": pixels.bfloat16().float()}))


_ALONE = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mqc", "torch", "transformers", "onnx", "onnxscript"):
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Block())
import numpy as np
import onnxruntime as ort

folder = sys.argv[1]
sessions = {n: ort.InferenceSession(f"{folder}/{n}.onnx", providers=["CPUExecutionProvider"])
            for n in ("vision", "embed", "decoder")}
results = {}
for name, session in sessions.items():
    given = np.load(f"{folder}/{name}.inputs.npz")
    outputs = session.run(None, {key: given[key] for key in given.files})
    for port, value in zip(session.get_outputs(), outputs):
        results[f"{name}.{port.name}"] = value
assert not {"mqc", "torch", "onnx"} & set(sys.modules)
np.savez(f"{folder}/results.npz", **results)
"""


def test_a_stock_onnxruntime_runs_the_files(files: tuple[Program, Path], tmp_path: Path) -> None:
    """Only onnxruntime and numpy can be imported there."""
    program, folder = files
    for file in folder.glob("*.onnx*"):
        shutil.copy(file, tmp_path)
    wanted = {}
    sizes = {"batch": 2, "tokens": 4, "past": 3, "rows": 2, "images": 2}
    for component in program:
        inputs = inputs_of(component, **sizes)
        np.savez(
            tmp_path / f"{component.name}.inputs.npz", **{k: v.numpy() for k, v in inputs.items()}
        )
        results = expected(program, component.name, inputs)
        for port, value in zip(component.outputs, results, strict=True):
            wanted[f"{component.name}.{port.name}"] = value
    subprocess.run([sys.executable, "-I", "-c", _ALONE, str(tmp_path)], check=True)
    found = np.load(tmp_path / "results.npz")
    assert set(found.files) == set(wanted)
    for name, value in wanted.items():
        assert relative(torch.from_numpy(found[name]), value) <= 1e-4


# ---- errors ------------------------------------------------------------------------------------


@pytest.fixture
def damaged(files: tuple[Program, Path], tmp_path: Path) -> Path:
    for file in files[1].glob("*.onnx*"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_missing_file(damaged: Path) -> None:
    (damaged / "embed.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"embed\.onnx is missing") as caught:
        OnnxEngine(damaged, {}, threads=1)
    assert "compile" in str(caught.value.hint)


@pytest.mark.parametrize("content", [b"", b"not a model", None])
def test_damaged_graph(damaged: Path, content: bytes | None) -> None:
    path = damaged / "decoder.onnx"
    path.write_bytes(path.read_bytes()[:-900] if content is None else content)
    with pytest.raises(ArtifactError, match=r"cannot open .*decoder\.onnx"):
        OnnxEngine(damaged, {}, threads=1)


@pytest.mark.parametrize("size", [None, 100])
def test_damaged_weights(damaged: Path, size: int | None) -> None:
    path = damaged / "decoder.onnx.data"
    if size is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArtifactError, match=r"cannot open .*decoder\.onnx"):
        OnnxEngine(damaged, {}, threads=1)


def test_unknown_layout_of_weights(files: tuple[Program, Path]) -> None:
    """Named by the facts; a file of an operator type that nobody knows is refused as well."""
    assert OnnxEngine(files[1], {"weight_layout": "c16k4"}, threads=1).facts
    with pytest.raises(ArtifactError, match=r"layout 'c32k8', which this version .* 'c16k4'") as e:
        OnnxEngine(files[1], {"weight_layout": "c32k8"}, threads=1)
    assert "compile the model again" in str(e.value.hint)


def test_provider(files: tuple[Program, Path]) -> None:
    with pytest.raises(TargetError, match="unknown onnxruntime provider 'tpu'"):
        OnnxEngine(files[1], {}, provider="tpu")
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(TargetError, match="no CUDAExecutionProvider") as caught:
            OnnxEngine(files[1], {}, provider="cuda")
        assert caught.value.hint == "pip install mqc[gpu] in place of mqc[cpu]"


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize("library", ["none", "own"])
def test_provider_that_does_not_start(
    files: tuple[Program, Path], library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime goes on with the CPU then, or finds no kernel for the library's operators."""
    import onnxruntime as ort

    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("it would start")
    names = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: names)
    monkeypatch.setenv("MQC_ONNX_CUDA_OPS", "none")

    def no_kernel(*args: object, **more: object) -> None:
        raise RuntimeError("Could not find an implementation for LinearW4A8_s8(1)")

    if library == "own":
        monkeypatch.setattr(ort, "InferenceSession", no_kernel)
    with pytest.raises(TargetError, match="cannot start its CUDAExecutionProvider") as caught:
        open_session(files[1] / "embed.onnx", "cuda")
    assert "nvidia-smi" in str(caught.value.hint)


def test_without_onnxruntime(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "_installed", lambda name: name != "onnxruntime")
    with pytest.raises(TargetError, match="onnxruntime, which is not installed") as caught:
        OnnxTarget().load(artifact)
    assert caught.value.hint == "pip install mqc[cpu]"
    assert OnnxTarget().available() is None


def test_without_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_module, "_installed", lambda name: False)
    assert "pip install onnx onnxscript" in str(OnnxTarget().available())


def test_operator_library(
    files: tuple[Program, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MQC_ONNX_OPS", raising=False)
    monkeypatch.setattr(library_module, "LIBRARY", tmp_path / "own.so")
    assert ops_library() is None
    with pytest.raises(TargetError, match="the operator library is not there") as caught:
        library_module.onnx_ops_library()
    assert "make native" in str(caught.value.hint)
    (tmp_path / "own.so").touch()
    assert library_module.onnx_ops_library() == str(tmp_path / "own.so")
    monkeypatch.setenv("MQC_ONNX_OPS", "none")
    assert ops_library() is None
    monkeypatch.setenv("MQC_ONNX_OPS", str(tmp_path / "none.so"))
    with pytest.raises(TargetError, match=r"none\.so named by MQC_ONNX_OPS does not exist"):
        open_session(files[1] / "embed.onnx")
    (tmp_path / "none.so").write_bytes(b"not a library")
    assert ops_library() == tmp_path / "none.so"
    with pytest.raises(TargetError, match=r"none\.so"):
        open_session(files[1] / "embed.onnx")


def test_manifest_facts_reach_the_engine(artifact: Path) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert load_artifact(artifact).engine.facts == manifest["facts"]
