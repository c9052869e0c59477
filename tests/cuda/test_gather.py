"""Embedding rows and top-k on the emulator against torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mqc.ops  # noqa: F401
from mqc.cuda.library import DType, EmbeddingArgs, KernelError, TopKArgs

TORCH = {DType.BF16: torch.bfloat16, DType.F16: torch.float16, DType.F32: torch.float32}


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("int8", [False, True])
def test_embedding(emulated: Any, dtype: DType, int8: bool) -> None:
    emulated.configure(seed=1)
    torch_dtype = TORCH[dtype]
    ids = torch.tensor([3, 0, 9, 9])
    scale = torch.rand(10).to(torch_dtype)
    if int8:
        table = torch.randint(-127, 128, (10, 150), dtype=torch.int8)
        want = torch.ops.mqc.embedding_w8(ids, table, scale)
    else:
        table = torch.randn(10, 150).to(torch_dtype)
        want = table[ids]
    wide = scale.float()

    def run(ids: torch.Tensor) -> torch.Tensor:
        y = torch.full((ids.numel(), 150), 7.0, dtype=torch_dtype)
        emulated.launch(
            "embedding",
            EmbeddingArgs(
                dtype=dtype,
                table_dtype=DType.I8 if int8 else dtype,
                rows=ids.numel(),
                columns=150,
                vocabulary=10,
                ids=ids.data_ptr(),
                table=table.data_ptr(),
                scale=wide.data_ptr(),
                y=y.data_ptr(),
            ),
        )
        return y

    assert torch.equal(run(ids), want)
    assert bool(run(torch.tensor([-1, 10])).isnan().all())


def top_k(library: Any, x: torch.Tensor, dtype: DType, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = x.shape
    values, indices = torch.zeros(rows, k), torch.full((rows, k), -1)
    arguments = TopKArgs(
        dtype=dtype,
        k=k,
        rows=rows,
        columns=columns,
        x_stride=x.stride(0),
        x=x.data_ptr(),
        values=values.data_ptr(),
        indices=indices.data_ptr(),
    )
    size = library.workspace("top_k", arguments)
    workspace = torch.randint(0, 255, (size + 16,), dtype=torch.uint8)
    workspace[: 4096 * 4] = 0
    arguments.workspace, arguments.workspace_bytes = workspace.data_ptr(), size
    library.launch("top_k", arguments)
    assert size == 0 or not workspace[: 4096 * 4].any()
    return values, indices


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize(("rows", "columns", "k"), [(1, 9000, 1), (3, 9000, 50), (2, 300, 64)])
def test_top_k(emulated: Any, dtype: DType, rows: int, columns: int, k: int) -> None:
    emulated.configure(seed=k)
    x = torch.randn(rows, columns).to(TORCH[dtype])
    values, indices = top_k(emulated, x, dtype, k)
    order = torch.sort(x.float(), dim=-1, descending=True, stable=True)
    assert torch.equal(values, order.values[:, :k])
    assert torch.equal(indices, order.indices[:, :k])


def test_top_k_schedules(emulated: Any) -> None:
    for seed in range(12):
        emulated.configure(seed)
        x = torch.randn(1, 400)
        assert torch.equal(
            top_k(emulated, x, DType.F32, 64)[1], x.sort(descending=True).indices[:, :64]
        )


def test_ties_zeros_and_nan(emulated: Any) -> None:
    emulated.configure(seed=1)
    x = torch.full((1, 5000), -3.0)
    x[0, 4000], x[0, 4500], x[0, 4700] = -0.0, 0.0, float("-inf")
    assert top_k(emulated, x, DType.F32, 3)[1].tolist() == [[4000, 4500, 0]]
    x[0, 77] = float("nan")
    x[0, 78] = float("inf")
    assert top_k(emulated, x, DType.F32, 3)[1].tolist() == [[77, 78, 4000]]


def test_bad_arguments_are_refused(emulated: Any) -> None:
    with pytest.raises(KernelError, match="k is 65"):
        emulated.launch("top_k", TopKArgs(dtype=3, k=65, rows=1, columns=100))
    with pytest.raises(KernelError, match="int8 table needs a scale"):
        emulated.launch(
            "embedding",
            EmbeddingArgs(
                dtype=3, table_dtype=4, rows=1, columns=4, vocabulary=4, ids=8, table=8, y=8
            ),
        )
