"""Lowered cuda programs on the CPU, every kernel by its definition: equal to the reference."""

from __future__ import annotations

from collections import Counter
from typing import Any

import cuda_cases
import pytest
import tiny
import torch

from mqc.backends.cuda import lower as lowering
from mqc.backends.cuda import recurrence
from mqc.backends.cuda.decode import DecodeStep
from mqc.backends.cuda.engine import CudaEngine, is_causal
from mqc.backends.cuda.executor import Arena, Call, Executor
from mqc.backends.cuda.kernels import ReferenceKernels, quantize_rows
from mqc.backends.cuda.lower import lower
from mqc.backends.cuda.ops import LINEAR, LINEAR_A16
from mqc.backends.onnx.target import OnnxTarget
from mqc.cuda.pack import Layout, pack_linear
from mqc.errors import TargetError, UsageError
from mqc.host import KeyTable, ProgramEngine, Sampling, generate, generate_batch
from mqc.ir.edit import tensor_type
from mqc.numerics.packing import pack_int4


def engine(name: str, dtype: str = "f32", **options: object) -> CudaEngine:
    program = cuda_cases.lowered(name, dtype).copy()
    return CudaEngine(program, ReferenceKernels(), **{"capacity": 128, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_bit_equal_to_the_reference(name: str) -> None:
    """All kinds of prompts in one batch, whole and in chunks, padded on either side."""
    reference = ProgramEngine(cuda_cases.quantized(name))
    for chunk, padding in ((None, "right"), (13, "left")):
        expected = cuda_cases.logits(reference, name, chunk, padding)
        assert cuda_cases.logits(engine(name), name, chunk, padding).equal(expected)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_generates_the_same_tokens(name: str) -> None:
    """Recorded decode steps, alone and in batches that do not fill their bucket."""
    runnable, texts = tiny.runnable(name), tiny.conversations()
    prompts = [runnable.prompt(messages) for messages in texts.values()]
    reference, cuda = ProgramEngine(cuda_cases.quantized(name)), engine(name)
    assert cuda.greedy
    expected = generate_batch(reference, prompts, max_new_tokens=8, stop=())
    found = generate_batch(cuda, prompts, max_new_tokens=8, stop=())
    assert [item.tokens for item in found] == [item.tokens for item in expected]
    drawn = Sampling(temperature=1.5, top_p=0.9, seed=3)
    for sampling in (None, drawn):  # both from recorded steps
        how = {"max_new_tokens": 8, "stop": (), "sampling": sampling}
        alone = generate(cuda, prompts[1], **how)
        assert alone.tokens == generate(reference, prompts[1], **how).tokens


def test_steps_that_go_on_send_their_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions, mask and past are set once a text: the steps move them on."""
    name, started = "tiny-llava", []
    start = DecodeStep.start

    def counted(step: DecodeStep, tokens: torch.Tensor, *rest: Any) -> None:
        started.append(len(tokens))
        start(step, tokens, *rest)

    monkeypatch.setattr(DecodeStep, "start", counted)
    cuda, runnable = engine(name, capacity=256), tiny.runnable(name)
    prompts = [runnable.prompt(messages) for messages in tiny.conversations().values()]
    reference = ProgramEngine(cuda_cases.quantized(name))
    for batch in (prompts[:1], prompts[:3], prompts[1:2]):
        found, expected = (
            generate_batch(e, batch, max_new_tokens=6, stop=()) for e in (cuda, reference)
        )
        assert [item.tokens for item in found] == [item.tokens for item in expected]
    assert started == [1, 3, 1]


def test_row_lookup_and_reordering_agree() -> None:
    """AIFS as a permutation, and as scales looked up by row: the same integers everywhere."""
    name = "tiny-qwen2-vl"
    moved = lower(cuda_cases.quantized(name, ("aifs=true",)), "f32")[0]
    assert moved.facts["kv_order"] == "aifs"
    reordered = CudaEngine(moved, ReferenceKernels(), capacity=64)
    plain = engine(name, capacity=64)
    assert plain.facts.get("kv_order", "natural") == "natural"
    for chunk, padding in ((None, "right"), (13, "left")):
        found = cuda_cases.logits(reordered, name, chunk, padding)
        expected = cuda_cases.logits(plain, name, chunk, padding)
        assert (found - expected).abs().max() < 0.02 * expected.abs().max()
        assert found.argmax(-1).equal(expected.argmax(-1))


def test_one_kernel_a_linear() -> None:
    """A decoder layer: norm, qkv, attention, quantize, o, norm, gate and up, activation, down.
    Then the last norm and the head."""
    decoder = cuda_cases.lowered("tiny-qwen2-vl").components["decoder"]
    counts = Counter(str(node.target) for node in decoder.graph.nodes)
    assert counts["mqc_cuda.linear.default"] == 4 * 4 + 1
    assert counts["mqc.rms_norm_quantize.default"] == 2 * 4 + 1
    assert counts["mqc.attention.default"] == counts["mqc.activation_quantize.default"] == 4
    assert counts["mqc.quantize_static.default"] == 4  # of what attention gives
    assert "aten.add.Tensor" not in counts and "mqc.hadamard.default" not in counts


@pytest.mark.parametrize("name", tiny.NAMES)
def test_towers_stay_in_half_precision(name: str) -> None:
    """One call turns and attends; nothing but scales, angles and integers is float32."""
    tower = cuda_cases.lowered(name, "bf16").components["vision"]
    counts = Counter(str(node.target) for node in tower.graph.nodes)
    layers = counts["mqc.attention_full.default"]
    assert layers == 4 and "aten.scaled_dot_product_attention.default" not in counts
    attend = tower.graph.find_nodes(op="call_function", target=torch.ops.mqc.attention_full.default)
    for node in attend:
        assert node.args[1] is None  # packed: heads are read where the linear left them
        assert tensor_type(node).dtype == tensor_type(node.args[0]).dtype == torch.bfloat16
    assert counts["aten.to.dtype"] <= 1


def test_prompts_longer_than_the_buffer() -> None:
    """Buffers grow, by prefill and by decoding, and keep what they hold."""
    name = "tiny-llava"
    reference = ProgramEngine(cuda_cases.quantized(name))
    prompt = tiny.runnable(name).prompt(tiny.conversations()["text"])
    small = engine(name, capacity=64)
    count = 80 - len(prompt)
    expected = generate(reference, prompt, max_new_tokens=count, stop=()).tokens
    assert generate(small, prompt, max_new_tokens=count, stop=()).tokens == expected


def test_program_whose_attention_was_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches that grow stay tensors; such a program runs without recorded steps."""
    name = "tiny-llava"
    fusions = tuple(make for make in lowering.FUSIONS if make().name != "fuse-attention")
    monkeypatch.setattr(lowering, "FUSIONS", fusions)
    program = cuda_cases.quantized(name)
    cuda = CudaEngine(lower(program, "f32")[0], ReferenceKernels())
    assert not cuda.greedy
    expected = cuda_cases.logits(ProgramEngine(program), name, 13, "left")
    assert cuda_cases.logits(cuda, name, 13, "left").equal(expected)
    with pytest.raises(UsageError, match="caches grow"):
        CudaEngine(lower(program, "f32")[0], ReferenceKernels(), kv_cache="int8")


def test_two_generations_at_once_do_not_share_memory() -> None:
    name = "tiny-llava"
    cuda, runnable, texts = engine(name), tiny.runnable(name), tiny.conversations()
    one, other = (runnable.prompt(texts[kind]) for kind in ("image", "last"))
    first = [generate(cuda, prompt, max_new_tokens=6, stop=()).tokens for prompt in (one, other)]
    from mqc.host import steps

    mixed: tuple[list[int], list[int]] = ([], [])
    pair = [steps(cuda, [prompt], max_new_tokens=6) for prompt in (one, other)]
    for left, right in zip(*pair, strict=True):
        mixed[0].append(left.id)
        mixed[1].append(right.id)
    assert list(mixed) == first


class Poisoning(ReferenceKernels):
    """Overwrites, before every kernel, what its result's place still holds."""

    def linear(self, out: torch.Tensor, *rest: Any) -> None:
        """Rubbish, then the result."""
        residual = rest[8]
        assert residual is None or residual.data_ptr() != out.data_ptr()
        out.fill_(float("nan"))
        super().linear(out, *rest)

    def activation_quantize(self, xq: torch.Tensor, *rest: Any) -> None:
        """Rubbish, then the result."""
        xq.fill_(-128)
        super().activation_quantize(xq, *rest)


def test_nothing_reads_memory_of_values_that_have_died() -> None:
    name = "tiny-internvl"
    program = cuda_cases.lowered(name).copy()
    found = cuda_cases.logits(CudaEngine(program, Poisoning(), capacity=128), name)
    assert found.equal(cuda_cases.logits(engine(name), name))


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_half_types_stay_close(dtype: str) -> None:
    name = "tiny-qwen2-vl"
    steps = tuple(range(11, 31))
    exact = cuda_cases.logits(engine(name), name, steps=steps)
    half = cuda_cases.logits(engine(name, dtype), name, steps=steps)
    probabilities = torch.softmax(exact, -1)
    kl = (probabilities * (torch.log_softmax(exact, -1) - torch.log_softmax(half, -1))).sum(-1)
    assert float(kl.mean()) < 0.03  # rounding of rows tips some int8 steps, in either type
    assert (half.argmax(-1) == exact.argmax(-1)).float().mean() > 0.93


def test_half_program_keeps_positions_and_scales_in_float() -> None:
    program = cuda_cases.lowered("tiny-qwen2-vl", "bf16")
    decoder = program.components["decoder"]
    assert program.dtype == torch.bfloat16
    for node in decoder.graph.nodes:
        if node.target is torch.ops.aten.cos.default:
            assert tensor_type(node).dtype == torch.float32
        if node.target is LINEAR:
            scale, x_scale = node.args[2], node.args[3]
            assert tensor_type(scale).dtype == tensor_type(x_scale).dtype == torch.float32
            assert tensor_type(node).dtype == node.args[10]
    assert decoder.input("inputs_embeds").type.dtype == torch.bfloat16
    assert decoder.input("key_cache_0").type.dtype == torch.bfloat16
    assert decoder.output("logits").type.dtype == torch.float32
    assert program.components["vision"].output("image_embeds").type.dtype == torch.bfloat16


def test_int8_cache_stays_close() -> None:
    name = "tiny-qwen2-vl"
    exact, found = (
        cuda_cases.logits(engine(name, kv_cache=kind), name) for kind in ("float", "int8")
    )
    assert not found.equal(exact)
    assert (found - exact).abs().max() < 0.15 * exact.abs().max()
    assert (found.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9
    with pytest.raises(UsageError, match="int4"):
        engine(name, kv_cache="int4")


def test_rows_to_int8() -> None:
    q, scale = quantize_rows(torch.tensor([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]]))
    assert q.tolist() == [[64, -127, 0], [0, 0, 0]]  # 63.5 rounds to even
    assert scale.tolist() == pytest.approx([2 / 127, 1.0])


@pytest.mark.parametrize("bits", [4, 8])
def test_linear_on_packed_weights(bits: int) -> None:
    """The operator equals the one on plain weights; n and k fill no tile."""
    generator = torch.Generator().manual_seed(bits)
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    q = torch.randint(low, high, (70, 150), generator=generator, dtype=torch.int8)
    stored = pack_int4(q) if bits == 4 else q
    xq = torch.randint(-127, 128, (2, 5, 150), generator=generator, dtype=torch.int8)
    w_scale, bias = (torch.rand(70, generator=generator) for _ in range(2))
    x_scale, mask = torch.tensor([0.1, 0.3]), torch.rand(2, 5, generator=generator) < 0.5
    x_split, w_split = torch.rand(2, 5, 2), torch.rand(70, 2)
    residual = torch.rand(2, 5, 70)
    plain = torch.ops.mqc.linear_w4a8 if bits == 4 else torch.ops.mqc.linear_w8a8
    packed, layout = pack_linear(stored, 150)
    assert layout == (Layout.W4_64X128 if bits == 4 else Layout.W8_64X128)
    terms = (w_scale, x_scale, mask, bias, x_split, w_split, residual)
    expected = plain(xq, stored, *terms)
    assert LINEAR(xq, packed, *terms, int(layout), torch.float32).equal(expected)
    half = LINEAR(xq, packed, *terms[:-1], residual.bfloat16(), int(layout), torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=2**-6, atol=2.0)


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 96), (8, 32)])
def test_weight_groups_are_bit_equal_to_the_reference(bits: int, group: int) -> None:
    """Groups of 32 as they are; of 96 in parts, which round otherwise."""
    name = "tiny-llava"
    overrides = (f"decoder.weights.group_size={group}", f"decoder.weights.bits={bits}")
    program = cuda_cases.quantized(name, overrides)
    low = lower(program, "f32")[0]
    linears = [n for n in low.components["decoder"].graph.nodes if n.target is LINEAR]
    assert {(Layout(n.args[9]).bits, Layout(n.args[9]).group) for n in linears} >= {(bits, 32)}
    found = cuda_cases.logits(CudaEngine(low, ReferenceKernels(), capacity=128), name)
    expected = cuda_cases.logits(ProgramEngine(program), name)
    if group == 32:
        assert found.equal(expected)
    else:
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_weights_that_no_kernel_takes_are_refused() -> None:
    program = cuda_cases.quantized("tiny-llava", ("decoder.weights.group_size=16",))
    for_onnx = OnnxTarget().for_device("cuda").lower
    for write in (lower, for_onnx):
        with pytest.raises(TargetError, match="with a scale for every 16 inputs") as caught:
            write(program)
        assert "group_size" in str(caught.value.hint)
    OnnxTarget().lower(program)
    with pytest.raises(TargetError, match="'int8'"):
        lower(cuda_cases.quantized("tiny-llava"), "int8")


def test_weight_only_program_runs() -> None:
    """Float activations, integer weights in tower, decoder and head: as in recipe weight-only. In
    bf16 only the places of rounding change. (Float sums depend on the number of rows, so this is
    not bit-equal; the operator is, below.)"""
    name = "tiny-llava"
    program = cuda_cases.quantized(name, cuda_cases.WEIGHT_ONLY)
    low = lower(program, "f32")[0]
    nodes = [node for component in low for node in component.graph.nodes]
    packed = [node for node in nodes if node.target is LINEAR_A16]
    assert {Layout(node.args[7]).bits for node in packed} == {4, 8} and len(packed) > 4 * 7
    assert not [node for node in nodes if node.target in (LINEAR, torch.ops.aten.linear.default)]
    found = cuda_cases.logits(CudaEngine(low, ReferenceKernels()), name)
    expected = cuda_cases.logits(ProgramEngine(program), name)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    half = lower(program, "bf16")[0]
    assert half.components["decoder"].output("logits").type.dtype == torch.float32
    near = cuda_cases.logits(CudaEngine(half, ReferenceKernels()), name)
    assert (near - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("bits", [4, 8])
def test_float_linear_on_packed_weights(bits: int) -> None:
    """The operator equals the one on plain weights; n and k fill no tile."""
    generator = torch.Generator().manual_seed(bits)
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    q = torch.randint(low, high, (70, 192), generator=generator, dtype=torch.int8)
    stored = pack_int4(q) if bits == 4 else q
    x, residual = torch.randn(2, 5, 192, generator=generator), torch.rand(2, 5, 70)
    scale, bias = torch.rand(70, 3, generator=generator), torch.rand(70, generator=generator)
    terms = (bias, torch.rand(2, 5, 2), torch.rand(70, 2))
    plain = torch.ops.mqc.linear_w4a16 if bits == 4 else torch.ops.mqc.linear_w8a16
    packed, layout = pack_linear(stored, 192, scale)
    how = (packed, torch.ones(70), *terms)
    expected = plain(x, stored, scale, *terms, residual)
    assert LINEAR_A16(x, *how, residual, int(layout), torch.float32).equal(expected)
    half = (x.bfloat16(), *how, residual.bfloat16(), int(layout))
    got = LINEAR_A16(*half, torch.bfloat16)
    assert got.dtype == torch.bfloat16
    expected = plain(x.bfloat16().float(), stored, scale, *terms, residual)
    torch.testing.assert_close(got.float(), expected, rtol=2**-6, atol=0.1)


@pytest.mark.parametrize("tokens", [1, 9, 64, 150])
def test_recurrence_in_chunks(tokens: int) -> None:
    """The gated delta rule by matrix products is that token by token, rows of padding included."""
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(2, 3, *shape, generator=generator, dtype=torch.float64)

    q, k, v = random(tokens, 16), random(tokens, 16), random(tokens, 10)
    k = k / k.norm(dim=-1, keepdim=True)
    valid = torch.arange(tokens) >= tokens // 3
    decay, beta = -4 * random(tokens).abs() * valid, random(tokens).sigmoid() * valid
    args = (q, k, v, decay, beta, random(16, 10))
    expected = torch.ops.mqc.gated_delta(*args)
    for found in (recurrence.gated_delta(*args), recurrence.by_length(*args)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    narrow = recurrence.by_length(*(x.float() for x in args))
    torch.testing.assert_close(narrow, expected.float(), rtol=1e-4, atol=1e-4)


def test_causal_masks_are_recognised() -> None:
    table = KeyTable(2)
    valid, visual = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    assert is_causal(table.mask(valid))
    table.append(visual, valid)
    assert is_causal(table.mask(valid))
    padded = valid.clone()
    padded[1, 0] = False
    assert not is_causal(table.mask(padded))
    blocks = torch.tensor([[0, 0, -1, -1, -1]] * 2)
    assert not is_causal(table.mask(valid, blocks))


def test_executor_frees_and_creates_on_the_device() -> None:
    """Every component runs alone, with an arena for exactly its sizes."""
    program = cuda_cases.lowered("tiny-llava").copy()
    kernels = ReferenceKernels()
    part = program.components["embed"]
    executor = Executor(part, program.params, kernels)
    call = Call(Arena((), {}, kernels.device))
    (rows,) = executor.run({"input_ids": torch.tensor([[1, 2]])}, call)
    assert rows.shape[:2] == (1, 2)
