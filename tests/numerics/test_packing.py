import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mqc.errors import UsageError
from mqc.numerics.packing import pack_int4, unpack_int4


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
