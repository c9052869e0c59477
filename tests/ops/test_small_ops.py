"""quantize_static, hadamard, rank_update, embedding_w8; and what all operators promise torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mqc.ops
from mqc.errors import UsageError
from mqc.numerics.hadamard import hadamard_matrix
from mqc.numerics.packing import pack_int4
from mqc.ops.attention_int8 import quantize_rows

OPS = torch.ops.mqc


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    modality=st.sampled_from([None, "mask", "count"]),
    unsigned=st.booleans(),
    size=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_quantize_against_numpy(
    seed: int, modality: str | None, unsigned: bool, size: float
) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((2, 5, 7)) * size).astype(np.float32)
    scale = (rng.random(1 if modality is None else 2) + 0.01).astype(np.float32)
    visual = np.zeros((2, 5), dtype=bool)
    modal = None
    if modality == "mask":
        visual = rng.integers(0, 2, (2, 5)).astype(bool)
        modal = torch.from_numpy(visual)
    elif modality == "count":
        modal = torch.from_numpy(rng.integers(0, 6, 2))
        visual = np.arange(5)[None] < modal.numpy()[:, None]
    want = np.clip(np.rint(x / scale[visual.astype(int)][..., None]), -127, 127)
    got = OPS.quantize_static(torch.from_numpy(x), torch.from_numpy(scale), modal, unsigned)
    assert got.dtype == (torch.uint8 if unsigned else torch.int8)
    assert np.array_equal(got.numpy().astype(np.int64) - 128 * unsigned, want)


def test_quantize_rounds_half_to_even_and_saturates() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 1e30, -1e30, float("inf")])
    want = [0, 2, 2, 0, -2, 126, 127, 127, -127, 127]
    assert OPS.quantize_static(x, torch.ones(1), None).tolist() == want
    assert OPS.quantize_static(x, torch.ones(1), None, True).tolist() == [v + 128 for v in want]
    assert OPS.quantize_static(x.double(), torch.ones(1), None).tolist() == want
    assert OPS.quantize_static(x.half(), torch.ones(1), None)[:5].tolist() == want[:5]


@pytest.mark.parametrize(("n", "block"), [(24, 12), (24, 24), (24, 8), (24, 1), (592, 592)])
def test_hadamard_against_the_matrix(n: int, block: int) -> None:
    x = torch.randn(2, 3, n, dtype=torch.float64)
    h = torch.block_diag(*[hadamard_matrix(block).double()] * (n // block)) / block**0.5
    torch.testing.assert_close(OPS.hadamard(x, block), x @ h.T)
    single = OPS.hadamard(x.float(), block)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), x @ h.T, rtol=0, atol=1e-5)
    with pytest.raises(UsageError):
        OPS.hadamard(x, 5)


def test_rank_update_and_embedding() -> None:
    y, xs, ws = torch.randn(2, 3, 5), torch.randn(2, 3, 2), torch.randn(5, 2)
    torch.testing.assert_close(OPS.rank_update(y, xs, ws), y + xs @ ws.T)
    q = torch.randint(-127, 128, (11, 4), dtype=torch.int8)
    scale = torch.rand(11) + 0.1
    ids = torch.tensor([[0, 10, 3]])
    want = (q.float() * scale[:, None])[ids]
    assert torch.equal(OPS.embedding_w8(ids, q, scale), want)


def calls() -> dict[str, tuple[object, ...]]:
    """One call of every operator."""
    xq = torch.randint(-127, 128, (1, 3, 8), dtype=torch.int8)
    q = torch.randint(-8, 8, (5, 8), dtype=torch.int8)
    x, scale, one = torch.randn(1, 3, 8), torch.rand(5), torch.ones(1)
    terms = (torch.randn(5), torch.randn(1, 3, 1), torch.randn(5, 1))
    mask, order = torch.tensor([[True, False, True]]), torch.tensor([[0, 2, 1]])
    return {
        "hadamard": (x, 8),
        "quantize_static": (x, torch.ones(2), mask, True),
        "linear_w4a8": (xq, pack_int4(q), scale, torch.ones(2), torch.tensor([2]), *terms),
        "linear_w8a8": (xq, q, scale, one, None, None, None, None),
        "linear_w4a16": (x, pack_int4(q), scale[:, None], *terms),
        "linear_w8a16": (x, q, scale, None, None, None),
        "rank_update": (torch.randn(1, 3, 5), *terms[1:]),
        "rms_norm_quantize": (x, 1e-6, torch.ones(2), mask, torch.tensor([1])),
        "activation_quantize": (x, "silu", True, 4, one, None, None),
        "attention": (
            *(x.reshape(1, 3, 4, 2), None, None),
            *(torch.randn(1, 1, 7, 2), torch.randn(1, 1, 7, 2), torch.tensor([4])),
            *(torch.ones(1, 1, 3, 7, dtype=torch.bool), x[..., :2], x[..., :2], 0.5, "half"),
        ),
        "attention_int8": (
            *(x.reshape(1, 3, 4, 2), None, None),
            *quantize_rows(torch.randn(2, 1, 7, 2))[0].split(1),
            *torch.rand(2, 1, 7).split(1),
            torch.tensor([4]),
            *(torch.ones(1, 1, 3, 7, dtype=torch.bool), x[..., :2], x[..., :2], 0.5, "half"),
        ),
        "attention_full": (
            *(x.reshape(1, 3, 4, 2), None, None, torch.ones(1, 1, 3, 3, dtype=torch.bool)),
            *(x[..., :2], x[..., :2], 1, 0.5, "half"),
        ),
        "gated_delta": (
            *(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 5)),
            *(-torch.rand(1, 2, 3), torch.rand(1, 2, 3), torch.randn(1, 2, 4, 5)),
        ),
        "embedding_w8": (torch.tensor([[0, 4]]), q, scale),
        "token_order": (mask,),
        "take_tokens": (torch.randn(2, 1, 3, 4), order, 2),
        "take_keys": (torch.ones(1, 2, 3, 7, dtype=torch.bool), order, torch.tensor([4])),
        "rotary_angles": (
            *(torch.arange(9).reshape(3, 1, 3), torch.rand(4), torch.tensor([0, 1, 1, 2])),
        ),
        "route_rows": (torch.tensor([[[0, 2], [2, 0], [0, 3]]]), 4),
        "split_rows": (x, torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([3, 0, 2, 1]), 4),
        "join_rows": (torch.randn(1, 6, 8), torch.rand(1, 3, 2), torch.arange(6).view(1, 3, 2)),
    }


def test_every_operator_is_listed() -> None:
    assert set(calls()) == set(mqc.ops.OPS)


@pytest.mark.parametrize("name", sorted(calls()))
def test_operators_keep_the_rules_of_torch_library(name: str) -> None:
    """Schema (no aliasing, no mutation) and shape function, checked by torch itself."""
    torch.library.opcheck(
        mqc.ops.OPS[name].overload,
        calls()[name],
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("name", ["hadamard"])
def test_identity_block_does_not_alias(name: str) -> None:
    x = torch.randn(2, 3)
    assert getattr(OPS, name)(x, 1).data_ptr() != x.data_ptr()


def test_inputs_are_not_modified() -> None:
    for name, arguments in calls().items():
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        mqc.ops.OPS[name].overload(*arguments)
        for a, b in zip(arguments, copies, strict=True):
            assert not isinstance(a, torch.Tensor) or torch.equal(a, b)
