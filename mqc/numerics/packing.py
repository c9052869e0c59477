"""Packed int4: uint8 [N, ceil(K/2)], low nibble = even k, high nibble = odd k.

Nibbles are two's complement; an odd K is padded with 0. 3- and 2-bit weights use the same
container.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mqc.errors import UsageError


def pack_int4(q: Tensor) -> Tensor:
    """Pack int8 [..., K] with values in [-8, 7] to uint8 [..., ceil(K/2)].

    Raises:
        UsageError: on another dtype or a value out of range.
    """
    if q.dtype != torch.int8:
        raise UsageError(f"int4 packing takes int8 values, got {q.dtype}")
    if q.numel() and (int(q.min()) < -8 or int(q.max()) > 7):
        raise UsageError(
            f"int4 packing takes values in [-8, 7], got [{int(q.min())}, {int(q.max())}]"
        )
    if q.shape[-1] % 2:
        q = torch.nn.functional.pad(q, (0, 1))
    nibbles = q.view(torch.uint8) & 0x0F
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: Tensor, k: int) -> Tensor:
    """Unpack uint8 [..., ceil(k/2)] to int8 [..., k].

    Raises:
        UsageError: on another dtype or where k does not fit the packed width.
    """
    if packed.dtype != torch.uint8:
        raise UsageError(f"packed int4 weights are uint8, got {packed.dtype}")
    if packed.shape[-1] != (k + 1) // 2:
        raise UsageError(
            f"packed width {packed.shape[-1]} does not hold {k} int4 values a row",
            hint=f"a row of {k} values takes {(k + 1) // 2} bytes",
        )
    high = packed.view(torch.int8) >> 4  # arithmetic shift: sign-extended high nibble
    low = (packed << 4).view(torch.int8) >> 4
    return torch.stack((low, high), dim=-1).flatten(-2)[..., :k].contiguous()
