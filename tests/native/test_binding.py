"""Every operator variant in onnxruntime: the library's kernels against the bodies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import native_library as native
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import mqc.ops
from mqc.numerics.hadamard import hadamard_factors, hadamard_plan
from mqc.numerics.packing import pack_c16k4, pack_int4
from mqc.ops._onnx_body import DOMAIN, DOMAIN_VERSION, OPSET
from mqc.ops.attention_int8 import quantize_rows
from mqc.ops.onnx_functions import attach_functions, variant_inputs, variant_outputs

pytestmark = native.needs_library

Values = dict[str, np.ndarray]
B, S, N = 2, 3, 6
CONSTANT = ("qweight", "w_scale", "w_split", "factor0", "factor1", "factor2", "factor3")


def combine(*choices: list[str]) -> list[str]:
    return ["_".join(filter(None, flags)) for flags in itertools.product(*choices)]


MODALITY, SPLIT, FORM = ["", "mask", "count"], ["", "split"], ["", "u8"]
TERMS = [["", flag] for flag in ("bias", "split", "residual", "group")]
ACTIVATIONS = ["identity", "silu", "gelu", "gelutanh", "quickgelu", "relu"]
FACTORS = ["f0", "f1", "f2", "f3"]
VARIANTS = {
    "LinearW4A8": [
        *combine(["LinearW4A8"], MODALITY, *TERMS, ["", "odd"], ["", "s8"]),
        *combine(["LinearW4A8"], MODALITY, *TERMS, ["", "s8"], ["c16k4"]),
    ],
    "LinearW8A8": combine(["LinearW8A8"], MODALITY, *TERMS, ["", "s8"], ["", "c16k4"]),
    "LinearW4A16": [
        *combine(["LinearW4A16"], *TERMS, ["", "odd"]),
        *combine(["LinearW4A16"], *TERMS, ["c16k4"]),
    ],
    "LinearW8A16": combine(["LinearW8A16"], *TERMS, ["", "c16k4"]),
    "QuantizeStatic": combine(["QuantizeStatic"], MODALITY, FORM),
    "RmsNormQuantize": combine(["RmsNormQuantize"], MODALITY, FORM, SPLIT),
    "ActivationQuantize": combine(
        ["ActivationQuantize"], ACTIVATIONS, ["", "gated"], FACTORS, MODALITY, FORM, SPLIT
    ),
    "Hadamard": combine(["Hadamard"], FACTORS),
    "EmbeddingW8": ["EmbeddingW8"],
    "RankUpdate": ["RankUpdate"],
    "TokenOrder": ["TokenOrder"],
    "TakeTokens": ["TakeTokens", "TakeTokens_last"],
    "TakeKeys": ["TakeKeys"],
    "RotaryAngles": ["RotaryAngles", "RotaryAngles_axes"],
    **{
        op: [
            *combine([op], ["", "packed"]),
            *combine([op], ["", "packed"], ["half", "interleaved"], ["", "partial"]),
        ]
        for op in ("Attention", "AttentionInt8")
    },
    "AttentionFull": [
        *combine(["AttentionFull"], ["", "packed"], ["", "mask"]),
        *combine(
            ["AttentionFull"],
            *(["", "packed"], ["", "mask"], ["half", "interleaved"], ["", "partial"]),
        ),
    ],
}
ORDERS = {"f0": 1, "f1": 12, "f2": 24, "f3": 12 * 256}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ---- arguments ---------------------------------------------------------------------------------


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def modality(rng: np.random.Generator, flags: list[str]) -> Values:
    if "mask" in flags:
        return {"modality": rng.integers(0, 2, (B, S)).astype(bool)}
    return {"modality": rng.integers(0, S + 1, (B,))} if "count" in flags else {}


def two_scales(flags: list[str]) -> np.ndarray:
    both = {"mask", "count"} & set(flags)
    return np.array([0.05, 0.02] if both else [0.03], np.float32)


def linear(rng: np.random.Generator, op: str, flags: list[str]) -> Values:
    k, bits = 15 if "odd" in flags else 24, 4 if "W4" in op else 8
    q = rng.integers(-8, 8, (N, k)) if bits == 4 else rng.integers(-127, 128, (N, k))
    weight = torch.from_numpy(q.astype(np.int8))
    xq = rng.integers(-127, 128, (B, S, k))
    s8 = "s8" in flags
    stored = pack_int4(weight) if bits == 4 else weight
    if "c16k4" in flags:
        stored = pack_c16k4(weight, 3 if "group" in flags else 1, bits)
    return {
        "x": floats(rng, B, S, k),
        "xq": xq.astype(np.int8) if s8 else (xq + 128).astype(np.uint8),
        "qweight": stored.numpy(),
        "w_scale": rng.uniform(0.1, 1, (N, 3) if "group" in flags else N).astype(np.float32),
        "x_scale": two_scales(flags),
        "bias": floats(rng, N),
        "x_split": floats(rng, B, S, 2),
        "w_split": floats(rng, N, 2),
        "residual": floats(rng, B, S, N),
    }


def quantizing(rng: np.random.Generator, op: str, flags: list[str]) -> Values:
    order = next((ORDERS[flag] for flag in flags if flag in ORDERS), 1)
    width = max(2 * order if order < 100 else order, 20 if order == 1 else 0)
    plan = hadamard_plan(order)
    assert plan.block == order
    factors = [f.numpy().astype(np.float32) for f in hadamard_factors(order)]
    if factors:
        factors[-1] = factors[-1] * np.float32(1 / math.sqrt(order))
    return {
        "x": floats(rng, B, S, 2 * width if "gated" in flags else width),
        "scale": two_scales(flags),
        "split": np.array([3, 0, width - 1]),
        **{f"factor{i}": factor for i, factor in enumerate(factors)},
    }


def embedding(rng: np.random.Generator, op: str, flags: list[str]) -> Values:
    return {
        "ids": np.array([[0, 9, -1], [3, -10, 5]]),
        "qweight": rng.integers(-127, 128, (10, 7)).astype(np.int8),
        "scale": rng.uniform(0.1, 1, 10).astype(np.float32),
    }


def rank_update(rng: np.random.Generator, op: str, flags: list[str]) -> Values:
    return {
        "y_in": floats(rng, B, S, N),
        "x_split": floats(rng, B, S, 2),
        "w_split": floats(rng, N, 2),
    }


def attention(rng: np.random.Generator, op: str, flags: list[str]) -> Values:
    past, rows, heads, groups, d = 4, 9, 4, 2, 8
    dv, r = (d, 4 if "partial" in flags else d) if "packed" in flags else (6, 4)
    r = r if "partial" in flags else d
    mask = np.tril(np.ones((S, past + S), bool), past)
    caches = {
        "key_cache": floats(rng, B, groups, rows, d),
        "value_cache": floats(rng, B, groups, rows, dv),
    }
    if op == "AttentionInt8":
        made = {name: quantize_rows(torch.from_numpy(x)) for name, x in caches.items()}
        caches = {name: x.numpy() for name, (x, _) in made.items()}
        caches |= {name.replace("cache", "scale"): y.numpy() for name, (_, y) in made.items()}
    return {
        "q": floats(rng, B, S, heads + 2 * groups if "packed" in flags else heads, d),
        "k": floats(rng, B, S, groups, d),
        "v": floats(rng, B, S, groups, dv),
        **caches,
        "past": np.array([past]),
        "mask": np.broadcast_to(mask, (B, 1, S, past + S)).copy(),
        "cos": floats(rng, B, S, r),
        "sin": floats(rng, 1, S, r).repeat(B, 0),
    }


def attention_full(rng: np.random.Generator, op: str, flags: list[str]) -> Values:
    heads, groups, d, turns = 4, 2, 8, "half" in flags or "interleaved" in flags
    keys, r = S if turns or "packed" in flags else 5, 4 if "partial" in flags else d
    mask = rng.integers(0, 2, (1, 1, S, keys)).astype(bool)
    mask[..., 1] = True
    return {
        "q": floats(rng, B, S, heads + 2 * groups if "packed" in flags else heads, d),
        "k": floats(rng, B, keys, groups, d),
        "v": floats(rng, B, keys, groups, 6),
        "mask": mask,
        "cos": floats(rng, B, S, r),
        "sin": floats(rng, 1, S, r).repeat(B, 0),
    }


def order(rng: np.random.Generator, op: str, flags: list[str]) -> Values:
    x = rng.integers(0, 99, (3, B, S)) if "last" in flags else floats(rng, B, S, N)
    freq = floats(rng, N // 2)
    several = "axes" in flags
    return {
        "modality": rng.integers(0, 2, (B, S)).astype(bool),
        "x": x,
        "order": np.stack([rng.permutation(S) for _ in range(B)]),
        "mask": rng.integers(0, 2, (B, 2, S, S + 4)).astype(bool),
        "past": np.array([3]),
        "positions": rng.integers(0, 4000, (3, B, S) if several else (B, S)),
        "freq": np.concatenate([freq, freq]) if several else floats(rng, N),
        "axes": np.array([2, 0, 1, 2, 0, 1]),
    }


MAKERS: dict[str, Callable[[np.random.Generator, str, list[str]], Values]] = {
    **dict.fromkeys(("LinearW4A8", "LinearW8A8", "LinearW4A16", "LinearW8A16"), linear),
    "EmbeddingW8": embedding,
    "RankUpdate": rank_update,
    **dict.fromkeys(("TokenOrder", "TakeTokens", "TakeKeys", "RotaryAngles"), order),
    **dict.fromkeys(("Attention", "AttentionInt8"), attention),
    "AttentionFull": attention_full,
}


def arguments(op_type: str, rng: np.random.Generator) -> Values:
    """The inputs of a variant, in order."""
    op, *flags = op_type.split("_")
    values = MAKERS.get(op, quantizing)(rng, op, flags) | modality(rng, flags)
    return {name: values[name] for name in variant_inputs(op_type)}


ATTRIBUTES: dict[str, dict[str, Any]] = {
    "RmsNormQuantize": {"eps": 1e-5},
    **{op: {"scale": 0.3} for op in ("Attention", "AttentionInt8")},
    "AttentionFull": {"scale": 0.3, "kv_heads": 2},
}


RESULTS = {
    **{f"TokenOrder:{name}": TensorProto.INT64 for name in ("order", "place", "count")},
    "TokenOrder:visual": TensorProto.BOOL,
    "TakeTokens_last:y": TensorProto.INT64,
    "TakeKeys:y": TensorProto.BOOL,
}
"""Outputs that are neither quantized nor float."""


def model_of(calls: dict[str, Values], constants: tuple[str, ...] = CONSTANT) -> onnx.ModelProto:
    """One node an op type; what is no constant is an input of the graph, of any shape."""
    nodes, inputs, outputs, initializers = [], [], [], []
    for op_type, values in calls.items():
        names = [f"{op_type}.{name}" for name in values]
        for name, (short, value) in zip(names, values.items(), strict=True):
            if short in constants:
                initializers.append(numpy_helper.from_array(value, name))
            else:
                kind = helper.np_dtype_to_tensor_dtype(value.dtype)
                inputs.append(helper.make_tensor_value_info(name, kind, None))
        op, *flags = op_type.split("_")
        made = [f"{op_type}:{name}" for name in variant_outputs(op_type)]
        quantized = TensorProto.UINT8 if "u8" in flags else TensorProto.INT8
        for name in made:
            is_quantized = name.endswith(":xq") or op == "QuantizeStatic"
            is_quantized |= op == "AttentionInt8" and name.endswith("_cache")
            kind = quantized if is_quantized else RESULTS.get(name, TensorProto.FLOAT)
            outputs.append(helper.make_tensor_value_info(name, kind, None))
        attributes = ATTRIBUTES.get(op, {})
        if op in ("Hadamard", "ActivationQuantize"):
            order = next(ORDERS[flag] for flag in flags if flag in ORDERS)
            attributes = {"block" if op == "Hadamard" else "hadamard_block": order}
        nodes.append(helper.make_node(op_type, names, made, domain=DOMAIN, **attributes))
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def feeds(calls: dict[str, Values], constants: tuple[str, ...] = CONSTANT) -> Values:
    return {
        f"{op_type}.{name}": value
        for op_type, values in calls.items()
        for name, value in values.items()
        if name not in constants
    }


# ---- equal to the bodies -----------------------------------------------------------------------


def test_operators_of_the_library_are_operators_of_mqc() -> None:
    """Others run by their bodies."""
    assert set(VARIANTS) < {op.onnx.name for op in mqc.ops.OPS.values()}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", VARIANTS)
def test_kernels_equal_bodies(op: str, threads: int, rng: np.random.Generator) -> None:
    """The library has a kernel for every variant: its model holds no bodies."""
    types = VARIANTS[op] if threads == 1 else VARIANTS[op][-3:]
    step = 7 if op == "ActivationQuantize" and threads == 1 else 1
    for start in range(step):  # one model of a part of the variants after the other
        calls = {t: arguments(t, rng) for t in types[start::step]}
        model = model_of(calls)
        names = [output.name for output in model.graph.output]
        found = native.session(model.SerializeToString(), native=True, threads=threads)
        got = found.run(names, feeds(calls))
        attach_functions(model)
        wanted = native.session(model.SerializeToString(), native=False)
        expected = wanted.run(names, feeds(calls))
        for name, left, right in zip(names, got, expected, strict=True):
            assert left.dtype == right.dtype and left.shape == right.shape, name
            if left.dtype == np.float32:
                assert native.relative(left, right) <= 2e-6, name
            elif op in ("QuantizeStatic", "AttentionInt8") or name in RESULTS:
                assert np.array_equal(left, right), name
            else:
                assert native.steps_apart(left, right) <= 1, name
                assert (left != right).mean() <= 0.01, name
        if step > 1 and start == 1:
            break  # the others differ in flags that these have in other combinations


def resident(kind: str) -> int:
    """MB of memory of this process: "RssAnon", or the pages of the mapped files of that name."""
    if kind.startswith("Rss"):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(kind)).split()[1]) // 1024
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            inside = line.endswith(kind)
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total // 1024


@pytest.mark.parametrize("op_type", ["LinearW4A8_c16k4", "LinearW8A8_c16k4", "LinearW4A16_c16k4"])
def test_weights_are_read_from_the_mapped_file(
    op_type: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """No copy of 24 MB is made, neither when the session is made nor when it runs."""
    if not Path("/proc/self/smaps").is_file():
        pytest.skip("needs /proc")
    bits, (n, k) = (4, (6144, 8192)) if "W4" in op_type else (8, (3072, 8192))
    weight = torch.from_numpy(rng.integers(-8, 8, (n, k), dtype=np.int8))
    x = rng.integers(0, 256, (1, 1, k), dtype=np.uint8)
    every = {
        "xq": x,
        "x": x.astype(np.float32) - 128,
        "qweight": pack_c16k4(weight, 1, bits).numpy(),
        "w_scale": np.ones(n, np.float32),
        "x_scale": np.ones(1, np.float32),
    }
    values = {name: every[name] for name in variant_inputs(op_type)}
    model, path, name = model_of({op_type: values}), tmp_path / "m.onnx", f"{op_type}.data"
    onnx.save_model(model, path, save_as_external_data=True, location=name)
    given = feeds({op_type: values})
    want = every["x"][0] @ weight.numpy().astype(np.float32).T  # sums below 2^24
    del values["qweight"], every, weight, model
    small = arguments(op_type, rng)  # the first session also registers all operators
    native.session(model_of({op_type: small}).SerializeToString(), native=True)
    before = resident("RssAnon")
    made = native.session(str(path), native=True)
    got = made.run(None, given)[0]
    assert np.array_equal(got[0], want)
    assert resident("RssAnon") - before < 16
    assert resident(name) >= 24


def test_library_is_preferred_to_the_body(rng: np.random.Generator) -> None:
    """A count of visual rows above the rows is an error of the kernel; the body accepts it."""
    calls = {"QuantizeStatic_count": arguments("QuantizeStatic_count", rng)}
    calls["QuantizeStatic_count"]["modality"][:] = S + 1
    model = model_of(calls)
    attach_functions(model)
    native.session(model.SerializeToString(), native=False).run(None, feeds(calls))
    with pytest.raises(Exception, match=r"counts 4 visual rows of 3"):
        native.session(model.SerializeToString(), native=True).run(None, feeds(calls))


@pytest.mark.parametrize("op_type", ["Attention_half", "AttentionInt8_half"])
def test_cache_is_written_in_place(op_type: str, rng: np.random.Generator) -> None:
    """One buffer bound to input and output: the new rows are written, the others stay."""
    calls = {op_type: arguments(op_type, rng)}
    names = [name for name in calls[op_type] if name.startswith(("key_", "value_"))]
    model, given = model_of(calls), feeds(calls)
    made = native.session(model.SerializeToString(), native=True)
    wanted = made.run(None, given)
    binding = made.io_binding()
    caches = {}
    for name, value in given.items():
        caches[name] = native.ort.OrtValue.ortvalue_from_numpy(value.copy())
        binding.bind_ortvalue_input(name, caches[name])
    binding.bind_output(f"{op_type}:out", "cpu")
    for name in names:
        binding.bind_ortvalue_output(f"{op_type}:new_{name}", caches[f"{op_type}.{name}"])
    made.run_with_iobinding(binding)
    out = binding.get_outputs()[0].numpy()
    got = [out, *(caches[f"{op_type}.{name}"].numpy() for name in names)]
    for left, right in zip(got, wanted, strict=True):
        assert np.array_equal(left, right)
    assert not np.array_equal(got[1], given[f"{op_type}.key_cache"])


@pytest.mark.parametrize("op_type", ["Attention", "AttentionInt8"])
@pytest.mark.parametrize("spare", [0, 5])
def test_cache_grows(spare: int, op_type: str, rng: np.random.Generator) -> None:
    """Where the cache has no rows left the result has past + S; its old rows are kept."""
    values = arguments(op_type, rng)
    for name in values:
        if name.startswith(("key_", "value_")):
            values[name] = np.ascontiguousarray(values[name][:, :, : 4 + spare])
    calls = {op_type: values}
    model = model_of(calls)
    got = native.session(model.SerializeToString(), native=True).run(None, feeds(calls))
    attach_functions(model)
    wanted = native.session(model.SerializeToString(), native=False).run(None, feeds(calls))
    for left, right in zip(got, wanted, strict=True):
        assert native.relative(left, right) <= 2e-6


# ---- malformed ---------------------------------------------------------------------------------


def mutations(value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The value with other shapes: an axis less or more, one longer, one shorter, one empty."""
    if value.ndim:
        yield "flat", value.reshape(-1)[:1].reshape(())
    yield "wrapped", value[None]
    for axis in range(value.ndim):
        yield (
            f"longer{axis}",
            np.concatenate([value, value[(slice(None),) * axis + (slice(0, 1),)]], axis),
        )
        yield f"shorter{axis}", np.delete(value, 0, axis)
        yield f"empty{axis}", np.take(value, [], axis)
        if value.ndim > 1:
            yield f"dropped{axis}", np.take(value, 0, axis)


FUZZED = [
    "LinearW4A8_mask_bias_split_residual",
    "LinearW4A8_count_bias_group_s8",
    "LinearW4A8_odd",
    "LinearW8A8_split_group",
    "LinearW4A8_mask_bias_split_group_c16k4",
    "LinearW8A8_residual_s8_c16k4",
    "LinearW4A16_bias_split_residual_c16k4",
    "QuantizeStatic_mask",
    "QuantizeStatic_count_u8",
    "RmsNormQuantize_count_split",
    "ActivationQuantize_silu_gated_f2_mask_u8_split",
    "Hadamard_f2",
    "EmbeddingW8",
    "RankUpdate",
    "Attention_half",
    "Attention_packed_interleaved_partial",
    "AttentionInt8_half",
    "AttentionInt8_packed_interleaved_partial",
    "AttentionFull_mask",
    "AttentionFull_packed_mask_half_partial",
]
VALID = {
    # What a mutation may leave valid: other rows or columns where nothing else fixes their number,
    # other groups that divide 24 channels as well, and caches and masks with more rows.
    "LinearW4A8_count_bias_group_s8": ("xq", "w_scale"),
    "LinearW4A8_odd": ("xq",),
    "LinearW8A8_split_group": ("w_scale",),
    "QuantizeStatic_mask": ("x",),
    "QuantizeStatic_count_u8": ("x",),
    "RmsNormQuantize_count_split": ("x", "split"),
    "ActivationQuantize_silu_gated_f2_mask_u8_split": ("split",),
    "Hadamard_f2": ("x",),
    "EmbeddingW8": ("ids", "qweight"),
    "Attention_half": ("mask", "key_cache", "value_cache", "cos", "past"),
    "Attention_packed_interleaved_partial": ("mask", "key_cache", "value_cache", "cos", "past"),
    "AttentionInt8_half": ("mask", "cos", "past"),
    "AttentionInt8_packed_interleaved_partial": ("mask", "cos", "past"),
    "AttentionFull_mask": ("mask", "v"),
    "AttentionFull_packed_mask_half_partial": ("mask", "q"),
}


@pytest.mark.parametrize("op_type", FUZZED)
def test_malformed_shapes_are_errors(op_type: str, rng: np.random.Generator) -> None:
    """At session creation for constants, at run time for others; never a crash."""
    values = arguments(op_type, rng)
    good = native.session(model_of({op_type: values}).SerializeToString(), native=True)
    good.run(None, feeds({op_type: values}))
    raised = 0
    for name, value in values.items():
        for kind, changed in mutations(value):
            calls = {op_type: {**values, name: changed.copy()}}
            message = None
            try:
                made = good
                if name in CONSTANT:
                    made = native.session(model_of(calls).SerializeToString(), native=True)
                made.run(None, feeds(calls))
            except Exception as error:  # noqa: BLE001  (onnxruntime's own types)
                message, raised = str(error), raised + 1
            if message is None:
                assert name in VALID.get(op_type, ()), (name, kind)
            else:
                assert op_type in message, (name, kind)
    assert raised > len(values)


@pytest.mark.parametrize("op_type", FUZZED)
def test_wrong_types_are_errors(op_type: str, rng: np.random.Generator) -> None:
    values = arguments(op_type, rng)
    for name, value in values.items():
        other = np.float64 if value.dtype == np.float32 else np.float32
        calls = {op_type: {**values, name: value.astype(other)}}
        with pytest.raises(Exception, match="(?i)type"):
            native.session(model_of(calls).SerializeToString(), native=True)


AXES = {
    # where the batch and the tokens of an input are; (0, 1) for all others that vary by row
    **dict.fromkeys(("key_cache", "value_cache", "key_scale", "value_scale"), (0, None)),
    "mask": (0, 2),
    **dict.fromkeys((*CONSTANT, "x_scale", "scale", "bias", "split", "past"), (None, None)),
}


@pytest.mark.parametrize("axis", [0, 1], ids=["no sequences", "no tokens"])
@pytest.mark.parametrize("op_type", FUZZED)
def test_no_rows(op_type: str, axis: int, rng: np.random.Generator) -> None:
    values = arguments(op_type, rng)
    for name, value in values.items():
        place = AXES.get(name, (0, 1))[axis]
        if name == "modality" and value.ndim == 1 and axis == 1:
            values[name] = np.zeros(B, np.int64)
        elif place is not None and not (op_type == "EmbeddingW8" and name != "ids"):
            values[name] = np.ascontiguousarray(np.take(value, [], place))
            if name == "mask" and axis == 1 and op_type.startswith("AttentionFull"):
                values[name] = values[name][..., :0]  # keys are rows, too
    calls = {op_type: values}
    made = native.session(model_of(calls).SerializeToString(), native=True)
    assert made.run(None, feeds(calls))[0].size == 0


@pytest.mark.parametrize(
    ("op_type", "name", "value", "message"),
    [
        ("QuantizeStatic_count", "modality", np.array([1, -1]), "counts -1 visual rows of 3"),
        ("LinearW4A8_count", "modality", np.array([4, 1]), "counts 4 visual rows of 3"),
        ("RmsNormQuantize_split", "split", np.array([20]), "split names column 20 of 20"),
        ("RmsNormQuantize_split", "split", np.array([-1]), "split names column -1"),
        ("EmbeddingW8", "ids", np.array([[10]]), "id 10 is not one of 10"),
        ("Attention", "past", np.array([-1]), "past is -1"),
        ("Attention", "past", np.array([2**62]), "past is 46"),
        ("Attention", "past", np.array([5]), "columns"),
    ],
)
def test_values_out_of_range(
    op_type: str, name: str, value: np.ndarray, message: str, rng: np.random.Generator
) -> None:
    calls = {op_type: {**arguments(op_type, rng), name: value}}
    made = native.session(model_of(calls).SerializeToString(), native=True)
    with pytest.raises(Exception, match=message):
        made.run(None, feeds(calls))


def test_constants_must_be_constants(rng: np.random.Generator) -> None:
    calls = {"LinearW8A8": arguments("LinearW8A8", rng)}
    model = model_of(calls, constants=())
    with pytest.raises(Exception, match=r"qweight .* has to be an initializer"):
        native.session(model.SerializeToString(), native=True)


@pytest.mark.parametrize("bad", ["not orthogonal", "not sylvester", "scale", "not square"])
def test_wrong_factors(bad: str, rng: np.random.Generator) -> None:
    values = arguments("Hadamard_f2", rng)
    last = values["factor1"]
    if bad == "not orthogonal":
        values["factor0"] = values["factor0"] * np.float32(2) + np.eye(12, dtype=np.float32)
    elif bad == "not sylvester":
        values["factor1"] = last[::-1].copy()
    elif bad == "scale":
        values["factor1"] = last * np.float32(2)
    else:
        values["factor1"] = last[:1].copy()
    with pytest.raises(Exception, match="Hadamard_f2"):
        native.session(model_of({"Hadamard_f2": values}).SerializeToString(), native=True)
