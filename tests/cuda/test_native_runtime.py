"""The runtime over the library's own kernels, on the emulator of CUDA blocks: ctypes calls,
strides, workspaces and cache writes are the ones that a GPU gets."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import cuda_cases
import pytest
import tiny
import torch

from mqc.backends.cuda.engine import CudaEngine
from mqc.backends.cuda.kernels import Attention, CacheTensor, FullAttention, ReferenceKernels
from mqc.backends.cuda.native import NativeKernels, aligned_rows, hadamard_form
from mqc.backends.cuda.ops import LINEAR, LINEAR_A16
from mqc.backends.cuda.register import implementations
from mqc.cuda.library import UnsupportedError
from mqc.cuda.pack import pack_linear
from mqc.host import generate
from mqc.numerics.packing import pack_int4

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def kernels(emulated: Any) -> NativeKernels:
    emulated.configure(seed=1)
    return NativeKernels(emulated, CPU, stream=lambda: 0)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_decoder_of_a_tiny_model(kernels: NativeKernels, dtype: str) -> None:
    """Prefill of a batch, decoding, and both again from the recorded step."""
    name = "tiny-qwen2-vl"
    program = cuda_cases.lowered(name, dtype)
    kinds = ("text", "image")
    expected, found = (
        cuda_cases.logits(CudaEngine(program.copy(), k, capacity=64), name, kinds=kinds)
        for k in (ReferenceKernels(), kernels)
    )
    limit = 0.05 if dtype == "f32" else 0.15  # sums in another order tip some int8 steps
    assert (found - expected).abs().max() < limit * expected.abs().max()
    assert found.argmax(-1).equal(expected.argmax(-1))


def test_weight_only_model(kernels: NativeKernels) -> None:
    """Decoder and head with float activations: prefill and decoding."""
    name = "tiny-llava"
    program = cuda_cases.lowered(name, "bf16", cuda_cases.WEIGHT_ONLY)
    for component in ("vision", "decoder"):
        targets = [node.target for node in program.components[component].graph.nodes]
        assert LINEAR_A16 in targets and LINEAR not in targets
    expected, found = (
        cuda_cases.logits(CudaEngine(program.copy(), k), name, kinds=("text",), steps=(11,))
        for k in (ReferenceKernels(), kernels)
    )
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()
    assert found.argmax(-1).equal(expected.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_float_linear(kernels: NativeKernels, dtype: torch.dtype) -> None:
    """Rows that the kernel cannot read as they lie are copied; float32 ones become float16."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randint(-8, 8, (70, 150), generator=generator, dtype=torch.int8)
    packed, layout = pack_linear(pack_int4(q), 150)
    x = torch.randn(2, 3, 151, generator=generator)[..., 1:].to(dtype)
    x[0, 0, 0] = 7e4 if dtype == torch.float32 else 3.0
    terms = (torch.rand(70), torch.rand(70), torch.rand(2, 3, 2).to(dtype), torch.rand(70, 2))
    residual = torch.rand(2, 3, 70).to(dtype)
    made = implementations(kernels)["mqc_cuda::linear_a16"]
    found = made(x, packed, *terms, residual, int(layout), dtype)
    wide = x.clamp(-65504, 65504)
    expected = LINEAR_A16(wide, packed, *terms, residual, int(layout), dtype)
    assert found.dtype == dtype and found.shape == (2, 3, 70)
    limit = 2e-3 if dtype != torch.bfloat16 else 2**-6
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit * 20)


def test_greedy_decoding(kernels: NativeKernels) -> None:
    name = "tiny-llava"
    program = cuda_cases.lowered(name)
    prompt = tiny.runnable(name).prompt(tiny.conversations()["text"])
    expected, found = (
        generate(CudaEngine(program.copy(), k, capacity=64), prompt, max_new_tokens=5, stop=())
        for k in (ReferenceKernels(), kernels)
    )
    assert found.tokens == expected.tokens


def attention_call(
    dtype: torch.dtype, cache_dtype: torch.dtype, tokens: int, past: int, packed: bool
) -> Attention:
    generator = torch.Generator().manual_seed(tokens)
    batch, heads, groups, width, capacity = 2, 4, 2, 64, 40

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    caches = []
    for _ in range(2):
        cache = CacheTensor.empty((batch, groups, capacity, width), cache_dtype, CPU)
        cache.write(random(batch, groups, past, width), torch.arange(past))
        caches.append(cache)
    angles = torch.rand(batch, tokens, width, generator=generator) * 6
    mask = torch.ones(batch, 1, tokens, past + tokens, dtype=torch.bool).tril(past)
    mask[1, :, :, :3] = False
    q = random(batch, tokens, heads + 2 * groups, width)
    k = v = None
    if not packed:
        q, k, v = (part.contiguous() for part in q.split([heads, groups, groups], dim=2))
    where = (torch.tensor([past]), mask)
    turn = (angles.cos(), angles.sin(), width**-0.5, "half")
    return Attention(q, k, v, *caches, *where, *turn, end=past + tokens)


@pytest.mark.parametrize("cache_dtype", ["same", "int8"])
@pytest.mark.parametrize(("tokens", "past"), [(1, 7), (20, 0), (20, 9)])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(
    kernels: NativeKernels,
    dtype: torch.dtype,
    packed: bool,
    tokens: int,
    past: int,
    cache_dtype: str,
) -> None:
    """One new token goes through the library, many through torch; the caches end up the same."""
    kind = torch.int8 if cache_dtype == "int8" else dtype
    calls = [attention_call(dtype, kind, tokens, past, packed) for _ in range(2)]
    outs = [torch.empty(2, tokens, 4 * 64, dtype=dtype) for _ in range(2)]
    found = kernels.attention(calls[0], outs[0])
    expected = ReferenceKernels().attention(calls[1], outs[1])
    limit = 2e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)
    end = past + tokens
    for mine, other in ((calls[0].keys, calls[1].keys), (calls[0].values, calls[1].values)):
        one, two = (cache.read(end, torch.float32) for cache in (mine, other))
        step = 0.04 if kind == torch.int8 else limit
        torch.testing.assert_close(one, two, rtol=limit, atol=step)
        assert not mine.data[:, :, end:].any()


@pytest.mark.parametrize(("tokens", "past"), [(1, 7), (20, 0), (20, 9)])
def test_causal_attention_without_a_mask(kernels: NativeKernels, tokens: int, past: int) -> None:
    """Whole prompts, chunks and steps whose mask is known to be causal: it is not looked at."""
    calls = [attention_call(torch.float32, torch.float32, tokens, past, True) for _ in range(2)]
    mask = torch.ones(2, 1, tokens, past + tokens, dtype=torch.bool).tril(past)
    expected_call = replace(calls[1], mask=mask)
    blind = replace(calls[0], mask=torch.zeros_like(mask), causal=True)
    outs = [torch.empty(2, tokens, 4 * 64) for _ in range(2)]
    found = kernels.attention(blind, outs[0])
    expected = ReferenceKernels().attention(expected_call, outs[1])
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["packed", "packed_mask", "apart", "cross"])
def test_attention_without_a_cache(kernels: NativeKernels, dtype: torch.dtype, form: str) -> None:
    """Towers turn packed heads or heads apart; resamplers attend keys of another number."""
    generator = torch.Generator().manual_seed(len(form))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    batch, rows, heads, groups, width = 2, 9, 4, 2, 24
    angles = torch.rand(1, rows, width, generator=generator) * 6
    turn: tuple[Any, ...] = (angles.cos(), angles.sin(), groups, width**-0.5, "half")
    mask = (torch.arange(rows)[:, None] // 3 == torch.arange(rows) // 3)[None, None]
    sides: tuple[Any, ...] = (random(batch, rows, heads + 2 * groups, width), None, None)
    if form == "apart":
        sides = tuple(random(batch, rows, n, width) for n in (heads, groups, groups))
    elif form == "cross":
        sides = tuple(random(batch, n, groups, width) for n in (rows, 5, 5))
        turn = (None, None, groups, 0.3, "none")
    call = FullAttention(*sides, mask if form == "packed_mask" else None, *turn)
    kept = [None if side is None else side.clone() for side in sides]
    found, expected = (k.attention_full(call) for k in (kernels, ReferenceKernels()))
    assert found.dtype == dtype and found.shape == expected.shape
    limit = 2e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)
    for side, before in zip(sides, kept, strict=True):
        assert side is None or side.equal(before)
    if dtype == torch.float32:  # angles as wide as the rows: the operator's own definition
        whole = torch.ops.mqc.attention_full(*sides, call.mask, *turn)
        torch.testing.assert_close(found, whole, rtol=limit, atol=limit)


def test_no_rows(kernels: NativeKernels) -> None:
    """A batch without visual tokens leaves their experts no row: every kernel takes that."""
    empty = torch.empty(1, 0, 64)
    made = implementations(kernels)
    scale = torch.tensor([0.02, 0.03])
    count = torch.tensor([0])
    xq, columns = made["mqc::rms_norm_quantize"](empty, 1e-6, scale, count, torch.tensor([3]))
    assert xq.shape == (1, 0, 64) and columns.shape == (1, 0, 1)
    act = ("silu", True, 32, scale, count, torch.tensor([3]))
    assert made["mqc::activation_quantize"](empty, *act)[0].shape == (1, 0, 32)
    assert made["mqc::quantize_static"](empty, scale, count).shape == (1, 0, 64)
    assert made["mqc::hadamard"](empty, 64).shape == (1, 0, 64)
    packed, layout = pack_linear(torch.ones(70, 64, dtype=torch.int8), 64)
    terms = (
        torch.ones(70),
        scale,
        count,
        None,
        columns,
        torch.ones(70, 1),
        empty.new_empty(1, 0, 70),
    )
    y = made["mqc_cuda::linear"](xq, packed, *terms, int(layout), torch.float32)
    assert y.shape == (1, 0, 70)


def test_operators_that_are_registered_for_the_device(kernels: NativeKernels) -> None:
    """The functional forms against the operators' definitions, unsigned integers too."""
    made = implementations(kernels)
    assert made.keys() >= {"mqc_cuda::linear", "mqc::rms_norm_quantize", "mqc::quantize_static"}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 150, generator=generator)
    scale, mask = torch.tensor([0.02, 0.05]), torch.rand(2, 3, generator=generator) < 0.5
    split = torch.tensor([3, 140])
    ops = torch.ops.mqc
    for unsigned in (False, True):
        args = (1e-6, scale, mask, split, unsigned)
        found = made["mqc::rms_norm_quantize"](x, *args)
        for mine, other in zip(found, ops.rms_norm_quantize(x, *args), strict=True):
            torch.testing.assert_close(mine, other)
    act = ("silu", True, 1, scale, mask, None)
    one = made["mqc::activation_quantize"](x, *act)
    assert one[1].shape == (2, 3, 0)
    assert one[0].equal(ops.activation_quantize(x, *act)[0])
    quantized = made["mqc::quantize_static"](x, scale, mask)
    assert quantized.equal(ops.quantize_static(x, scale, mask))
    y = torch.randn(4, 64, generator=generator)
    torch.testing.assert_close(made["mqc::hadamard"](y, 32), ops.hadamard(y, 32))
    table = torch.randint(-127, 128, (9, 24), generator=generator, dtype=torch.int8)
    ids, sizes = torch.tensor([[1, 8], [0, 3]]), torch.rand(9, generator=generator)
    found = made["mqc::embedding_w8"](ids, table, sizes)
    torch.testing.assert_close(found, ops.embedding_w8(ids, table, sizes))
    weight = torch.randint(-8, 8, (70, 150), generator=generator, dtype=torch.int8)
    packed, layout = pack_linear(pack_int4(weight), 150)
    rest = (torch.rand(70), scale, mask, torch.rand(70), None, None, torch.rand(2, 3, 70))
    linear = made["mqc_cuda::linear"](quantized, packed, *rest, int(layout), torch.float32)
    assert linear.equal(LINEAR(quantized, packed, *rest, int(layout), torch.float32))


def test_refused_operators_are_not_asked_of_the_kernels_again(
    kernels: NativeKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the library has no kernel for is computed by definition, also where torch.ops.mqc leads
    back to the kernels, and without a copy from the host, which no graph could record."""
    assert hadamard_form(344)[0] > 160
    x, scale = torch.randn(3, 688), torch.tensor([0.02])
    act = ("silu", True, 344, scale, None, torch.tensor([5]))
    wide, norm = torch.randn(2, 20000), (1e-6, scale, None, torch.tensor([7]))
    expected = (
        *torch.ops.mqc.activation_quantize(x, *act),
        *torch.ops.mqc.rms_norm_quantize(wide, *norm),
        torch.ops.mqc.hadamard(x, 344),
    )
    library = torch.library.Library("mqc", "IMPL")
    for name, function in implementations(kernels).items():
        if name.startswith("mqc::"):
            library.impl(name.removeprefix("mqc::"), function, "CPU")
    try:
        for _ in range(2):  # factors are made by the first call, and kept
            found = (
                *torch.ops.mqc.activation_quantize(x, *act),
                *torch.ops.mqc.rms_norm_quantize(wide, *norm),
                torch.ops.mqc.hadamard(x, 344),
            )
            monkeypatch.delattr("mqc.backends.cuda.definitions.hadamard_factors", raising=False)
    finally:
        library._destroy()
    for one, other in zip(found, expected, strict=True):
        assert one.equal(other)


def test_rows_beyond_the_shared_memory_of_a_device(kernels: NativeKernels) -> None:
    """A row that fits an H100's blocks and no other device's: refused there, not failed."""
    x, scale = torch.randn(1, 32768), torch.tensor([0.02])
    xq = torch.empty(1, 32768, dtype=torch.int8)

    def refused(name: str, arguments: object, stream: int = 0) -> None:
        raise UnsupportedError("a row takes 131072 bytes of shared memory, a block has 101376")

    small = NativeKernels(SimpleNamespace(launch=refused), CPU, stream=lambda: 0)  # type: ignore[arg-type]
    small.activation_quantize(xq, None, x, "gelu", False, 1024, scale, None, None)
    assert xq.equal(torch.ops.mqc.activation_quantize(x, "gelu", False, 1024, scale, None, None)[0])


def test_rows_as_the_linear_reads_them() -> None:
    x = torch.arange(60, dtype=torch.int8).reshape(2, 3, 10)
    rows = aligned_rows(x)
    assert rows.shape == (6, 10) and rows.stride() == (16, 1) and rows.equal(x.reshape(6, 10))
    assert hadamard_form(592) == (148, 2) and hadamard_form(640) == (20, 5)
    assert hadamard_form(1) == (1, 0) and hadamard_form(64) == (1, 6)
    assert hadamard_form(18944) == (148, 7)
