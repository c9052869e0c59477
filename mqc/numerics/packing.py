"""Integer weights in memory: the reference form of int4, and the CPU kernels' layout C16K4.

Packed int4: uint8 [N, ceil(K/2)], low nibble = even k, high nibble = odd k. Nibbles are two's
complement; an odd K is padded with 0. 3- and 2-bit weights use the same container.

C16K4 (id 1 in ``mqc_kernels.h``): blocks of 16 output channels x 4 inputs, 64 bytes, uint8:
8 bits [N/16, G, K/G/4, 16, 4], value w + 128; 4 bits [N/16, G, K/G/8, 16, 4], value w + 8 in a
nibble, the low nibbles of a block for the first 4 of 8 inputs and the high ones for the others.
N is rounded up to a multiple of 16 with weights of 0; K/G is a multiple of 8.
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


def fits_c16k4(k: int, groups: int) -> bool:
    """Whether layout C16K4 holds ``k`` input channels in ``groups`` groups without padding."""
    return k % (8 * groups) == 0


def pack_c16k4(q: Tensor, groups: int, bits: int) -> Tensor:
    """int8 [N, K] to layout C16K4, uint8 of five axes; ``bits`` 4 (values in [-8, 7]) or 8.

    Raises:
        UsageError: on another dtype, or where K / ``groups`` is no multiple of 8.
    """
    n, k = q.shape
    if q.dtype != torch.int8 or bits not in (4, 8):
        raise UsageError(f"layout C16K4 takes int8 values of 4 or 8 bits, got {q.dtype}, {bits}")
    if not fits_c16k4(k, groups):
        raise UsageError(
            f"layout C16K4 takes groups of a multiple of 8 inputs, got {k} inputs in {groups}",
            hint="keep the reference layout for such a weight",
        )
    steps = k // groups // 8
    shifted = torch.nn.functional.pad(q, (0, 0, 0, -n % 16)).view(torch.uint8) ^ (1 << (bits - 1))
    if bits == 8:
        tiles = shifted.view(-1, 16, groups, 2 * steps, 4)
    else:
        halves = (shifted & 15).view(-1, 16, groups, steps, 2, 4)
        tiles = halves[..., 0, :] | (halves[..., 1, :] << 4)
    return tiles.permute(0, 2, 3, 1, 4).contiguous()


def unpack_c16k4(tiles: Tensor, n: int, k: int, groups: int, bits: int) -> Tensor:
    """The inverse of :func:`pack_c16k4`: int8 [n, k].

    Raises:
        UsageError: on another dtype or shape than that of ``n`` x ``k`` weights in ``groups``.
    """
    steps = k // groups // (32 // bits)
    wanted = (-(-n // 16), groups, steps, 16, 4)
    if tiles.dtype != torch.uint8 or tuple(tiles.shape) != wanted or not fits_c16k4(k, groups):
        raise UsageError(
            f"a {bits}-bit weight of [{n}, {k}] in {groups} groups and layout C16K4 is uint8 "
            f"{wanted}, got {tiles.dtype} {tuple(tiles.shape)}"
        )
    if bits == 4:
        halves = torch.stack((tiles & 15, tiles >> 4), dim=3)  # [blocks, G, steps, 2, 16, 4]
        rows = halves.permute(0, 4, 1, 2, 3, 5).reshape(-1, k)[:n]
        return rows.to(torch.int8) - 8
    rows = tiles.permute(0, 3, 1, 2, 4).reshape(-1, k)[:n]
    return (rows ^ 128).view(torch.int8)
