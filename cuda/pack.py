"""Weights and tables in the layouts of the CUDA kernels (include/mqc/layout.cuh has the maps).

Weights are the left operand of the matrix instructions: a tile of 64 channels x 128 inputs is
stored in the order in which the 128 threads of four warps hold it in registers, so one packed
copy serves ``mma.m16n8k32`` (sm_80 on) and ``wgmma.m64nNk32`` (sm_90a). Both sizes are padded with
zeros.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from mqc.errors import UsageError
from mqc.numerics.hadamard import hadamard_matrix
from mqc.numerics.packing import unpack_int4

TILE_CHANNELS = 64
TILE_INPUTS = 128


class Layout(IntEnum):
    """Weight layouts, numbered as ``mqc_layout`` in mqc_cuda.h."""

    W4_64X128 = 1
    W8_64X128 = 2

    @property
    def bits(self) -> int:
        """Bits of a stored weight."""
        return 4 if self is Layout.W4_64X128 else 8

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of a packed [n, k] weight."""
        tiles = -(-n // TILE_CHANNELS) * -(-k // TILE_INPUTS)
        return tiles * TILE_CHANNELS * TILE_INPUTS * self.bits // 8


def pack_weight(q: Tensor, layout: Layout) -> Tensor:
    """Pack an integer weight [N, K] (int8) for the kernels: uint8 [layout.nbytes(N, K)].

    Raises:
        UsageError: on another dtype or rank, or values that the layout's bits do not hold.
    """
    if q.dtype != torch.int8 or q.dim() != 2 or 0 in q.shape:
        raise UsageError(f"a weight to pack is int8 [N, K], got {q.dtype} {tuple(q.shape)}")
    low, high = (-8, 7) if layout.bits == 4 else (-127, 127)
    if int(q.min()) < low or int(q.max()) > high:
        raise UsageError(
            f"layout {layout.name} holds values in [{low}, {high}], the weight has "
            f"[{int(q.min())}, {int(q.max())}]"
        )
    n, k = q.shape
    padded = torch.nn.functional.pad(q, (0, -k % TILE_INPUTS, 0, -n % TILE_CHANNELS))
    # [channel tile, 16-row block, upper/lower 8 rows, row, input tile, k32 step, half, quad, byte]
    parts = padded.reshape(-1, 4, 2, 8, padded.shape[1] // TILE_INPUTS, 4, 2, 4, 4)
    if layout.bits == 8:
        # 16 bytes of a thread and step: registers (half, upper/lower rows)
        return parts.permute(0, 4, 5, 1, 3, 7, 6, 2, 8).flatten().view(torch.uint8)
    nibbles = parts.view(torch.uint8) & 0x0F
    bytes_ = nibbles.select(2, 0) | (nibbles.select(2, 1) << 4)
    # Now [channel tile, block, row, input tile, step, half, quad, byte]; steps go in pairs.
    pairs: Tensor = bytes_.unflatten(4, (2, 2))
    return pairs.permute(0, 3, 4, 1, 2, 7, 5, 6, 8).contiguous().flatten()


def unpack_weight(packed: Tensor, layout: Layout, n: int, k: int) -> Tensor:
    """The int8 [n, k] weight of a packed one.

    Raises:
        UsageError: where the size does not fit.
    """
    if packed.dtype != torch.uint8 or packed.numel() != layout.nbytes(n, k):
        raise UsageError(
            f"a packed [{n}, {k}] weight of layout {layout.name} is {layout.nbytes(n, k)} bytes, "
            f"got {packed.dtype} [{packed.numel()}]"
        )
    tiles, inputs = -(-n // TILE_CHANNELS), -(-k // TILE_INPUTS)
    if layout.bits == 8:
        parts = packed.view(torch.int8).reshape(tiles, inputs, 4, 4, 8, 4, 2, 2, 4)
        parts = parts.permute(0, 3, 7, 4, 1, 2, 6, 5, 8)
    else:
        pairs = packed.reshape(tiles, inputs, 2, 4, 8, 4, 2, 2, 4)
        bytes_ = pairs.permute(0, 3, 4, 1, 2, 6, 7, 5, 8).flatten(4, 5)
        low = (bytes_ << 4).view(torch.int8) >> 4
        high = bytes_.contiguous().view(torch.int8) >> 4
        parts = torch.stack((low, high), dim=2)
    q = parts.reshape(tiles * TILE_CHANNELS, inputs * TILE_INPUTS)
    return q[:n, :k].contiguous()


def pack_linear(qweight: Tensor, k: int) -> tuple[Tensor, Layout]:
    """Pack the stored weight of ``mqc::linear_w4a8`` (uint8) or ``linear_w8a8`` (int8).

    Args:
        qweight: uint8 [N, ceil(k/2)] (two int4 a byte) or int8 [N, k].
        k: number of inputs.
    """
    if qweight.dtype == torch.uint8:
        return pack_weight(unpack_int4(qweight, k), Layout.W4_64X128), Layout.W4_64X128
    return pack_weight(qweight, Layout.W8_64X128), Layout.W8_64X128


def hadamard_table(base: int) -> Tensor:
    """Signs of `hadamard_matrix(base)` as the B fragments of ``mma.m16n8k16``: int32 words, flat.

    A word holds 16 registers of a lane: bits 15 - i and 31 - i are the signs of the low and the
    high half of register i. Register 2 * step + half of output block c holds the entries
    H[8 c + lane / 4, 16 step + 8 half + 2 (lane % 4) + (0, 1)]; entries past the order are +.
    """
    h = hadamard_matrix(base)
    steps, columns = -(-base // 16), -(-base // 8)
    groups = -(-2 * steps // 16)
    negative = torch.zeros(columns * 8, groups * 8 * 16, dtype=torch.int64)
    negative[:base, :base] = h < 0
    # [column, row of it, register group, register, quad, low/high half]
    parts = negative.reshape(columns, 8, groups, 16, 4, 2)
    register = torch.arange(16)
    shifts = torch.stack((15 - register, 31 - register), dim=-1).reshape(1, 1, 1, 16, 1, 2)
    words = (parts << shifts).sum(dim=(3, 5))  # [column, row, group, quad]
    words = words.permute(0, 2, 1, 3).flatten()  # lane = 4 row + quad
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
