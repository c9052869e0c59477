"""One call of every operator variant: arguments by name, and a model that makes it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from mqc.numerics.hadamard import hadamard_factors, hadamard_plan
from mqc.numerics.packing import pack_c16k4, pack_int4
from mqc.ops._onnx_body import DOMAIN, DOMAIN_VERSION, OPSET
from mqc.ops.attention_int8 import quantize_rows
from mqc.ops.onnx_functions import variant_inputs, variant_outputs

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
