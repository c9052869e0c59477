"""onnxruntime's binding of the CUDA kernels, over the emulated ones: the library as it is built.

The emulated kernels read the host's memory, and the library then registers its operators for the
CPU provider. Everything but the provider, its stream and its memory is what runs on a GPU.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import malformed_calls
import native_library
import numpy as np
import onnx
import onnxruntime as ort
import operator_calls as cases
import pytest
import torch
from cuda_emulator import compile_emulated

from mqc.backends.onnx.library import build_hint, ops_library
from mqc.cuda.library import PATH_VARIABLE
from mqc.numerics.hadamard import hadamard_factors
from mqc.numerics.packing import pack_c16k4, pack_int4
from mqc.ops.onnx_functions import attach_functions, variant_inputs

LIBRARY = ops_library("cuda")
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=f"no operator library: {build_hint()}")
CONSTANT = (*cases.CONSTANT, "split")
Values = cases.Values


def has_kernel(op_type: str) -> bool:
    """Signed activations; towers by their bodies. Groups and float linears have their own tests."""
    op, *flags = op_type.split("_")
    if op in ("LinearW4A8", "LinearW8A8"):
        return "s8" in flags and "group" not in flags
    rows = ("QuantizeStatic", "RmsNormQuantize", "ActivationQuantize", "Hadamard", "EmbeddingW8")
    return "u8" not in flags and op in (*rows, "Attention", "AttentionInt8")


@pytest.fixture(autouse=True, scope="module")
def emulated_kernels() -> Iterator[None]:
    """The library keeps the first kernel library that it opens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PATH_VARIABLE, str(compile_emulated()))
        ort.SessionOptions().register_custom_ops_library(str(LIBRARY))
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def arguments(op_type: str, rng: np.random.Generator) -> Values:
    """Values and keys of one size: others have no kernel."""
    values = cases.arguments(op_type, rng)
    if op_type.startswith("Attention") and "v" in values:
        values["v"] = cases.floats(rng, *values["k"].shape)
        shape = values["key_cache"].shape
        values["value_cache"] = cases.floats(rng, *shape)
        if op_type.startswith("AttentionInt8"):
            values["value_cache"] = rng.integers(-127, 128, shape).astype(np.int8)
    if op_type == "EmbeddingW8":  # ids are not looked at before the kernel runs: none is negative
        values["ids"] = values["ids"] % len(values["qweight"])
    return values


def model_of(calls: dict[str, Values], constants: tuple[str, ...] = CONSTANT) -> onnx.ModelProto:
    model: onnx.ModelProto = cases.model_of(calls, constants)
    return model


def feeds(calls: dict[str, Values], constants: tuple[str, ...] = CONSTANT) -> Values:
    given: Values = cases.feeds(calls, constants)
    return given


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.register_custom_ops_library(str(LIBRARY))
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(calls: dict[str, Values]) -> list[np.ndarray]:
    found: list[np.ndarray] = session(model_of(calls)).run(None, feeds(calls))
    return found


def bodies(calls: dict[str, Values]) -> list[np.ndarray]:
    model = model_of(calls)
    attach_functions(model)
    made = native_library.session(model.SerializeToString(), native=False)
    found: list[np.ndarray] = made.run(None, feeds(calls))
    return found


def compare(got: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    for left, right in zip(got, wanted, strict=True):
        assert left.dtype == right.dtype and left.shape == right.shape
        if left.dtype == np.float32:
            assert native_library.relative(left, right) <= 2e-6
        else:
            assert native_library.steps_apart(left, right) <= 1
            assert (left != right).mean() <= 0.01


# ---- the file ----------------------------------------------------------------------------------


def test_symbols() -> None:
    """Exported: two functions. onnxruntime and the kernels come by pointers."""
    if shutil.which("nm") is None:
        pytest.skip("no binutils")

    def names(which: str) -> set[str]:
        command = ["nm", "-D", f"--{which}-only", str(LIBRARY)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {line.split()[-1] for line in text.splitlines()}

    assert names("defined") == {"RegisterCustomOps", "mqc_attention_in_place"}
    undefined = names("undefined")
    assert not [n for n in undefined if re.search(r"^Ort|onnxruntime|^mqc_|^cu[A-Zd]|torch", n)]


@pytest.mark.parametrize(
    ("place", "message"),
    [("/no/libmqc_cuda.so", "cannot be loaded"), ("libc.so.6", "has no function mqc_abi_version")],
)
def test_missing_kernels_are_explained(place: str, message: str) -> None:
    code = (
        "import sys, onnxruntime as ort\n"
        "try: ort.SessionOptions().register_custom_ops_library(sys.argv[1])\n"
        "except Exception as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(LIBRARY)]
    environment = {**os.environ, PATH_VARIABLE: place}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert f"the kernel library {place} {message}" in result.stdout
    assert "build it with: python -m mqc.cuda.build" in result.stdout


# ---- equal to the bodies -----------------------------------------------------------------------

TAKEN = {"LinearW4A8": 2, "LinearW8A8": 3, "ActivationQuantize": 11}
"""Of the many variants of an operator every so many are run: the others combine the same flags."""


@pytest.mark.parametrize(
    "op", [op for op in cases.VARIANTS if any(map(has_kernel, cases.VARIANTS[op]))]
)
def test_kernels_equal_bodies(op: str, rng: np.random.Generator) -> None:
    """A model without bodies: every variant has a kernel."""
    types = [op_type for op_type in cases.VARIANTS[op] if has_kernel(op_type)]
    calls = {op_type: arguments(op_type, rng) for op_type in types[:: TAKEN.get(op, 1)]}
    compare(run(calls), bodies(calls))


def dense(order: int) -> np.ndarray:
    """The one factor of an order that is no multiple of another one's."""
    (factor,) = hadamard_factors(order)
    return factor.numpy().astype(np.float32) / np.float32(order**0.5)


def test_large_orders_in_half_precision(rng: np.random.Generator) -> None:
    x, op_type = cases.floats(rng, 2, 3, 688), "ActivationQuantize_silu_gated_f1_split"
    calls = {"Hadamard_f1": {"x": x, "factor0": dense(344)}}
    ((got,), (wanted,)) = run(calls), bodies(calls)
    assert 2e-6 < native_library.relative(got, wanted) <= 2e-3
    values = {"x": x, "scale": np.array([0.03], np.float32), "split": np.array([3, 0, 343])}
    calls = {op_type: {**values, "factor0": dense(344)}}
    (xq, columns), (steps, floats) = run(calls), bodies(calls)
    assert native_library.steps_apart(xq, steps) <= 1 and (xq != steps).mean() <= 0.02
    assert native_library.relative(columns, floats) <= 2e-3


@pytest.mark.parametrize("layout", ["", "_c16k4"])
@pytest.mark.parametrize("op", ["LinearW4A8", "LinearW8A8"])
def test_weights_of_several_tiles(op: str, layout: str, rng: np.random.Generator) -> None:
    """Exact integers, for few rows (split along the inputs) and many, aligned and not."""
    n, bits = 130, 4 if op == "LinearW4A8" else 8
    for k, rows in ((272, 1), (520, 3), (136, 70)):
        q = rng.integers(-8, 8, (n, k)) if bits == 4 else rng.integers(-127, 128, (n, k))
        weight = torch.from_numpy(q.astype(np.int8))
        stored = pack_int4(weight) if bits == 4 else weight
        x = rng.integers(-127, 128, (rows, k)).astype(np.int8)
        values = {
            "xq": x,
            "qweight": (pack_c16k4(weight, 1, bits) if layout else stored).numpy(),
            "w_scale": np.ones(n, np.float32),
            "x_scale": np.ones(1, np.float32),
        }
        (got,) = run({f"{op}_s8{layout}": values})
        assert np.array_equal(got, x.astype(np.int64) @ q.T)


FLOAT_LINEARS = [
    op_type
    for op in ("LinearW4A16", "LinearW8A16")
    for op_type in cases.VARIANTS[op]
    if "group" not in op_type
]


def test_float_rows_in_half_precision(rng: np.random.Generator) -> None:
    """Weights alone are quantized: rows become float16, sums and all else are float32."""
    calls = {op_type: arguments(op_type, rng) for op_type in FLOAT_LINEARS}
    calls["LinearW8A16_bias"]["x"][0, 0, 0] = 1e6  # a value beyond float16: its largest
    got, wanted = run(calls), bodies(calls)
    for op_type, left, right in zip(calls, got, wanted, strict=True):
        if op_type == "LinearW8A16_bias":
            assert np.isfinite(left).all()
            left, right = left[1:], right[1:]
        assert left.dtype == np.float32 and native_library.relative(left, right) <= 1e-3


@pytest.mark.parametrize("layout", ["", "_c16k4"])
@pytest.mark.parametrize("op", ["W4A8_mask", "W8A8_mask", "W4A16", "W8A16"])
def test_scales_of_groups(op: str, layout: str, rng: np.random.Generator) -> None:
    """Groups of 32, 64, 128 and others in equal parts of these."""
    k, signed, bits = 384, "_s8" if op.endswith("mask") else "", int(op[1])
    op_type = f"Linear{op}_bias_group{signed}{layout}"
    top = 8 if bits == 4 else 127
    q = torch.from_numpy(rng.integers(-top, top, (70, k)).astype(np.int8))
    for groups in (12, 6, 4, 3, 2, 1):
        stored = pack_int4(q) if bits == 4 else q
        x = rng.integers(-127, 128, (2, 3, k)).astype(np.int8)
        values = {
            "xq": x,
            "x": x.astype(np.float32),
            "qweight": (pack_c16k4(q, groups, bits) if layout else stored).numpy(),
            "w_scale": rng.uniform(0.1, 1, (70, groups)).astype(np.float32),
            "x_scale": np.array([0.05, 0.02], np.float32),
            "modality": rng.integers(0, 2, (2, 3)).astype(bool),
            "bias": cases.floats(rng, 70),
        }
        calls = {op_type: {name: values[name] for name in variant_inputs(op_type)}}
        compare(run(calls), bodies(calls))


@pytest.mark.parametrize("op_type", ["LinearW4A8_mask_bias", "QuantizeStatic_u8", "RankUpdate"])
def test_variants_without_a_kernel_run_by_their_bodies(
    op_type: str, rng: np.random.Generator
) -> None:
    calls = {op_type: arguments(op_type, rng)}
    model = model_of(calls)
    with pytest.raises(Exception, match=op_type):
        session(model)
    attach_functions(model)
    got = session(model).run(None, feeds(calls))
    for left, right in zip(got, bodies(calls), strict=True):
        assert np.array_equal(left, right)


@pytest.mark.parametrize("op_type", ["Attention_half", "AttentionInt8_half"])
def test_cache_is_written_in_place(op_type: str, rng: np.random.Generator) -> None:
    """One buffer bound to input and output: the new rows are written, the others stay."""
    calls = {op_type: arguments(op_type, rng)}
    given, wanted = feeds(calls), run(calls)
    made = session(model_of(calls))
    binding, bound = made.io_binding(), {}
    for name, value in given.items():
        bound[name] = ort.OrtValue.ortvalue_from_numpy(value.copy())
        binding.bind_ortvalue_input(name, bound[name])
    caches = [name for name in given if re.search(r"\.(key|value)_", name)]
    binding.bind_output(f"{op_type}:out", "cpu")
    for name in caches:
        binding.bind_ortvalue_output(name.replace(".", ":new_"), bound[name])
    made.run_with_iobinding(binding)
    got = [binding.get_outputs()[0].numpy(), *(bound[name].numpy() for name in caches)]
    for left, right in zip(got, wanted, strict=True):
        assert np.array_equal(left, right)
    assert not np.array_equal(got[1], given[f"{op_type}.key_cache"])
    assert np.array_equal(bound[f"{op_type}.q"].numpy(), given[f"{op_type}.q"])


@pytest.mark.parametrize("spare", [0, 5])
def test_cache_grows(spare: int, rng: np.random.Generator) -> None:
    """Without rows left in the cache the result has past + S; angles may be the same for all."""
    values = arguments("Attention_packed_half", rng)
    for name in ("key_cache", "value_cache"):
        values[name] = np.ascontiguousarray(values[name][:, :, : 4 + spare])
    for name in ("cos", "sin"):
        values[name] = values[name][:1]
    calls = {"Attention_packed_half": values}
    compare(run(calls), bodies(calls))


def prompt(rng: np.random.Generator, past: int) -> Values:
    """Arguments of a prompt of 18 tokens, with heads that tensor cores take."""
    tokens, rows, d = 18, 24, 64
    mask = np.tril(np.ones((tokens, past + tokens), bool), past)
    return {
        "q": cases.floats(rng, 2, tokens, 4 + 2 * 2, d),
        "key_cache": cases.floats(rng, 2, 2, rows, d),
        "value_cache": cases.floats(rng, 2, 2, rows, d),
        "past": np.array([past]),
        "mask": np.broadcast_to(mask, (2, 1, *mask.shape)).copy(),
        "cos": cases.floats(rng, 1, tokens, d),
        "sin": cases.floats(rng, 1, tokens, d),
    }


@pytest.mark.parametrize("past", [0, 3])
def test_prompts_are_read_in_half_precision(past: int, rng: np.random.Generator) -> None:
    """float16's 11 bits; the cache stays float32."""
    values = prompt(rng, past)
    values["q"][0, 0, -1, 0] = 1e6  # a value beyond float16: its largest
    calls = {"Attention_packed_half": values}
    (out, *caches), (wanted, *grown) = run(calls), bodies(calls)
    for left, right in zip(caches, grown, strict=True):
        assert native_library.relative(left, right) <= 2e-6
    assert np.isfinite(out).all() and 1e3 < out[0, 0].max() <= 65504
    assert 2e-6 < native_library.relative(out[1], wanted[1]) <= 2e-3


def test_prompts_over_an_int8_cache(rng: np.random.Generator) -> None:
    """The kernel for half precision reads the int8 rows as they are."""
    values = prompt(rng, 3)
    for name in ("key", "value"):
        shape = values[f"{name}_cache"].shape
        values[f"{name}_cache"] = rng.integers(-127, 128, shape).astype(np.int8)
        values[f"{name}_scale"] = rng.uniform(0.01, 0.02, shape[:3]).astype(np.float32)
    op_type = "AttentionInt8_packed_half"
    calls = {op_type: {name: values[name] for name in variant_inputs(op_type)}}
    (out, *caches), (wanted, *grown) = run(calls), bodies(calls)
    compare(caches, grown)
    assert 2e-6 < native_library.relative(out, wanted) <= 2e-3


def test_calls_with_another_past(rng: np.random.Generator) -> None:
    """The number is kept on the device from call to call, as long as it is the same."""
    values = arguments("Attention", rng)
    made = session(model_of({"Attention": values}))
    for past in (4, 4, 2, 0):
        calls = {"Attention": {**values, "past": np.array([past])}}
        compare(made.run(None, feeds(calls)), bodies(calls))


# ---- malformed ---------------------------------------------------------------------------------

FUZZED = [
    "LinearW4A8_mask_bias_split_residual_s8",
    "LinearW8A8_count_bias_s8_c16k4",
    "LinearW4A8_odd_s8",
    "LinearW4A16_bias_split_residual",
    "QuantizeStatic_mask",
    "RmsNormQuantize_count_split",
    "ActivationQuantize_silu_gated_f2_mask_split",
    "Hadamard_f2",
    "EmbeddingW8",
    "Attention_half",
    "Attention_packed_interleaved_partial",
    "AttentionInt8_packed_half",
]
VALID = {
    # What a mutation may leave valid, as for the CPU's kernels.
    "LinearW8A8_count_bias_s8_c16k4": ("xq",),
    "LinearW4A8_odd_s8": ("xq",),
    "QuantizeStatic_mask": ("x",),
    "RmsNormQuantize_count_split": ("x", "split"),
    "ActivationQuantize_silu_gated_f2_mask_split": ("split",),
    "Hadamard_f2": ("x",),
    "EmbeddingW8": ("ids", "qweight"),
    "Attention_half": ("mask", "cos", "past"),
    "Attention_packed_interleaved_partial": ("mask", "cos", "past"),
    "AttentionInt8_packed_half": ("mask", "cos", "past"),
}


@pytest.mark.parametrize("op_type", FUZZED)
def test_malformed_shapes_are_errors(op_type: str, rng: np.random.Generator) -> None:
    values, valid = arguments(op_type, rng), VALID.get(op_type, ())
    malformed_calls.check_malformed_shapes(op_type, values, session, valid, CONSTANT)


@pytest.mark.parametrize("axis", [0, 1], ids=["no sequences", "no tokens"])
@pytest.mark.parametrize("op_type", FUZZED)
def test_no_rows(op_type: str, axis: int, rng: np.random.Generator) -> None:
    values = malformed_calls.without_rows(op_type, arguments(op_type, rng), axis)
    assert run({op_type: values})[0].size == 0


def changed(op_type: str, rng: np.random.Generator, **values: Any) -> dict[str, Values]:
    return {op_type: {**arguments(op_type, rng), **values}}


def test_values_out_of_range(rng: np.random.Generator) -> None:
    for column, past in ((20, -1), (-1, 2**62)):
        with pytest.raises(Exception, match=f"split names column {column}"):
            run(changed("RmsNormQuantize_split", rng, split=np.array([column])))
        with pytest.raises(Exception, match=f"past is {past}"):
            run(changed("Attention", rng, past=np.array([past])))
    with pytest.raises(Exception, match="columns"):
        run(changed("Attention", rng, past=np.array([5])))
    (rows,) = run(changed("EmbeddingW8", rng, ids=np.array([[10, 0, -1]])))
    assert np.isnan(rows).all(axis=-1).tolist() == [[True, False, True]]


def test_what_the_kernels_have_not(rng: np.random.Generator) -> None:
    values = arguments("LinearW8A8_split_s8", rng)
    for name in ("x_split", "w_split"):
        values[name] = np.repeat(values[name], 40, axis=-1)
    with pytest.raises(Exception, match=r"w_split .* has to be of rank 64 at most on a GPU"):
        run({"LinearW8A8_split_s8": values})
    with pytest.raises(Exception, match=r"w_scale .* groups of 32, 64 or a multiple of 128 inputs"):
        run({"LinearW4A8_group_s8": arguments("LinearW4A8_group_s8", rng)})
    with pytest.raises(Exception, match="dense factor of order 588, at most 352"):
        run({"Hadamard_f1": {"x": cases.floats(rng, 1, 588), "factor0": dense(588)}})
    values = cases.arguments("Attention", rng)
    with pytest.raises(Exception, match="value_cache .* wanted the shape of key_cache"):
        run({"Attention": values})
    with pytest.raises(Exception, match=r"qweight .* has to be an initializer"):
        session(model_of({"LinearW8A8_s8": arguments("LinearW8A8_s8", rng)}, constants=()))
