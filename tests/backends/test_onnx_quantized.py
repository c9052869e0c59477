"""Quantized programs as ONNX: integers bit by bit as the reference, logits within 1e-4."""

from __future__ import annotations

import itertools
from pathlib import Path

import onnx
import pytest
import torch
from onnx_cases import (
    LENGTHS,
    actual,
    expected,
    float_program,
    inputs_of,
    ops,
    quantize,
    relative,
    single_op,
    w8a8,
)
from onnx_cases import w4a8 as w4a8_rewrite

from mqc.backends.onnx.emit import emit
from mqc.backends.onnx.lower import lower
from mqc.ir import Program
from mqc.numerics.packing import pack_int4

FAMILY = "llava"


@pytest.fixture(scope="module", params=["mask", "count", None], ids=str)
def emitted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Program, Path]:
    """Decoder W4A8 by modality, vision W8A8."""
    program = quantize(float_program(FAMILY), "decoder", request.param, w4a8_rewrite)
    program = quantize(program, "vision", None, w8a8)
    folder = tmp_path_factory.mktemp("quantized")
    emit(program, folder)
    return program, folder


@pytest.mark.parametrize(("tokens", "past"), LENGTHS)
def test_decoder_equals_reference(emitted: tuple[Program, Path], tokens: int, past: int) -> None:
    program, folder = emitted
    inputs = inputs_of(program.components["decoder"], batch=2, tokens=tokens, past=past, rows=2)
    results = actual(folder / "decoder.onnx", inputs)
    for got, want in zip(results, expected(program, "decoder", inputs), strict=True):
        assert relative(got, want) <= 1e-4


@pytest.mark.parametrize("count", [1, 3])
def test_vision_equals_reference(emitted: tuple[Program, Path], count: int) -> None:
    program, folder = emitted
    inputs = inputs_of(program.components["vision"], images=count)
    (want,) = expected(program, "vision", inputs)
    assert relative(actual(folder / "vision.onnx", inputs)[0], want) <= 1e-4


def test_weights_stay_packed(emitted: tuple[Program, Path]) -> None:
    program, folder = emitted
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    packed = [i for i in model.graph.initializer if i.name.endswith(".q~1")]
    linears = program.components["decoder"].graph.find_nodes(
        op="call_function", target=ops.linear_w4a8.default
    )
    assert len(packed) == len(list(linears)) > 0
    assert {i.data_type for i in packed} == {onnx.TensorProto.UINT8}
    stored = sum(program.params[n].nbytes for n in program.components["decoder"].param_names())
    assert (folder / "decoder.onnx.data").stat().st_size < 1.1 * stored + 4096


def test_activations_are_unsigned(emitted: tuple[Program, Path]) -> None:
    _, folder = emitted
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    own = {node.op_type for node in model.graph.node if node.domain == "ai.mqc"}
    assert own == {function.name for function in model.functions}
    assert all("u8" in name.split("_") for name in own if name.startswith("QuantizeStatic"))
    assert not any("s8" in name.split("_") for name in own)


def test_files_pass_the_full_check(emitted: tuple[Program, Path]) -> None:
    _, folder = emitted
    for name in ("vision", "embed", "decoder"):
        onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=True)


def test_lowering_twice_changes_nothing(emitted: tuple[Program, Path]) -> None:
    program, _ = emitted
    once, counts = lower(program)
    assert counts["unsigned"] > 0
    twice, _ = lower(once)
    for component in once:
        again = twice.components[component.name]
        assert [str(n.target) for n in component.graph.nodes] == [
            str(n.target) for n in again.graph.nodes
        ]


# ---- one operator ------------------------------------------------------------------------------

_FORMS = list(itertools.product(["mask", "count", None], [False, True], [False, True]))


@pytest.mark.parametrize(("form", "bias", "group"), _FORMS)
def test_integer_products_are_exact(
    tmp_path: Path, form: str | None, bias: bool, group: bool
) -> None:
    """Scales that are powers of two leave nothing to rounding: every bit must be equal."""
    generator = torch.Generator().manual_seed(1)
    rows, columns = 5, 12
    weight = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    params = {
        "q": pack_int4(weight),
        "s": torch.full((rows, 3) if group else (rows,), 0.5),
        "a": torch.tensor([0.25, 2.0] if form else [0.25]),
        "b": torch.arange(float(rows)),
    }
    program = single_op(params, columns, rows, form, bias)
    emit(program, tmp_path)
    inputs = {"x": 40 * torch.randn(2, 7, columns, generator=generator)}
    if form == "mask":
        inputs["modality"] = torch.rand(2, 7, generator=generator) < 0.5
    elif form == "count":
        inputs["modality"] = torch.tensor([7, 3])
    assert (inputs["x"].abs() > 32).any()  # some values are clipped
    got, want = actual(tmp_path / "layer.onnx", inputs), expected(program, "layer", inputs)
    assert torch.equal(got[0], want[0])


def test_hadamard_factors_are_stored_once(tmp_path: Path) -> None:
    params = {"q": torch.ones(148, 74, dtype=torch.uint8), "s": torch.ones(148)}
    params |= {"a": torch.ones(1), "b": torch.ones(148)}
    program = single_op(params, 148, 148, None, False, hadamard=148)
    emit(program, tmp_path)
    model = onnx.load(tmp_path / "layer.onnx", load_external_data=False)
    square = [i for i in model.graph.initializer if list(i.dims) == [148, 148]]
    assert len(square) == 1
    assert square[0].data_location == onnx.TensorProto.EXTERNAL
    inputs = {"x": torch.randn(1, 3, 148)}
    got, want = actual(tmp_path / "layer.onnx", inputs), expected(program, "layer", inputs)
    assert relative(got[0], want[0]) <= 1e-2  # two roundings may tip
