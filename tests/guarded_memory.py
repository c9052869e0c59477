"""Memory that faults when a kernel reads or writes past the end of a tensor."""

from __future__ import annotations

import ctypes
import mmap

import torch

_libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A copy of a contiguous tensor that ends at an inaccessible page (16-byte aligned start).

    Up to 15 bytes may lie between the end and the page where the size is no multiple of 16.
    """
    if tensor is None or tensor.numel() == 0:
        return tensor
    page = mmap.PAGESIZE
    size = -(-tensor.nbytes // 16) * 16
    pages = -(-size // page)
    area = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    if _libc.mprotect(ctypes.c_void_p(address + pages * page), page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    start = pages * page - size
    copy = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    copy = copy.reshape(tensor.shape)
    copy.copy_(tensor)
    return copy
