"""Large tensors in files that have no name: memory which the system can write out and take back."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

SMALLEST = 1 << 20
"""Bytes from which a tensor is worth a file; below, mapping costs more than it frees."""


class Scratch:
    """Keeps tensors in mapped, unlinked files of ``folder``.

    A compile touches one layer at a time, yet holds every weight of every step. Mapped from files,
    the weights are pages that the system writes out where memory is short, so that memory bounds
    neither the model nor the number of copies; the disk does. The files have no name: they are gone
    with the last tensor that uses them, and with a killed process.
    """

    def __init__(self, folder: Path, smallest: int = SMALLEST) -> None:
        self.folder = folder
        self.smallest = smallest

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, or an equal contiguous one in a file where it is large and in memory.

        Raises ``OSError`` for a full disk (before anything is written: a page that cannot be
        written later would end the process).
        """
        if tensor.nbytes < self.smallest or tensor.device.type != "cpu":
            return tensor
        if tensor.untyped_storage().filename is not None and tensor.is_contiguous():
            return tensor
        handle, name = tempfile.mkstemp(".scratch", dir=self.folder)
        try:
            os.posix_fallocate(handle, 0, tensor.nbytes)
            with torch.inference_mode(False):
                kept = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
                kept = kept.view(tensor.shape)
                kept.copy_(tensor)
        finally:
            os.close(handle)
            Path(name).unlink()
        return kept
