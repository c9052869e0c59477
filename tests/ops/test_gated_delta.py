"""mqc::gated_delta against transformers' recurrence, and its ONNX body against itself."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from transformers.models.qwen3_5 import modeling_qwen3_5

import mqc.ops  # noqa: F401
from mqc.ops.gated_delta import reference
from mqc.ops.onnx_functions import attach_functions

NAMES = ("q", "k", "v", "decay", "beta", "state")


def values(batch: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    heads, width, wide = 3, 4, 5

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    k = torch.nn.functional.normalize(rand(batch, heads, length, width), dim=-1)
    return {
        "q": rand(batch, heads, length, width),
        "k": k,
        "v": rand(batch, heads, length, wide),
        "decay": -rand(batch, heads, length).abs(),
        "beta": rand(batch, heads, length).sigmoid(),
        "state": rand(batch, heads, width, wide),
    }


def test_the_recurrence_is_the_models() -> None:
    given = values(2, 7)
    turned = {name: given[name].transpose(1, 2) for name in NAMES[:5]}
    rows, state = modeling_qwen3_5.torch_recurrent_gated_delta_rule(
        turned["q"] * 2.0,  # it divides by the square root of the width, 4
        turned["k"],
        turned["v"],
        g=turned["decay"],
        beta=turned["beta"],
        initial_state=given["state"],
        output_final_state=True,
    )
    found = reference(**given)
    torch.testing.assert_close(found[:, :, :7], rows.transpose(1, 2))
    torch.testing.assert_close(found[:, :, 7:], state)


def test_chunks_and_padding() -> None:
    """Two calls are one; rows with decay 0 and beta 0 leave the memory as it is."""
    given = values(2, 7)
    whole = reference(**given)
    first = reference(**{n: t[:, :, :4] if n != "state" else t for n, t in given.items()})
    rest = {n: t[:, :, 4:] for n, t in given.items() if n != "state"}
    second = reference(**rest, state=first[:, :, 4:])
    torch.testing.assert_close(torch.cat([first[:, :, :4], second], dim=2), whole)
    for name in ("decay", "beta"):
        given[name][:, :, 5:] = 0.0
    shorter = reference(**{n: t[:, :, :5] if n != "state" else t for n, t in given.items()})
    torch.testing.assert_close(reference(**given)[:, :, 7:], shorter[:, :, 5:])


def test_shape_function_and_schema() -> None:
    torch.library.opcheck(torch.ops.mqc.gated_delta.default, tuple(values(2, 3).values()))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 7)])
def test_onnx_body(batch: int, length: int) -> None:
    given = values(batch, length)
    node = helper.make_node("GatedDelta", NAMES, ["y"], domain="ai.mqc")
    inputs = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, list(given[name].shape))
        for name in NAMES
    ]
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["b", "h", "n", "e"])
    model = helper.make_model(
        helper.make_graph([node], "graph", inputs, [output]),
        opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("ai.mqc", 1)],
        ir_version=10,
    )
    attach_functions(model)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: given[name].numpy() for name in NAMES})
    np.testing.assert_allclose(found, reference(**given).numpy(), rtol=1e-5, atol=1e-5)
