"""Quantized programs as ONNX: integers bit by bit as the reference, logits within 1e-4."""

from __future__ import annotations

import itertools
from pathlib import Path

import onnx
import onnxruntime as ort
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
from mqc.ir import Port, Program
from mqc.ir.edit import tensor_type
from mqc.numerics.packing import pack_int4

FAMILY = "llava"


@pytest.fixture(scope="module", params=["mask", "count", None], ids=str)
def emitted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Program, Path]:
    """Decoder W4A8 by modality, vision W8A8; quantized activations are outputs too."""
    program = quantize(float_program(FAMILY), "decoder", request.param, w4a8_rewrite)
    program = with_probes(quantize(program, "vision", None, w8a8))
    folder = tmp_path_factory.mktemp("quantized")
    emit(program, folder)
    return program, folder


def with_probes(program: Program) -> Program:
    """Every quantized activation becomes an output."""
    for component in program:
        values = list(component.output_node.args[0])  # type: ignore[arg-type]
        for node in component.graph.find_nodes(
            op="call_function", target=ops.quantize_static.default
        ):
            values.append(node)
            kind = tensor_type(node)
            component.outputs.append(Port(node.name, kind, (None,) * kind.rank))
        component.output_node.args = (tuple(values),)
    return program


def compare(program: Program, name: str, folder: Path, inputs: dict[str, torch.Tensor]) -> None:
    """Integers are equal and floats are within 1e-4, unless a rounding tips.

    Float operators sum in another order than torch's, so once in a great while a value falls on
    the other side of a rounding; what follows differs by what one step of int8 makes.
    """
    got = actual(folder / f"{name}.onnx", inputs)
    pairs = list(
        zip(program.components[name].outputs, got, expected(program, name, inputs), strict=True)
    )
    tipped = False
    for port, found, want in pairs:
        if want.dtype == torch.int8 and not tipped:
            distance = (found.int() - 128 - want.int()).abs()
            tipped = bool(distance.any())
            assert distance.max() <= 1, port.name
            assert distance.bool().float().mean() <= 2e-3, port.name
    for port, found, want in pairs:
        if want.dtype != torch.int8:
            assert relative(found, want) <= (0.1 if tipped else 1e-4), port.name


@pytest.mark.parametrize(("tokens", "past"), LENGTHS)
def test_decoder_equals_reference(emitted: tuple[Program, Path], tokens: int, past: int) -> None:
    program, folder = emitted
    sizes = {"batch": 2, "tokens": tokens, "past": past, "rows": 2}
    compare(program, "decoder", folder, inputs_of(program.components["decoder"], **sizes))


@pytest.mark.parametrize("count", [1, 3])
def test_vision_equals_reference(emitted: tuple[Program, Path], count: int) -> None:
    program, folder = emitted
    compare(program, "vision", folder, inputs_of(program.components["vision"], images=count))


@pytest.mark.parametrize("name", ["vision", "decoder"])
def test_onnxruntime_computes_every_product_in_integers(
    emitted: tuple[Program, Path], name: str, tmp_path: Path
) -> None:
    """A pattern that it does not fuse would dequantize both sides and multiply floats."""
    program, folder = emitted
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
    model = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    found = [node.op_type for node in model.graph.node]
    graph = program.components[name].graph
    linears = [n for n in graph.nodes if str(n.target).startswith("mqc.linear_w")]
    assert found.count("MatMulIntegerToFloat") == len(linears) > 0
    assert not {"DequantizeLinear", "MatMulInteger"} & set(found)
    assert found.count("Range") <= 1  # the mask made of a count, once


def test_weights_stay_packed(emitted: tuple[Program, Path]) -> None:
    program, folder = emitted
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    # 148 inputs of a layer do not fit the kernels' layout.
    packed = [i for i in model.graph.initializer if i.name.endswith((".q~1", ".q~1.c16k4"))]
    assert {len(i.dims) for i in packed} == {2, 5}
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
    assert not any({"s8", "count"} & set(name.split("_")) for name in own)


def test_files_pass_the_full_check(emitted: tuple[Program, Path]) -> None:
    _, folder = emitted
    for name in ("vision", "embed", "decoder"):
        onnx.checker.check_model(str(folder / f"{name}.onnx"), full_check=True)


def test_lowering_twice_changes_nothing(emitted: tuple[Program, Path]) -> None:
    program, _ = emitted
    once, counts = lower(program)
    assert counts["unsigned"] > 0 and counts["packed"] > 0
    twice, again_counts = lower(once)
    assert again_counts["packed"] == 0
    assert once.facts["weight_layout"] == twice.facts["weight_layout"] == "c16k4"
    assert "weight_layout" not in program.facts
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


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("columns", [24, 15])
def test_weight_only_products(tmp_path: Path, columns: int, group: bool) -> None:
    """In the kernels' layout where it fits, else as packed; whole numbers stay exact."""
    generator = torch.Generator().manual_seed(1)
    rows = 5
    weight = torch.randint(-8, 8, (rows, columns), generator=generator, dtype=torch.int8)
    params = {
        "q": pack_int4(weight),
        "s": torch.full((rows, 3) if group else (rows,), 0.5),
        "b": torch.arange(float(rows)),
    }
    program = single_op(params, columns, rows, None, True, floats=True)
    fits = columns == 24
    assert lower(program)[1]["packed"] == fits
    emit(program, tmp_path)
    model = onnx.load(tmp_path / "layer.onnx", load_external_data=False)
    flags = ["bias", *["group"] * group, "c16k4" if fits else "odd"]
    assert "_".join(["LinearW4A16", *flags]) in {node.op_type for node in model.graph.node}
    inputs = {"x": torch.randint(-50, 50, (2, 7, columns), generator=generator).float()}
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
