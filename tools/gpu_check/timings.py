"""Timings by graph replay on cold weights: linears beside bf16 matmul, row kernels, attention."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch

from mqc.cuda.library import (
    Activation,
    ActivationArgs,
    AttentionArgs,
    DType,
    Library,
    LinearKernel,
    NormArgs,
    TopKArgs,
)
from mqc.cuda.pack import hadamard_table
from tools.gpu_check.common import (
    DTYPES,
    Recorder,
    copies_for,
    graph_seconds,
    stream_of,
    workspace,
)
from tools.gpu_check.linear_case import LinearCase, Options
from tools.gpu_check.sweep import OF_FLOATS

SHAPES = ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944))
HEAD = (152064, 3584)
ROWS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)
FLOAT_ROWS = (1, 16, 64, 1024)
"""Of linears whose weights alone are quantized."""
DTYPE = torch.bfloat16


def _kernels(rows: int, architecture: int) -> list[LinearKernel]:
    """AUTO, and the neighbours that the choice could have taken."""
    tokens = {8: 1, 16: 2, 32: 3, 64: 4, 128: 5}
    chosen = [LinearKernel(v) for t, v in tokens.items() if rows / 4 <= t <= 4 * rows]
    if rows > 128:
        chosen.append(LinearKernel.MMA_128)
    if architecture == 90 and rows >= 64:
        chosen.append(LinearKernel.WGMMA)
    return [LinearKernel.AUTO, *dict.fromkeys(chosen)]


def linears(
    library: Library, recorder: Recorder, generator: torch.Generator, architecture: int
) -> None:
    """Each shape and number of rows: microseconds, bytes of weights a second, operations."""
    device = generator.device
    plain, grouped = (Options(), Options(bits=8)), (Options(group=32), Options(group=128))
    cases = [
        *itertools.product(SHAPES, ROWS, plain),
        *itertools.product((HEAD,), (1, 16), plain),
        *itertools.product(SHAPES[:1], ROWS, grouped),
        *itertools.product(SHAPES[2:], FLOAT_ROWS, (Options(floats=True),)),
        *itertools.product(SHAPES[2:3], FLOAT_ROWS, (Options(floats=True, group=128),)),
    ]
    for (n, k), rows, options in cases:
        name = f"linear {rows} x {n} x {k} {options.weights}"
        if not recorder.start(name):
            return
        case = LinearCase(rows, n, k, options, generator)
        copies = [case.w.clone() for _ in range(copies_for(case.w.numel()))]
        y = torch.empty(rows, n, dtype=DTYPE, device=device)
        area = workspace(library.workspace("linear", case.arguments(y)) * 8, device)
        kernels = _kernels(rows, architecture)
        if options.floats:
            kernels = [k for k in kernels if k in (LinearKernel.AUTO, *OF_FLOATS)]
        for kernel in kernels:
            launches = []
            for w in copies:
                arguments = case.arguments(y, w)
                arguments.kernel = kernel
                needed = library.workspace("linear", arguments)
                if needed > area.numel():
                    area = workspace(needed, device)
                arguments.workspace, arguments.workspace_bytes = area.data_ptr(), area.numel()
                launches.append(lambda a=arguments: library.launch("linear", a, stream_of(device)))
            seconds = graph_seconds(launches)
            arguments.kernel = kernel
            used, split = library.linear_choice(arguments)
            recorder.add(
                name=name,
                kernel=kernel.name,
                used=used.name,
                split_k=split,
                microseconds=seconds * 1e6,
                weight_tb_s=case.w.numel() / seconds / 1e12,
                tops=2 * rows * n * k / seconds / 1e12,
            )
        if options in (Options(), Options(floats=True)):
            _bf16(recorder, name, rows, n, k)
        del case, copies


def _bf16(recorder: Recorder, name: str, rows: int, n: int, k: int) -> None:
    """The same product with torch's bf16 matmul."""
    x = torch.randn(rows, k, device="cuda", dtype=DTYPE)
    weights = [torch.randn(n, k, device="cuda", dtype=DTYPE) for _ in range(copies_for(2 * n * k))]
    seconds = graph_seconds([functools.partial(torch.nn.functional.linear, x, w) for w in weights])
    recorder.add(
        name=name,
        kernel="torch bf16",
        microseconds=seconds * 1e6,
        weight_tb_s=2 * n * k / seconds / 1e12,
        tops=2 * rows * n * k / seconds / 1e12,
    )


def rows(library: Library, recorder: Recorder, device: torch.device) -> None:
    """Norm, activation with the 18944-point Hadamard, argmax."""
    scale = torch.full((1,), 0.02, device=device)
    table = hadamard_table(148).to(device)
    for m in (1, 16, 1024, 4096):
        x = torch.randn(m, 2 * 18944, device=device, dtype=DTYPE)
        xq = torch.empty(m, 18944, dtype=torch.int8, device=device)
        common = {"dtype": DTYPES[DTYPE], "rows": m, "scale": scale.data_ptr()}
        common |= {"x": x.data_ptr(), "xq": xq.data_ptr()}
        norm = NormArgs(**common, columns=3584, eps=1e-6, x_stride=3584, xq_stride=3584)
        gate = ActivationArgs(
            **common,
            columns=18944,
            activation=Activation.SILU,
            gated=1,
            hadamard_base=148,
            hadamard_log2=7,
            x_stride=2 * 18944,
            xq_stride=18944,
            hadamard=table.data_ptr(),
        )
        plain = ActivationArgs(
            **common,
            columns=18944,
            activation=Activation.SILU,
            gated=1,
            hadamard_base=1,
            x_stride=2 * 18944,
            xq_stride=18944,
        )
        for name, kind, arguments in (
            (f"norm {m} x 3584", "rms_norm_quantize", norm),
            (f"silu * up, Hadamard 148*2^7, {m} x 18944", "activation_quantize", gate),
            (f"silu * up, {m} x 18944", "activation_quantize", plain),
        ):
            if not recorder.start(name):
                return
            launch = _repeat(library, kind, arguments, device)
            recorder.add(name=name, microseconds=graph_seconds([launch] * 10) * 1e6)
    logits = torch.randn(16, 152064, device=device, dtype=DTYPE)
    indices = torch.empty(16, 1, dtype=torch.int64, device=device)
    for m in (1, 16):
        if not recorder.start(f"argmax {m}"):
            return
        arguments = TopKArgs(
            dtype=DTYPES[DTYPE],
            k=1,
            rows=m,
            columns=152064,
            x_stride=152064,
            x=logits.data_ptr(),
            indices=indices.data_ptr(),
        )
        area = workspace(library.workspace("top_k", arguments), device)
        arguments.workspace, arguments.workspace_bytes = area.data_ptr(), area.numel()
        launch = _repeat(library, "top_k", arguments, device)
        recorder.add(name=f"argmax {m} x 152064", microseconds=graph_seconds([launch] * 10) * 1e6)


def _repeat(library: Library, kind: str, arguments: object, device: torch.device) -> Callable:
    return lambda: library.launch(kind, arguments, stream_of(device))


def attention(library: Library, recorder: Recorder, device: torch.device) -> None:
    """Decode attention with Qwen2-VL-7B's heads, beside torch's SDPA on the same bf16 cache."""
    heads, kv_heads, dim = 28, 4, 128
    for batch, past, int8 in itertools.product((1, 16), (1024, 4096, 16384), (False, True)):
        name = f"attention batch {batch}, {past} keys, {'int8' if int8 else 'bf16'}"
        if not recorder.start(name):
            return
        size = (batch, kv_heads, past + 1, dim)
        pairs = 2 if batch * past > 50_000 else 6
        kind = torch.int8 if int8 else DTYPE
        caches = [torch.randn(size, device=device).mul(20).to(kind) for _ in range(2 * pairs)]
        scales = torch.full(size[:3], 0.01, device=device)
        q = torch.randn(batch, 1, heads * dim, device=device, dtype=DTYPE)
        out, position = torch.empty_like(q), torch.tensor([past], device=device)
        launches = []
        for key, value in zip(caches[::2], caches[1::2], strict=True):
            arguments = AttentionArgs(
                dtype=DTYPES[DTYPE],
                cache_dtype=DType.I8 if int8 else DTYPES[DTYPE],
                batch=batch,
                tokens=1,
                q_heads=heads,
                kv_heads=kv_heads,
                head_dim=dim,
                scale=dim**-0.5,
                capacity=past + 1,
                q_stride=heads * dim,
                out_stride=heads * dim,
                q=q.data_ptr(),
                key_cache=key.data_ptr(),
                value_cache=value.data_ptr(),
                key_scale=scales.data_ptr(),
                value_scale=scales.data_ptr(),
                past=position.data_ptr(),
                out=out.data_ptr(),
            )
            area = workspace(library.workspace("attention", arguments), device)
            arguments.workspace, arguments.workspace_bytes = area.data_ptr(), area.numel()
            launches.append(lambda a=arguments, w=area: _launch_with(library, a, w, device))
        seconds = graph_seconds(launches)
        moved = caches[0].nbytes * 2
        recorder.add(name=name, microseconds=seconds * 1e6, weight_tb_s=moved / seconds / 1e12)
        if not int8:
            heads_first = q.reshape(batch, 1, heads, dim).transpose(1, 2)
            sdpa = functools.partial(
                torch.nn.functional.scaled_dot_product_attention, heads_first, enable_gqa=True
            )
            launches = [
                functools.partial(sdpa, k, v)
                for k, v in zip(caches[::2], caches[1::2], strict=True)
            ]
            seconds = graph_seconds(launches)
            recorder.add(
                name=name,
                kernel="torch SDPA",
                microseconds=seconds * 1e6,
                weight_tb_s=moved / seconds / 1e12,
            )


def _launch_with(
    library: Library, arguments: AttentionArgs, area: torch.Tensor, device: torch.device
) -> None:
    """Launch; `area` is the workspace the struct points to, kept alive with the closure."""
    assert arguments.workspace == area.data_ptr()
    library.launch("attention", arguments, stream_of(device))
