"""Large tensors in files: memory which the system can write out and take back."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import weakref
from collections.abc import Callable, Collection
from pathlib import Path

import torch

SMALLEST = 1 << 20
"""Bytes from which a tensor is worth a file; below, mapping costs more than it frees."""

SUFFIX = ".scratch"


class Scratch:
    """Keeps tensors in mapped, unlinked files of ``folder``.

    A compile touches one layer at a time, yet holds every weight of every step. Mapped from files,
    the weights are pages that the system writes out where memory is short, so that memory bounds
    neither the model nor the number of copies; the disk does. The files have no name: they are gone
    with the last tensor that uses them, and with a killed process.
    """

    def __init__(self, folder: Path, smallest: int | None = None) -> None:
        self.folder = folder
        self.smallest = SMALLEST if smallest is None else smallest

    def keep(self, tensor: torch.Tensor, *, lasting: bool = False) -> torch.Tensor:
        """``tensor``, or an equal contiguous one in a file where it is large and in memory.

        ``lasting``: a later process may want it (a weight, not a passing activation); see
        :class:`NamedScratch`. Raises ``OSError`` for a full disk (before anything is written: a
        page that cannot be written later would end the process).
        """
        if tensor.nbytes < self.smallest or tensor.device.type != "cpu":
            return tensor
        if tensor.untyped_storage().filename is not None and tensor.is_contiguous():
            return tensor
        handle, name = tempfile.mkstemp(SUFFIX, dir=self.folder)
        named = False
        try:
            self._allocate(handle, tensor.nbytes)
            kept = mapped(Path(name), tensor.dtype, tensor.shape)
            with torch.inference_mode(False):
                kept.copy_(tensor)
            named = lasting and self._name(Path(name).name, kept)
        finally:
            os.close(handle)
            if not named:
                Path(name).unlink()
        return kept

    def _allocate(self, handle: int, size: int) -> None:
        os.posix_fallocate(handle, 0, size)

    def _name(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the file of ``tensor`` stays under its name."""
        return False


class NamedScratch(Scratch):
    """A scratch whose lasting tensors can be found again by another process.

    The file of a lasting tensor has a name for as long as the tensor, or a view of it, lives; a
    pinned one for longer. A killed process leaves its files behind: :meth:`sweep` removes what is
    not pinned.
    """

    def __init__(self, folder: Path, smallest: int | None = None) -> None:
        super().__init__(folder, smallest)
        self.make_room: Callable[[int], bool] = lambda size: False
        """Called where the disk is full: whether so many bytes were freed."""
        self._living: set[str] = set()
        self._pinned: set[str] = set()
        self._swept = False
        self._process = os.getpid()

    def file_of(self, tensor: torch.Tensor) -> str | None:
        """The name of the file that holds ``tensor`` and nothing else, if there is one."""
        path = tensor.untyped_storage().filename
        if path is None or Path(path).parent != self.folder or Path(path).name not in self._living:
            return None
        whole = tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()
        return Path(path).name if whole else None

    def open(self, name: str, dtype: torch.dtype, shape: Collection[int]) -> torch.Tensor:
        """The tensor in file ``name``, as :meth:`keep` gave it to the process that wrote it."""
        tensor = mapped(self.folder / name, dtype, shape)
        self._name(name, tensor)
        return tensor

    def pin(self, names: Collection[str]) -> None:
        """Keep these files though no tensor uses them, and these alone."""
        before, self._pinned = self._pinned, set(names)
        for name in before - self._pinned - self._living:
            self._unlink(name)

    def idle(self) -> int:
        """Bytes of pinned files that no tensor uses."""
        return sum(_size(self.folder / name) for name in self._pinned - self._living)

    def sweep(self) -> None:
        """Remove what killed processes left: files that are neither pinned nor of a tensor here."""
        self._swept = True
        self._remove_all_but(self._pinned | self._living)

    def leave(self) -> None:
        """Leave the pinned files behind. Living tensors stay as they are, without a name.

        Before :meth:`sweep` nobody has said which files are needed: then all stay.
        """
        if self._swept:
            self._remove_all_but(self._pinned)

    def _remove_all_but(self, names: Collection[str]) -> None:
        for path in self.folder.glob(f"*{SUFFIX}"):
            if path.name not in names:
                self._unlink(path.name)

    def _allocate(self, handle: int, size: int) -> None:
        try:
            super()._allocate(handle, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self.make_room(size):
                raise
            super()._allocate(handle, size)

    def _name(self, name: str, tensor: torch.Tensor) -> bool:
        self._living.add(name)
        gone = weakref.finalize(tensor.untyped_storage(), self._released, name)
        gone.atexit = False  # the folder's owner cleans up
        return True

    def _released(self, name: str) -> None:
        self._living.discard(name)
        if name not in self._pinned and os.getpid() == self._process:
            self._unlink(name)

    def _unlink(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.folder / name).unlink()


def mapped(path: Path, dtype: torch.dtype, shape: Collection[int]) -> torch.Tensor:
    """The tensor whose bytes are the file's. Writing to it writes to the file."""
    with torch.inference_mode(False):
        size = torch.Size(shape).numel()
        flat = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
        return flat.view(torch.Size(shape))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
