"""Rotary embedding, cache writes and attention over the cache, on the emulator against torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mqc.cuda.library import AttentionArgs, DType, KernelError, Rotary, RotaryArgs, RotateArgs

TORCH = {DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32}


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """x [B, S, H, D] turned on its leading values, with the rounding of unfused operators."""
    width = cos.shape[-1]
    head, rest = x[..., :width], x[..., width:]
    if rotary == Rotary.HALF:
        left, right = head.chunk(2, dim=-1)
        partner = torch.cat((-right, left), dim=-1)
    else:
        partner = torch.stack((-head[..., 1::2], head[..., ::2]), dim=-1).flatten(-2)
    wide = torch.promote_types(x.dtype, cos.dtype)
    turned = head.to(wide) * cos[:, :, None] + partner.to(wide) * sin[:, :, None]
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("rotary", "width", "wide_table"),
    [
        (Rotary.HALF, 32, False),
        (Rotary.HALF, 16, True),
        (Rotary.INTERLEAVED, 32, False),
        (Rotary.NONE, 0, False),
    ],
)
def test_rotary_cache(
    emulated: Any, dtype: DType, int8: bool, rotary: Rotary, width: int, wide_table: bool
) -> None:
    emulated.configure(seed=width)
    torch_dtype = TORCH[dtype]
    batch, tokens, q_heads, kv_heads, dim, capacity, past = 2, 3, 18, 2, 32, 11, 4
    total = (q_heads + 2 * kv_heads) * dim
    qkv = torch.randn(batch, tokens, total).to(torch_dtype)
    before = qkv.clone()
    table = torch.float32 if wide_table else torch_dtype
    angles = torch.rand(batch, tokens, max(width, 1))
    cos, sin = angles.cos().to(table), angles.sin().to(table)
    size = (batch, kv_heads, capacity, dim)
    cache_dtype = torch.int8 if int8 else torch_dtype
    caches = [torch.full(size, 55, dtype=cache_dtype) for _ in range(2)]
    scales = [torch.full(size[:3], 9.0) for _ in range(2)]
    position = torch.tensor([past])
    item = qkv.element_size()
    emulated.launch(
        "rotary_cache",
        RotaryArgs(
            dtype=dtype,
            cache_dtype=DType.I8 if int8 else dtype,
            rotary=rotary,
            batch=batch,
            tokens=tokens,
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=dim,
            rotary_dim=width,
            table_dtype=DType.F32 if wide_table else dtype,
            capacity=capacity,
            q_stride=total,
            k_stride=total,
            v_stride=total,
            q=qkv.data_ptr(),
            k=qkv.data_ptr() + q_heads * dim * item,
            v=qkv.data_ptr() + (q_heads + kv_heads) * dim * item,
            cos=cos.data_ptr() if width else None,
            sin=sin.data_ptr() if width else None,
            past=position.data_ptr(),
            key_cache=caches[0].data_ptr(),
            value_cache=caches[1].data_ptr(),
            key_scale=scales[0].data_ptr() if int8 else None,
            value_scale=scales[1].data_ptr() if int8 else None,
        ),
    )
    parts = before.split([q_heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    q, k, v = (part.reshape(batch, tokens, -1, dim) for part in parts)
    if width:
        q, k = rotated(q, cos, sin, rotary), rotated(k, cos, sin, rotary)
    assert torch.equal(qkv[..., : q_heads * dim], q.flatten(2))
    assert torch.equal(qkv[..., q_heads * dim :], before[..., q_heads * dim :])
    for cache, scale, rows in zip(caches, scales, (k, v), strict=True):
        rows = rows.transpose(1, 2)
        written = cache[:, :, past : past + tokens]
        if int8:
            step = rows.float().abs().amax(-1) / 127
            assert torch.equal(scale[:, :, past : past + tokens], step)
            assert torch.equal(written, torch.round(rows.float() / step[..., None]).to(torch.int8))
            assert bool((scale[:, :, :past] == 9).all())
        else:
            assert torch.equal(written, rows)
        assert bool((cache[:, :, :past] == 55).all())
        assert bool((cache[:, :, past + tokens :] == 55).all())


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize(
    ("rotary", "dim", "width", "wide_table"),
    [(Rotary.HALF, 80, 80, True), (Rotary.INTERLEAVED, 36, 12, True), (Rotary.HALF, 16, 8, False)],
)
def test_rotate(
    emulated: Any, dtype: DType, rotary: Rotary, dim: int, width: int, wide_table: bool
) -> None:
    """Heads that lie between others; two sequences turn by the angles of one."""
    emulated.configure(seed=dim)
    torch_dtype = TORCH[dtype]
    batch, tokens, heads, spare = 2, 5, 11, 3
    x = torch.randn(batch, tokens, heads + spare, dim).to(torch_dtype)
    angles = torch.rand(1, tokens, width) * 6
    table = torch.float32 if wide_table else torch_dtype
    cos, sin = angles.cos().to(table), angles.sin().to(table)
    y = torch.full((batch, tokens, heads + 1, dim), 7.0, dtype=torch_dtype)
    emulated.launch(
        "rotate",
        RotateArgs(
            dtype=dtype,
            rotary=rotary,
            heads=heads,
            head_dim=dim,
            rotary_dim=width,
            table_dtype=DType.F32 if wide_table else dtype,
            rows=batch * tokens,
            angle_rows=tokens,
            x_stride=x.stride(1),
            y_stride=y.stride(1),
            x=x.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            y=y.data_ptr(),
        ),
    )
    assert torch.equal(y[:, :, :heads], rotated(x[:, :, :heads], cos, sin, rotary))
    assert bool((y[:, :, heads:] == 7).all())


def run_attention(
    library: Any,
    dtype: DType,
    *,
    batch: int = 1,
    tokens: int = 1,
    q_heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    capacity: int = 300,
    past: int = 200,
    int8: bool = False,
    masked: bool = False,
    splits: int = 0,
    seed: int = 0,
) -> None:
    torch_dtype = TORCH[dtype]
    generator = torch.Generator().manual_seed(seed + past)
    q_stride, keys = q_heads * dim + 16, past + tokens
    q = torch.randn(batch, tokens, q_stride, generator=generator).to(torch_dtype)
    size = (batch, kv_heads, capacity, dim)
    wide = [torch.randn(size, generator=generator) for _ in range(2)]
    scales = [torch.rand(size[:3], generator=generator) * 0.01 + 0.01 for _ in range(2)]
    if int8:
        caches = [torch.round(w * 40).clamp(-127, 127).to(torch.int8) for w in wide]
        values = [c.float() * s[..., None] for c, s in zip(caches, scales, strict=True)]
    else:
        caches = [w.to(torch_dtype) for w in wide]
        values = [c.float() for c in caches]
    for cache in caches:  # rows past the valid ones must not matter
        cache[:, :, keys:] = 127 if int8 else float("nan")
    mask_stride = keys + 5
    mask = torch.rand(batch, tokens, mask_stride, generator=generator) < 0.5
    mask[:, :, past] = True
    out = torch.full((batch, tokens, q_stride), 7.0, dtype=torch_dtype)
    position = torch.tensor([past])
    arguments = AttentionArgs(
        dtype=dtype,
        cache_dtype=DType.I8 if int8 else dtype,
        batch=batch,
        tokens=tokens,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=dim,
        splits=splits,
        scale=1 / math.sqrt(dim),
        capacity=capacity,
        q_stride=q_stride,
        out_stride=q_stride,
        mask_stride=mask_stride,
        q=q.data_ptr(),
        key_cache=caches[0].data_ptr(),
        value_cache=caches[1].data_ptr(),
        key_scale=scales[0].data_ptr() if int8 else None,
        value_scale=scales[1].data_ptr() if int8 else None,
        mask=mask.data_ptr() if masked else None,
        past=position.data_ptr(),
        out=out.data_ptr(),
    )
    size_needed = library.workspace("attention", arguments)
    workspace = torch.randint(0, 255, (size_needed + 64,), dtype=torch.uint8)
    workspace[: 4096 * 4] = 0
    arguments.workspace, arguments.workspace_bytes = workspace.data_ptr(), size_needed
    heads = q[..., : q_heads * dim].reshape(batch, tokens, q_heads, dim).transpose(1, 2).float()
    causal = torch.arange(keys) <= past + torch.arange(tokens)[:, None]
    allowed = mask[:, None, :, :keys] if masked else causal
    want = torch.nn.functional.scaled_dot_product_attention(
        heads, *(v[:, :, :keys] for v in values), attn_mask=allowed, enable_gqa=True
    )
    for _ in range(2):
        out[..., : q_heads * dim] = 7.0
        library.launch("attention", arguments)
        got = out[..., : q_heads * dim].float()
        tolerance = {DType.BF16: 1e-2, DType.F16: 2e-3, DType.F32: 2e-6}[dtype]
        torch.testing.assert_close(
            got, want.transpose(1, 2).flatten(2), rtol=tolerance, atol=tolerance
        )
        assert bool((out[..., q_heads * dim :] == 7).all())
    assert size_needed == 0 or not workspace[: 4096 * 4].any()


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize("splits", [1, 3])
def test_tensor_core_attention(
    emulated: Any, dtype: DType, int8: bool, dim: int, splits: int
) -> None:
    emulated.configure(seed=dim + splits)
    run_attention(emulated, dtype, int8=int8, dim=dim, splits=splits)
    run_attention(
        emulated,
        dtype,
        int8=int8,
        dim=dim,
        splits=splits,
        batch=2,
        tokens=3,
        q_heads=14,
        masked=True,
    )


@pytest.mark.parametrize("asynchrony", [0, 1, 2])
@pytest.mark.parametrize("past", [0, 1, 63, 64, 290])
def test_attention_lengths(emulated: Any, asynchrony: int, past: int) -> None:
    emulated.configure(seed=past, asynchrony=asynchrony)
    run_attention(emulated, DType.BF16, past=past, splits=5, capacity=291)
    run_attention(emulated, DType.F16, past=past, int8=True, splits=2, capacity=291)


def test_attention_of_many_tokens(emulated: Any) -> None:
    """Several tiles of rows; a causal tile stops at its last token."""
    emulated.configure(seed=5)
    run_attention(emulated, DType.F16, tokens=70, past=40, splits=2)
    run_attention(emulated, DType.BF16, tokens=21, past=0, q_heads=6, int8=True)


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dim", [16, 80])
def test_plain_attention(emulated: Any, dtype: DType, int8: bool, dim: int) -> None:
    emulated.configure(seed=dim)
    run_attention(emulated, dtype, int8=int8, dim=dim, past=37, tokens=2, batch=2, masked=True)
    run_attention(emulated, dtype, int8=int8, dim=dim, past=0, tokens=3)


def test_bad_arguments_are_refused(emulated: Any) -> None:
    good = {"dtype": DType.BF16, "cache_dtype": DType.BF16, "batch": 1, "tokens": 1}
    good |= {"q_heads": 4, "kv_heads": 2, "head_dim": 64, "capacity": 128}

    def refused(match: str, name: str, **fields: Any) -> None:
        struct = AttentionArgs if name == "attention" else RotaryArgs
        with pytest.raises(KernelError, match=match):
            emulated.launch(name, struct(**(good | fields)))

    refused("4 query heads of 3 key heads", "attention", kv_heads=3)
    refused("head_dim 512", "attention", head_dim=512)
    refused("q, a cache, past or out", "attention")
    refused("dtype of q or int8", "attention", cache_dtype=DType.F32)
    refused("cos and sin", "rotary_cache", rotary=Rotary.HALF)
    refused("k, v, past or a cache", "rotary_cache")

    def unturned(match: str, **fields: Any) -> None:
        given = {"dtype": DType.BF16, "table_dtype": DType.BF16, "rotary": Rotary.HALF}
        given |= {"rows": 1, "angle_rows": 1, "heads": 2, "head_dim": 64, "rotary_dim": 64}
        with pytest.raises(KernelError, match=match):
            emulated.launch("rotate", RotateArgs(**(given | fields)))

    unturned("not half or interleaved", rotary=Rotary.NONE)
    unturned("head_dim 512", head_dim=512)
    unturned("rotary_dim 66", rotary_dim=66)
    unturned("0 rows of angles", angle_rows=0)
    unturned("x, y, cos or sin is NULL")
