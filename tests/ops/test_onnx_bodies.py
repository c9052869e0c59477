"""Every variant of the linears' bodies, run as a bare node in stock onnxruntime."""

import itertools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

import mqc.ops
from mqc.numerics.packing import pack_c16k4, pack_int4
from mqc.ops.onnx_functions import attach_functions, variant_inputs

N = 6
ACTIVATIONS = {"x", "xq", "modality", "x_split"}


def variants(op: str) -> list[str]:
    """All op types of a linear: each choice of optional inputs and forms, in canonical order."""
    integer, packed = op.endswith("A8"), "W4" in op
    choices = [
        ["", "mask", "count"] if integer else [""],
        ["", "bias"],
        ["", "split"],
        ["", "group"],
        ["", "odd"] if packed else [""],
        ["", "s8"] if integer else [""],
        ["", "c16k4"],
    ]
    kinds = [flags for flags in itertools.product(*choices) if not {"odd", "c16k4"} <= set(flags)]
    return ["_".join([op, *filter(None, flags)]) for flags in kinds]


def arguments(op_type: str, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Values of every argument a variant has; scales are powers of two."""
    op, *flags = op_type.split("_")
    k = 15 if "odd" in flags else 24 if "c16k4" in flags else 12
    bits = 4 if "W4" in op else 8
    q = torch.randint(-8, 8, (N, k)) if bits == 4 else torch.randint(-127, 128, (N, k))
    q = q.to(torch.int8)
    groups = (N, 3) if "group" in flags else (N,)
    x = torch.randint(-127, 128, (batch, length, k))
    modal = "mask" in flags or "count" in flags
    stored = pack_int4(q) if bits == 4 else q
    if "c16k4" in flags:
        stored = pack_c16k4(q, 3 if "group" in flags else 1, bits)
    values = {
        "qweight": stored,
        "w_scale": torch.exp2(torch.randint(-3, 3, groups).float()),
    }
    if op.endswith("A8"):
        values["xq"] = x.to(torch.int8) if "s8" in flags else (x + 128).to(torch.uint8)
        values["x_scale"] = torch.tensor([0.5, 0.125] if modal else [0.25])
    else:
        values["x"] = x.float()
    if "mask" in flags:
        values["modality"] = torch.randint(0, 2, (batch, length)).bool()
    if "count" in flags:
        values["modality"] = torch.randint(0, length + 1, (batch,))
    if "bias" in flags:
        values["bias"] = torch.randint(-9, 9, (N,)).float()
    if "split" in flags:
        values["x_split"] = torch.randint(-9, 9, (batch, length, 2)).float()
        values["w_split"] = torch.randint(-9, 9, (N, 2)).float()
    return values


def node_model(op_type: str, values: dict[str, torch.Tensor]) -> onnx.ModelProto:
    """One node of a variant with dynamic rows; weights and scales are initializers."""
    names = variant_inputs(op_type)
    inputs = []
    for name in names:
        if name in ACTIVATIONS:
            value = values[name].numpy()
            shape = ["B", "S", *value.shape[2:]][: value.ndim]
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            inputs.append(helper.make_tensor_value_info(name, kind, shape))
    graph = helper.make_graph(
        [helper.make_node(op_type, names, ["y"], domain="ai.mqc")],
        "node",
        inputs,
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["B", "S", N])],
        [numpy_helper.from_array(values[n].numpy(), n) for n in names if n not in ACTIVATIONS],
    )
    model = helper.make_model(graph, opset_imports=[], ir_version=10)
    attach_functions(model)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("op", ["LinearW4A8", "LinearW8A8", "LinearW4A16", "LinearW8A16"])
def test_all_variants_are_bit_equal_to_the_reference(op: str) -> None:
    torch.manual_seed(0)
    definition = next(d for d in mqc.ops.OPS.values() if d.onnx.name == op)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    for op_type in variants(op):
        values = arguments(op_type, 2, 3)
        model = node_model(op_type, values)
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        for batch, length in ((2, 3), (1, 1)):
            if (batch, length) != (2, 3):
                fresh = arguments(op_type, batch, length)
                values |= {name: fresh[name] for name in ACTIVATIONS & set(fresh)}
            want = definition.overload(*(values.get(name) for name in definition.arguments))
            feed = {n: values[n].numpy() for n in variant_inputs(op_type) if n in ACTIVATIONS}
            got = session.run(None, feed)[0]
            assert np.array_equal(got, want.numpy()), op_type


def test_bodies_do_not_need_optimizations() -> None:
    """With onnxruntime's optimizer off, the same values come out."""
    torch.manual_seed(0)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    for op_type in (
        "LinearW4A8_count_bias_split_odd_s8",
        "LinearW4A8_mask_group",
        "LinearW4A8_bias_c16k4",
    ):
        values = arguments(op_type, 2, 3)
        session = ort.InferenceSession(
            node_model(op_type, values).SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
        )
        order = mqc.ops.OPS["linear_w4a8"].arguments
        want = torch.ops.mqc.linear_w4a8(*(values.get(name) for name in order))
        feed = {n: values[n].numpy() for n in variant_inputs(op_type) if n in ACTIVATIONS}
        assert np.array_equal(session.run(None, feed)[0], want.numpy())
