"""The row, cache and gather kernels against torch on the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mqc.cuda.library import (
    Activation,
    ActivationArgs,
    Arguments,
    AttentionArgs,
    DType,
    EmbeddingArgs,
    Library,
    NormArgs,
    Rotary,
    RotaryArgs,
    RotateArgs,
    TopKArgs,
)
from mqc.cuda.pack import hadamard_table
from mqc.numerics.hadamard import apply_hadamard
from tools.gpu_check.common import DTYPES, Recorder, stream_of, synchronize, workspace

ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-6}


class Checks:
    """One check a kernel and size; each records its largest error in units of its tolerance."""

    def __init__(self, library: Library, recorder: Recorder, generator: torch.Generator) -> None:
        self.library, self.recorder, self.generator = library, recorder, generator
        self.device = generator.device

    def real(self, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, device=self.device, generator=self.generator).to(dtype)

    def launch(self, name: str, arguments: Arguments) -> None:
        if hasattr(arguments, "workspace"):
            area = workspace(self.library.workspace(name, arguments), self.device)
            arguments.workspace, arguments.workspace_bytes = area.data_ptr(), area.numel()
        self.library.launch(name, arguments, stream_of(self.device))
        synchronize(self.device)

    def close(self, case: str, got: Tensor, want: Tensor, tolerance: float) -> None:
        """Record the largest difference, relative to `tolerance` times the largest value."""
        bound = tolerance * float(want.float().abs().max())
        error = float((got.float() - want.float()).abs().max()) / max(bound, 1e-30)
        self.recorder.add(case=case, wrong=int(not error <= 1), error=error)

    def exact(self, case: str, got: Tensor, want: Tensor) -> None:
        self.recorder.add(case=case, wrong=int((got != want).sum()))

    def quantized(self, case: str, xq: Tensor, y: Tensor, scale: Tensor) -> None:
        """The integers are exactly those of the float result."""
        want = torch.round(y.float() / scale).clamp(-127, 127).to(torch.int8)
        self.exact(f"{case}, integers", xq, want)

    def norm(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        case = f"norm {rows} x {columns} {dtype}"
        if not self.recorder.start(case):
            return
        x, scale = self.real(rows, columns, dtype=dtype), torch.full((1,), 0.02, device=self.device)
        h = torch.full_like(x, math.nan)
        xq = torch.full((rows, columns), -128, dtype=torch.int8, device=self.device)
        fields = {"rows": rows, "columns": columns, "eps": 1e-6, "dtype": DTYPES[dtype]}
        strides = dict.fromkeys(("x_stride", "xq_stride", "h_stride"), columns)
        pointers = {"x": x.data_ptr(), "h": h.data_ptr(), "xq": xq.data_ptr()}
        pointers["scale"] = scale.data_ptr()
        self.launch("rms_norm_quantize", NormArgs(**fields, **strides, **pointers))
        want = torch.rms_norm(x.float(), [columns], None, 1e-6)
        self.close(case, h, want, ULP[dtype])
        self.quantized(case, xq, h, scale)

    def activation(
        self, rows: int, columns: int, base: int, log2: int, dtype: torch.dtype, gated: bool = True
    ) -> None:
        case = f"activation {rows} x {columns} {base}*2^{log2} {dtype}"
        if not self.recorder.start(case):
            return
        x = self.real(rows, columns * (2 if gated else 1), dtype=dtype)
        scale = torch.full((1,), 0.02, device=self.device)
        y = torch.full((rows, columns), math.nan, dtype=dtype, device=self.device)
        xq = torch.full((rows, columns), -128, dtype=torch.int8, device=self.device)
        x_split = torch.full((rows, 1), math.nan, dtype=dtype, device=self.device)
        split = torch.zeros(1, dtype=torch.int32, device=self.device)
        table = hadamard_table(base).to(self.device) if base > 1 else None
        arguments = ActivationArgs(
            dtype=DTYPES[dtype],
            activation=Activation.SILU,
            gated=int(gated),
            hadamard_base=base,
            hadamard_log2=log2,
            split_columns=1,
            rows=rows,
            columns=columns,
            x_stride=x.stride(0),
            xq_stride=columns,
            y_stride=columns,
            x_split_stride=1,
            x=x.data_ptr(),
            scale=scale.data_ptr(),
            hadamard=None if table is None else table.data_ptr(),
            split=split.data_ptr(),
            xq=xq.data_ptr(),
            y=y.data_ptr(),
            x_split=x_split.data_ptr(),
        )
        self.launch("activation_quantize", arguments)
        want = torch.nn.functional.silu(x[:, :columns].float()).to(dtype)
        if gated:
            want = want * x[:, columns:]
        want = apply_hadamard(want.double(), base << log2) if base << log2 > 1 else want
        self.close(case, y, want, 2 * ULP[dtype])
        self.quantized(case, xq, y, scale)
        self.exact(f"{case}, split", x_split[:, 0], y[:, 0])

    def cache(self, batch: int, tokens: int, past: int, dtype: torch.dtype, int8: bool) -> None:
        """Rotary, cache write and attention of Qwen2-VL-7B's heads."""
        case = f"attention {batch} x {tokens} past {past} {dtype} {'int8' if int8 else 'wide'}"
        if not self.recorder.start(case):
            return
        heads, kv_heads, dim, capacity = 28, 4, 128, past + tokens + 7
        width = (heads + 2 * kv_heads) * dim
        qkv = self.real(batch, tokens, width, dtype=dtype)
        before = qkv.clone()
        angles = torch.rand(
            batch, tokens, dim // 2, device=self.device, generator=self.generator
        ).repeat(1, 1, 2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        position = torch.tensor([past], device=self.device)
        size = (batch, kv_heads, capacity, dim)
        keys, values = (self.real(*size, dtype=dtype) for _ in range(2))
        scales = [torch.ones(size[:3], device=self.device) for _ in range(2)]
        if int8:
            scales = [c.float().abs().amax(-1) / 127 for c in (keys, values)]
            keys, values = (
                torch.round(c.float() / s[..., None]).to(torch.int8)
                for c, s in zip((keys, values), scales, strict=True)
            )
        item = qkv.element_size()
        common: dict[str, Any] = {
            "dtype": DTYPES[dtype],
            "cache_dtype": DType.I8 if int8 else DTYPES[dtype],
            "batch": batch,
            "tokens": tokens,
            "q_heads": heads,
            "kv_heads": kv_heads,
            "head_dim": dim,
            "capacity": capacity,
            "q_stride": width,
            "q": qkv.data_ptr(),
            "key_cache": keys.data_ptr(),
            "value_cache": values.data_ptr(),
            "key_scale": scales[0].data_ptr(),
            "value_scale": scales[1].data_ptr(),
            "past": position.data_ptr(),
        }
        rotary = RotaryArgs(
            **common,
            rotary=Rotary.HALF,
            rotary_dim=dim,
            table_dtype=DTYPES[dtype],
            k_stride=width,
            v_stride=width,
            k=qkv.data_ptr() + heads * dim * item,
            v=qkv.data_ptr() + (heads + kv_heads) * dim * item,
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
        )
        self.launch("rotary_cache", rotary)
        q = before[..., : heads * dim].reshape(batch, tokens, heads, dim)
        partner = torch.cat((-q[..., dim // 2 :], q[..., : dim // 2]), dim=-1)
        turned = q * cos[:, :, None] + partner * sin[:, :, None]
        self.exact(f"{case}, rotated", qkv[..., : heads * dim], turned.flatten(2))
        if not int8:
            new = before[..., (heads + kv_heads) * dim :].reshape(batch, tokens, kv_heads, dim)
            written = values[:, :, past : past + tokens]
            self.exact(f"{case}, values written", written, new.transpose(1, 2))
        out = torch.full((batch, tokens, heads * dim), math.nan, dtype=dtype, device=self.device)
        attention = AttentionArgs(
            **common, scale=dim**-0.5, out_stride=heads * dim, out=out.data_ptr()
        )
        self.launch("attention", attention)
        causal = (
            torch.arange(past + tokens, device=self.device)
            <= past + torch.arange(tokens, device=self.device)[:, None]
        )
        wide = [
            c[:, :, : past + tokens].float() * (s[:, :, : past + tokens, None] if int8 else 1)
            for c, s in zip((keys, values), scales, strict=True)
        ]
        want = torch.nn.functional.scaled_dot_product_attention(
            turned.transpose(1, 2).float(), *wide, attn_mask=causal, enable_gqa=True
        )
        self.close(case, out, want.transpose(1, 2).flatten(2), 2 * ULP[dtype])

    def rotate(self, rows: int, heads: int, dim: int, dtype: torch.dtype) -> None:
        """Rotary embedding of a tower's heads by float32 angles."""
        case = f"rotate {rows} x {heads} x {dim} {dtype}"
        if not self.recorder.start(case):
            return
        x = self.real(rows, heads, dim, dtype=dtype)
        angles = self.real(rows, dim, dtype=torch.float32)
        cos, sin = angles.cos(), angles.sin()
        y = torch.full_like(x, math.nan)
        arguments = RotateArgs(
            dtype=DTYPES[dtype],
            rotary=Rotary.HALF,
            heads=heads,
            head_dim=dim,
            rotary_dim=dim,
            table_dtype=DType.F32,
            rows=rows,
            angle_rows=rows,
            x_stride=heads * dim,
            y_stride=heads * dim,
            x=x.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            y=y.data_ptr(),
        )
        self.launch("rotate", arguments)
        wide = x.float()
        partner = torch.cat((-wide[..., dim // 2 :], wide[..., : dim // 2]), dim=-1)
        turned = wide * cos[:, None] + partner * sin[:, None]
        self.exact(case, y, turned.to(dtype))

    def gather(self, rows: int, columns: int, k: int, dtype: torch.dtype) -> None:
        case = f"top {k} of {rows} x {columns} {dtype}"
        if not self.recorder.start(case):
            return
        x = self.real(rows, columns, dtype=dtype)
        indices = torch.full((rows, k), -1, dtype=torch.int64, device=self.device)
        fields = {"dtype": DTYPES[dtype], "k": k, "rows": rows, "columns": columns}
        pointers = {"x": x.data_ptr(), "indices": indices.data_ptr()}
        self.launch("top_k", TopKArgs(**fields, **pointers, x_stride=columns))
        order = torch.sort(x.float(), dim=-1, descending=True, stable=True).indices
        self.exact(case, indices, order[:, :k])
        y = torch.full((rows, columns), math.nan, dtype=dtype, device=self.device)
        ids = torch.randint(0, rows, (rows,), device=self.device, generator=self.generator)
        fields = {"dtype": DTYPES[dtype], "table_dtype": DTYPES[dtype], "rows": rows}
        pointers = {"ids": ids.data_ptr(), "table": x.data_ptr(), "y": y.data_ptr()}
        embedding = EmbeddingArgs(**fields, **pointers, columns=columns, vocabulary=rows)
        self.launch("embedding", embedding)
        self.exact(f"embedding {rows} x {columns} {dtype}", y, x[ids])


def run(
    library: Library, recorder: Recorder, generator: torch.Generator, *, small: bool = False
) -> None:
    """All checks; `small`: sizes for a memory checker or the emulator."""
    checks = Checks(library, recorder, generator)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows, columns in ((2, 192),) if small else ((1, 3584), (1000, 1280), (4096, 3584)):
            checks.norm(rows, columns, dtype)
        shapes = [(2, 640, 20, 5), (1, 512, 1, 9)]
        if not small:
            shapes = [(1, 18944, 148, 7), (300, 18944, 148, 7), (64, 8960, 140, 6)]
            shapes += [(64, 8192, 1, 13), (500, 5120, 20, 8), (64, 11008, 1, 8)]
            shapes += [(64, 11008, 344, 5)] if dtype != torch.float32 else []
        for rows, columns, base, log2 in shapes:
            checks.activation(rows, columns, base, log2, dtype)
        for int8 in (False, True):
            for batch, tokens, past in (
                ((1, 2, 70),) if small else ((1, 1, 0), (1, 1, 4099), (16, 1, 1000), (2, 5, 777))
            ):
                checks.cache(batch, tokens, past, dtype, int8)
        for rows, heads, dim in ((3, 5, 40),) if small else ((4096, 32, 80), (1000, 32, 72)):
            checks.rotate(rows, heads, dim, dtype)
        for rows, columns, k in ((2, 5000, 3),) if small else ((1, 152064, 1), (16, 152064, 50)):
            checks.gather(rows, columns, k, dtype)
