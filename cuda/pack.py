"""Weights and tables in the layouts of the CUDA kernels (include/mqc/layout.cuh has the maps).

Weights are the left operand of the matrix instructions: a tile of 64 channels x 128 inputs is
stored in the order in which the 128 threads of four warps hold it in registers, so one packed
copy serves ``mma.m16n8k32`` (sm_80 on) and ``wgmma.m64nNk32`` (sm_90a), and ``mma.m16n8k16`` where
activations are of a half type. Both sizes are padded with zeros. Where groups of inputs have
scales, a tile's stand behind its values.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

from mqc.errors import TargetError, UsageError
from mqc.numerics.hadamard import hadamard_matrix
from mqc.numerics.packing import unpack_int4

TILE_CHANNELS = 64
TILE_INPUTS = 128


class Layout(IntEnum):
    """Weight layouts, numbered as ``mqc_layout`` in mqc_cuda.h."""

    W4_64X128 = 1
    W8_64X128 = 2
    W4_64X128_G32 = 3
    W4_64X128_G64 = 4
    W4_64X128_G128 = 5
    W8_64X128_G32 = 6
    W8_64X128_G128 = 7

    @property
    def bits(self) -> int:
        """Bits of a stored weight."""
        return 8 if self.name.startswith("W8") else 4

    @property
    def group(self) -> int:
        """Inputs that share a scale; 0: all of a channel's."""
        return int(self.name.partition("_G")[2] or 0)

    @property
    def value_bytes(self) -> int:
        """Bytes of a tile's integers."""
        return TILE_CHANNELS * TILE_INPUTS * self.bits // 8

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile: integers, then the float32 scales of its groups."""
        scales = TILE_INPUTS // self.group * TILE_CHANNELS * 4 if self.group else 0
        return self.value_bytes + scales

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of a packed [n, k] weight."""
        return -(-n // TILE_CHANNELS) * -(-k // TILE_INPUTS) * self.tile_bytes


def layout_for(bits: int, group: int = 0) -> Layout | None:
    """The layout of weights of ``bits`` (4 or 8) with a scale for every ``group`` inputs (0: one a
    channel), or None. Groups that no layout has are taken in equal parts of one that has."""
    part = math.gcd(group, TILE_INPUTS)
    fitting = [
        layout
        for layout in Layout
        if layout.bits == bits and (layout.group > 0) == (group > 0)
        if not group or part % layout.group == 0
    ]
    return max(fitting, key=lambda layout: layout.group, default=None)


def require_layout(name: str, bits: int, k: int, groups: int = 1) -> Layout:
    """The layout of the weight ``name`` of ``k`` inputs with ``groups`` scales a channel.

    Raises:
        TargetError: where no kernel takes its bits and groups.
    """
    group = k // groups if groups > 1 else 0
    layout = layout_for(bits, group)
    if layout is not None:
        return layout
    raise TargetError(
        f"{name} has {bits}-bit weights with a scale for every {group} inputs; the CUDA kernels "
        "take groups in multiples of 32 inputs",
        hint="set group_size to 32, 64 or 128 (as in decoder.weights.group_size=128) or to null, "
        "or compile for a CPU: --target onnx --device cpu",
    )


def pack_weight(q: Tensor, layout: Layout, scales: Tensor | None = None) -> Tensor:
    """Pack an integer weight [N, K] (int8) for the kernels: uint8 [layout.nbytes(N, K)].

    Args:
        q: values that the layout's bits hold.
        layout: of the result.
        scales: float32 [N, K / layout.group] where the layout has groups, else None.

    Raises:
        UsageError: on another dtype or rank, values out of range, or scales that do not fit.
    """
    values = _pack_values(q, layout)
    n, k = q.shape
    if layout.group == 0 or scales is None:
        if layout.group or scales is not None:
            raise UsageError(f"layout {layout.name} and scales of groups do not go together")
        return values
    if scales.shape != (n, -(-k // layout.group)) or k % layout.group:
        raise UsageError(
            f"scales {tuple(scales.shape)} do not fit a weight [{n}, {k}] with one for every "
            f"{layout.group} inputs"
        )
    in_tile = TILE_INPUTS // layout.group
    wide = torch.nn.functional.pad(
        scales.to(torch.float32), (0, -scales.shape[1] % in_tile, 0, -n % TILE_CHANNELS)
    )
    # [channel tile, channel, input tile, group] -> by tile: groups, then channels
    tiles = wide.reshape(-1, TILE_CHANNELS, wide.shape[1] // in_tile, in_tile).permute(0, 2, 3, 1)
    behind = (
        tiles.contiguous().view(torch.uint8).reshape(-1, layout.tile_bytes - layout.value_bytes)
    )
    return torch.cat((values.reshape(-1, layout.value_bytes), behind), dim=1).flatten()


def _pack_values(q: Tensor, layout: Layout) -> Tensor:
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
    packed = packed.reshape(-1, layout.tile_bytes)[:, : layout.value_bytes]
    if layout.bits == 8:
        parts = packed.contiguous().view(torch.int8).reshape(tiles, inputs, 4, 4, 8, 4, 2, 2, 4)
        parts = parts.permute(0, 3, 7, 4, 1, 2, 6, 5, 8)
    else:
        pairs = packed.reshape(tiles, inputs, 2, 4, 8, 4, 2, 2, 4)
        bytes_ = pairs.permute(0, 3, 4, 1, 2, 6, 7, 5, 8).flatten(4, 5)
        low = (bytes_ << 4).view(torch.int8) >> 4
        high = bytes_.contiguous().view(torch.int8) >> 4
        parts = torch.stack((low, high), dim=2)
    q = parts.reshape(tiles * TILE_CHANNELS, inputs * TILE_INPUTS)
    return q[:n, :k].contiguous()


def unpack_scales(packed: Tensor, layout: Layout, n: int, k: int) -> Tensor:
    """The float32 [n, k / layout.group] scales in a packed weight of a layout with groups."""
    tiles, inputs = -(-n // TILE_CHANNELS), -(-k // TILE_INPUTS)
    behind = packed.reshape(-1, layout.tile_bytes)[:, layout.value_bytes :].contiguous()
    scales = behind.view(torch.float32).reshape(tiles, inputs, -1, TILE_CHANNELS)
    rows = scales.permute(0, 3, 1, 2).reshape(tiles * TILE_CHANNELS, -1)
    return rows[:n, : k // layout.group].contiguous()


def pack_linear(qweight: Tensor, k: int, scales: Tensor | None = None) -> tuple[Tensor, Layout]:
    """Pack the stored weight of ``mqc::linear_w4a8`` (uint8) or ``linear_w8a8`` (int8), or of
    ``linear_w4a16`` or ``linear_w8a16``.

    Args:
        qweight: uint8 [N, ceil(k/2)] (two int4 a byte) or int8 [N, k].
        k: number of inputs.
        scales: float [N, groups] of a weight with groups, or None: they are no part of the result.

    Raises:
        UsageError: for groups that no layout has.
    """
    q = unpack_int4(qweight, k) if qweight.dtype == torch.uint8 else qweight
    bits = 4 if qweight.dtype == torch.uint8 else 8
    group = 0 if scales is None else k // scales.shape[1]
    layout = layout_for(bits, group)
    if layout is None:
        raise UsageError(f"no kernel takes {bits}-bit weights with scales of {group} inputs")
    if scales is not None:
        scales = scales.repeat_interleave(group // layout.group, dim=1)
    return pack_weight(q, layout, scales), layout


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
