"""Float programs as ONNX: the same results as torch, the same bytes on every run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import shared
import torch
from onnx_cases import LENGTHS, actual, expected, float_program, inputs_of, relative

from mqc.backends.onnx.emit import emit
from mqc.passes.aifs_reorder import AifsReorder
from mqc.passes.modality_split import ModalitySplit
from mqc.testing.families import BASIC
from mqc.transform import PassContext

FAMILY = "qwen2_vl"


@pytest.fixture(scope="module", params=sorted(BASIC))
def emitted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    emit(float_program(request.param), folder)
    return request.param, folder


@pytest.mark.parametrize(("tokens", "past"), LENGTHS)
def test_decoder_equals_torch(emitted: tuple[str, Path], tokens: int, past: int) -> None:
    family, folder = emitted
    program = float_program(family)
    inputs = inputs_of(program.components["decoder"], batch=2, tokens=tokens, past=past, rows=2)
    results = actual(folder / "decoder.onnx", inputs)
    for got, want in zip(results, expected(program, "decoder", inputs), strict=True):
        assert relative(got, want) <= 1e-5


@pytest.mark.parametrize("count", [1, 2, 7])
def test_vision_equals_torch(emitted: tuple[str, Path], count: int) -> None:
    family, folder = emitted
    program = float_program(family)
    inputs = inputs_of(program.components["vision"], blocks=count, images=count)
    (want,) = expected(program, "vision", inputs)
    assert relative(actual(folder / "vision.onnx", inputs)[0], want) <= 1e-5


def test_embeddings_equal_torch(emitted: tuple[str, Path]) -> None:
    family, folder = emitted
    program = float_program(family)
    inputs = inputs_of(program.components["embed"], batch=3, tokens=4)
    (want,) = expected(program, "embed", inputs)
    assert torch.equal(actual(folder / "embed.onnx", inputs)[0], want)


def test_rows_that_attend_to_themselves_alone_are_finite(emitted: tuple[str, Path]) -> None:
    family, folder = emitted
    program = float_program(family)
    inputs = inputs_of(program.components["decoder"], batch=2, tokens=4, past=3, rows=4)
    inputs["mask"][1] = torch.eye(4, 7).roll(3, 1).bool()  # a row of padding
    results = actual(folder / "decoder.onnx", inputs)
    for got, want in zip(results, expected(program, "decoder", inputs), strict=True):
        assert got.isfinite().all()
        assert relative(got, want) <= 1e-5


def test_files_hold_no_trace_of_their_making(emitted: tuple[str, Path]) -> None:
    _, folder = emitted
    for name in ("vision", "embed", "decoder"):
        model = onnx.load(folder / f"{name}.onnx", load_external_data=False)
        assert (model.producer_name, model.producer_version, model.doc_string) == ("mqc", "", "")
        assert not model.metadata_props
        assert not model.graph.value_info
        assert not any(n.doc_string or n.metadata_props for n in model.graph.node)
        text = (folder / f"{name}.onnx").read_bytes()
        assert str(Path.cwd()).encode() not in text
        assert b"/site-packages/" not in text


def test_axes_have_readable_names(emitted: tuple[str, Path]) -> None:
    _, folder = emitted
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    sizes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert sizes["mask"] == ["batch", 1, "tokens", "past + tokens"]
    assert sizes["past_key_0"] == ["batch", 2, "past", 12]
    assert sizes["present_value_1"] == ["batch", 2, "past + tokens", 12]
    assert sizes["logits"] == ["batch", "rows", 96]


def test_keys_and_values_are_not_repeated(emitted: tuple[str, Path]) -> None:
    _, folder = emitted
    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    assert not [n for n in graph.node if n.op_type in ("Tile", "IsNaN")]
    assert sum(n.op_type == "Expand" for n in graph.node) <= 2


def test_the_program_is_left_as_it_was(tmp_path: Path) -> None:
    program = float_program(FAMILY).copy()
    before = set(program.params)
    emit(program, tmp_path)
    assert set(program.params) == before


def test_half_types_are_widened(tmp_path: Path) -> None:
    program = float_program(FAMILY).to(torch.bfloat16)
    wide = program.to(torch.float32)
    del wide.components["vision"], wide.components["decoder"]
    emit(wide, tmp_path)
    inputs = inputs_of(program.components["embed"], batch=1, tokens=5)
    (want,) = expected(program, "embed", inputs)
    assert torch.equal(actual(tmp_path / "embed.onnx", inputs)[0], want.float())


@pytest.mark.parametrize("family", sorted(BASIC))
def test_reordered_decoder_equals_torch(family: str, tmp_path: Path) -> None:
    program = float_program(family).copy()
    for item in (ModalitySplit(), AifsReorder()):
        program = item.run(program, PassContext()).program
    assert program.facts["kv_order"] == "aifs"
    emit(program, tmp_path)
    for tokens, past in LENGTHS:
        sizes = {"batch": 2, "tokens": tokens, "past": past, "rows": 2}
        inputs = inputs_of(program.components["decoder"], **sizes)
        visual = torch.rand(2, tokens, generator=torch.Generator().manual_seed(9)) < 0.5
        inputs["modality"] = visual
        results = actual(tmp_path / "decoder.onnx", inputs)
        for got, want in zip(results, expected(program, "decoder", inputs), strict=True):
            assert relative(got, want) <= 1e-5


def test_progress_rises_to_one(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    program = float_program(FAMILY).copy()
    del program.components["decoder"], program.components["vision"]
    emit(program, tmp_path, lambda what, part: seen.append((what, part)))
    assert [part for _, part in seen] == sorted(part for _, part in seen)
    assert seen[0] == ("embed: graph", 0.0)
    assert seen[-1] == ("done", 1.0)


_EMIT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from onnx_cases import float_program, quantize
from mqc.backends.onnx.emit import emit
emit(quantize(float_program({family!r})), Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    code = _EMIT.format(tests=str(Path(__file__).parents[1]), family=FAMILY)
    sums = []
    own = {key: value for key, value in os.environ.items() if key != shared.VARIABLE}  # captures
    for seed in ("1", "77"):
        folder = tmp_path / seed / "a"
        folder.mkdir(parents=True)
        subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            check=True,
            cwd=folder,
            env={**own, "PYTHONHASHSEED": seed},
        )
        files = sorted(folder.iterdir())
        sums.append([(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files])
    assert len(sums[0]) == 6
    assert sums[0] == sums[1]
