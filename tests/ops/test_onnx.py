"""Every ONNX variant: torch.export, torch.onnx.export, function bodies, stock onnxruntime."""

import itertools
import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch.export import Dim

import mqc.ops  # noqa: F401
from mqc.errors import TargetError
from mqc.numerics.packing import pack_int4
from mqc.ops.onnx_functions import (
    attach_functions,
    function_proto,
    function_protos,
    translation_table,
    variant_inputs,
)

OPS = torch.ops.mqc
SHAPES = [(1, 1), (2, 5), (1, 17)]


class Call(torch.nn.Module):
    """A call of one operator: tensors in `state` are buffers, None stays, the rest is input."""

    def __init__(self, op: object, order: list[str], state: dict[str, object]) -> None:
        super().__init__()
        self.op, self.order, self.plain = op, order, {}
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                self.register_buffer(name, value)
            else:
                self.plain[name] = value

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        known = {**dict(self.named_buffers()), **self.plain, **inputs}
        return self.op(*[known[name] for name in self.order])


def export(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> onnx.ModelProto:
    batch, length = Dim("B", min=1, max=64), Dim("S", min=1, max=4096)
    dynamic = {
        name: {0: batch} | ({1: length} if value.dim() > 1 else {})
        for name, value in inputs.items()
    }
    exported = torch.export.export(module, (inputs,), dynamic_shapes=(dynamic,))
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    program = torch.onnx.export(
        exported,
        dynamo=True,
        opset_version=21,
        verbose=False,
        custom_translation_table=translation_table(),
    )
    model = program.model_proto
    attach_functions(model)
    onnx.checker.check_model(model, full_check=True)
    return model


def session(model: onnx.ModelProto, optimized: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.log_severity_level = 3
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(model: ort.InferenceSession, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    names = [value.name for value in model.get_inputs()]
    assert len(names) == len(inputs)
    feed = dict(zip(names, (v.numpy() for v in inputs.values()), strict=True))
    return model.run(None, feed)[0]


def modality_of(form: str | None, batch: int, length: int) -> dict[str, torch.Tensor]:
    if form == "mask":
        return {"modality": torch.randint(0, 2, (batch, length)).bool()}
    if form == "count":
        return {"modality": torch.randint(0, length + 1, (batch,))}
    return {}


def domain_ops(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.domain == "ai.mqc"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


A8_VARIANTS = [
    (bits, form, bias, split, groups, k, signed)
    for bits, (form, bias, split, groups, k, signed) in itertools.product(
        (4, 8),
        [
            (None, True, True, None, 24, False),
            (None, False, False, None, 23, True),
            (None, True, False, 3, 24, False),
            ("mask", True, False, 2, 24, True),
            ("count", True, True, None, 23, False),
            ("count", False, False, None, 24, True),
        ],
    )
]


@pytest.mark.parametrize(("bits", "form", "bias", "split", "groups", "k", "signed"), A8_VARIANTS)
def test_linear_a8(
    bits: int,
    form: str | None,
    bias: bool,
    split: bool,
    groups: int | None,
    k: int,
    signed: bool,
    tmp_path: Path,
) -> None:
    n = 10
    op = OPS.linear_w4a8 if bits == 4 else OPS.linear_w8a8
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    if bits == 8:
        q = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    state: dict[str, object] = {
        "qweight": pack_int4(q) if bits == 4 else q,
        # powers of two: every scaled sum is exact, so results must be bit-equal
        "w_scale": torch.exp2(torch.randint(-3, 3, (n, groups) if groups else (n,)).float()),
        "x_scale": torch.tensor([0.5, 0.25] if form else [0.125]),
        "bias": torch.randn(n) if bias else None,
        "w_split": torch.randn(n, 1) if split else None,
    }
    if not split:
        state["x_split"] = None
    if form is None:
        state["modality"] = None
    order = ["xq", "qweight", "w_scale", "x_scale", "modality", "bias", "x_split", "w_split"]
    module = Call(op, order, state)

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        low, dtype = (-127, torch.int8) if signed else (1, torch.uint8)
        xq = torch.randint(low, low + 255, (batch, length, k)).to(dtype)
        xq[0, 0] = low
        split_input = {"x_split": torch.randn(batch, length, 1)} if split else {}
        return {"xq": xq, **modality_of(form, batch, length), **split_input}

    model = export(module, inputs(2, 3))
    flags = [form, "bias" * bias, "split" * split, "group" * bool(groups)]
    flags += ["odd" * (k % 2 and bits == 4), "s8" * signed]
    name = "_".join([f"LinearW{bits}A8", *[flag for flag in flags if flag]])
    assert domain_ops(model) == [name]
    assert [f.name for f in function_protos(model)] == [name]
    optimized = tmp_path / "optimized.onnx"
    stock = session(model, optimized)
    left = [node.op_type for node in onnx.load(optimized).graph.node]
    assert not {"BitwiseAnd", "BitShift", "BitwiseXor", "DequantizeLinear"} & set(left)
    assert ("MatMulInteger" if groups else "MatMulIntegerToFloat") in left
    for shape in SHAPES:
        example = inputs(*shape)
        want, got = module(example).numpy(), run(stock, example)
        assert got.dtype == want.dtype and got.shape == want.shape
        if bias or split:
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
        else:
            assert np.array_equal(got, want)


@pytest.mark.parametrize("form", [None, "mask", "count"])
@pytest.mark.parametrize("unsigned", [False, True])
def test_quantize_static_is_bit_equal(form: str | None, unsigned: bool) -> None:
    scale = torch.tensor([0.037, 0.0113] if form else [0.037])
    state: dict[str, object] = {"scale": scale, "unsigned": unsigned}
    if form is None:
        state["modality"] = None
    module = Call(OPS.quantize_static, ["x", "scale", "modality", "unsigned"], state)

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        x = torch.randn(batch, length, 64) * 2
        x[0, 0, :8] = torch.tensor([0.5, 1.5, -2.5, 126.5, 1e9, -1e9, 127.5, -128.0]) * 0.037
        return {"x": x, **modality_of(form, batch, length)}

    model = export(module, inputs(2, 3))
    flags = [flag for flag in (form, "u8" * unsigned) if flag]
    assert domain_ops(model) == ["_".join(["QuantizeStatic", *flags])]
    stock = session(model)
    for shape in [*SHAPES, (4, 500)]:
        example = inputs(*shape)
        want = module(example).numpy()
        got = run(stock, example)
        assert got.dtype == want.dtype and np.array_equal(got, want)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("bias", "split", "groups", "k"),
    [(False, False, None, 24), (True, True, None, 23), (True, False, 4, 24), (False, True, 3, 24)],
)
def test_linear_a16(
    bits: int, bias: bool, split: bool, groups: int | None, k: int, tmp_path: Path
) -> None:
    n = 10
    q = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    state: dict[str, object] = {
        "qweight": pack_int4(q) if bits == 4 else q,
        "w_scale": torch.rand((n, groups) if groups else (n,)) + 0.1,
        "bias": torch.randn(n) if bias else None,
        "w_split": torch.randn(n, 2) if split else None,
    }
    if not split:
        state["x_split"] = None
    op = OPS.linear_w4a16 if bits == 4 else OPS.linear_w8a16
    module = Call(op, ["x", "qweight", "w_scale", "bias", "x_split", "w_split"], state)

    def inputs(batch: int, length: int) -> dict[str, torch.Tensor]:
        extra = {"x_split": torch.randn(batch, length, 2)} if split else {}
        return {"x": torch.randn(batch, length, k), **extra}

    model = export(module, inputs(2, 3))
    optimized = tmp_path / "optimized.onnx"
    stock = session(model, optimized)
    left = {node.op_type for node in onnx.load(optimized).graph.node}
    assert not left & {"BitShift", "Cast", "Mul", "Transpose"}
    for shape in SHAPES:
        example = inputs(*shape)
        np.testing.assert_allclose(
            run(stock, example), module(example).numpy(), rtol=1e-5, atol=1e-4
        )


@pytest.mark.parametrize(
    ("n", "block", "factors"),
    [
        (24, 1, 0),
        (24, 12, 1),
        (24, 8, 1),
        (48, 24, 2),
        (592, 592, 2),
        (3072, 3072, 3),
        (512, 512, 2),
    ],
)
def test_hadamard(n: int, block: int, factors: int) -> None:
    module = Call(OPS.hadamard, ["x", "block"], {"block": block})
    model = export(module, {"x": torch.randn(2, 3, n)})
    assert domain_ops(model) == [f"Hadamard_f{factors}"]
    node = next(node for node in model.graph.node if node.domain == "ai.mqc")
    assert [(a.name, a.i) for a in node.attribute] == [("block", block)]
    stock = session(model)
    for batch, length in SHAPES:
        x = torch.randn(batch, length, n)
        want, got = module({"x": x}).numpy(), run(stock, {"x": x})
        assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


def test_rank_update_and_embedding() -> None:
    module = Call(OPS.rank_update, ["y", "x_split", "w_split"], {"w_split": torch.randn(7, 2)})
    example = {"y": torch.randn(2, 3, 7), "x_split": torch.randn(2, 3, 2)}
    got = run(session(export(module, example)), example)
    np.testing.assert_allclose(got, module(example).numpy(), rtol=1e-5, atol=1e-6)
    table = {
        "qweight": torch.randint(-127, 128, (50, 6), dtype=torch.int8),
        "scale": torch.rand(50),
    }
    module = Call(OPS.embedding_w8, ["ids", "qweight", "scale"], dict(table))
    ids = {"ids": torch.randint(0, 50, (2, 3))}
    assert np.array_equal(run(session(export(module, ids)), ids), module(ids).numpy())


@pytest.mark.parametrize("form", [None, "count"])
def test_a_chain_of_operators(form: str | None) -> None:
    """Quantize, two linears of one variant, Hadamard: one body a variant, shared constants."""

    class Chain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in (1, 2):
                q = torch.randint(-8, 8, (24, 24), dtype=torch.int8)
                self.register_buffer(f"q{i}", pack_int4(q))
            self.register_buffer("ws", torch.rand(24) * 0.01)
            self.register_buffer("xs", torch.tensor([0.02, 0.03] if form else [0.02]))

        def forward(self, x: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
            modality = count if form else None
            for weight in (self.q1, self.q2):
                h = OPS.hadamard(x, 24)
                xq = OPS.quantize_static(h, self.xs, modality, True)
                x = x + OPS.linear_w4a8(xq, weight, self.ws, self.xs, modality, None, None, None)
            return x

    module, s = Chain(), Dim("s", min=1, max=64)
    args = (torch.randn(2, 4, 24), torch.tensor([1, 3]))
    exported = torch.export.export(module, args, dynamic_shapes=({1: s}, None))
    program = torch.onnx.export(
        exported, dynamo=True, opset_version=21, custom_translation_table=translation_table()
    )
    model = program.model_proto
    attach_functions(model)
    attach_functions(model)  # a second time changes nothing
    onnx.checker.check_model(model, full_check=True)
    assert sorted(f.name for f in model.functions) == [
        "Hadamard_f2",
        *(["LinearW4A8_count", "QuantizeStatic_count_u8"] if form else []),
        *([] if form else ["LinearW4A8", "QuantizeStatic_u8"]),
    ]
    for length in (1, 4, 9):
        x, count = torch.randn(2, length, 24), torch.tensor([0, length])
        x[0] *= 20  # saturates
        got = run(session(model), {"x": x, "count": count})
        np.testing.assert_allclose(got, module(x, count).numpy(), rtol=1e-4, atol=1e-4)


def test_names_and_errors() -> None:
    assert variant_inputs("LinearW4A8_count_bias_split") == (
        *("xq", "qweight", "w_scale", "x_scale", "modality", "bias", "x_split", "w_split"),
    )
    assert function_proto("RankUpdate").domain == "ai.mqc"
    with pytest.raises(TargetError, match="ai.mqc::Convolution_bias"):
        function_proto("Convolution_bias")
    module = Call(OPS.hadamard, ["x", "block"], {"block": 8})
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        export(module, {"x": torch.randn(2, 3, 8, dtype=torch.float64)})
    cause: BaseException | None = caught.value
    while cause is not None and not isinstance(cause, TargetError):
        cause = cause.__cause__
    assert cause is not None and "x is DOUBLE" in str(cause)
