import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mqc.errors import UsageError
from mqc.numerics.packing import pack_c16k4, pack_int4, unpack_c16k4, unpack_int4


@given(
    hnp.arrays(
        np.int8, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=st.integers(-8, 7)
    )
)
def test_round_trip(values: np.ndarray) -> None:
    q = torch.from_numpy(values)
    packed = pack_int4(q)
    assert packed.dtype == torch.uint8 and packed.shape == (q.shape[0], (q.shape[1] + 1) // 2)
    assert torch.equal(unpack_int4(packed, q.shape[1]), q)


def test_layout_low_nibble_is_even_k() -> None:
    packed = pack_int4(torch.tensor([[1, -1, 7]], dtype=torch.int8))
    assert packed.tolist() == [[0xF1, 0x07]]


def test_all_bytes_unpack() -> None:
    packed = torch.arange(256, dtype=torch.uint8).reshape(1, -1)
    assert torch.equal(pack_int4(unpack_int4(packed, 512)), packed)


def test_rejects() -> None:
    with pytest.raises(UsageError, match=r"\[-8, 7\]"):
        pack_int4(torch.tensor([8], dtype=torch.int8))
    with pytest.raises(UsageError, match="int8"):
        pack_int4(torch.tensor([1]))
    with pytest.raises(UsageError, match="does not hold 7"):
        unpack_int4(torch.zeros(1, 3, dtype=torch.uint8), 7)
    with pytest.raises(UsageError, match="uint8"):
        unpack_int4(torch.zeros(1, 3, dtype=torch.int8), 6)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("n", [1, 16, 19])
@pytest.mark.parametrize("bits", [4, 8])
def test_layout_c16k4(bits: int, n: int, groups: int) -> None:
    """Every value where mqc_kernels.h says it is, and back; the kernels' packer is compared in
    tests/native."""
    k, low = 48, -(1 << (bits - 1))
    q = torch.randint(low, -low, (n, k), dtype=torch.int8)
    tiles = pack_c16k4(q, groups, bits)
    assert tiles.shape == (-(-n // 16), groups, k // groups // (32 // bits), 16, 4)
    for row in range(tiles.shape[0] * 16):
        for column in range(k):
            group, i = divmod(column, k // groups)
            step = i // 8 if bits == 4 else i // 4
            byte = int(tiles[row // 16, group, step, row % 16, i % 4])
            value = byte if bits == 8 else byte >> 4 if i % 8 >= 4 else byte & 15
            assert value + low == (int(q[row, column]) if row < n else 0)
    assert torch.equal(unpack_c16k4(tiles, n, k, groups, bits), q)


def test_layout_c16k4_refuses() -> None:
    q = torch.zeros(16, 24, dtype=torch.int8)
    with pytest.raises(UsageError, match="multiple of 8 inputs, got 24 inputs in 2"):
        pack_c16k4(q, 2, 4)
    with pytest.raises(UsageError, match="takes int8"):
        pack_c16k4(q.float(), 1, 4)
    tiles = pack_c16k4(q, 1, 4)
    for n, k, groups, bits in [(17, 24, 1, 4), (16, 48, 1, 4), (16, 24, 3, 4), (16, 24, 1, 8)]:
        with pytest.raises(UsageError, match="layout C16K4 is uint8"):
            unpack_c16k4(tiles, n, k, groups, bits)
