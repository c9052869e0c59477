"""Launching the library's kernels: streams, workspaces, rows and pointers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mqc.cuda.library import Arguments, DType, Library, UnsupportedError

DTYPES = {
    torch.bfloat16: DType.BF16,
    torch.float16: DType.F16,
    torch.float32: DType.F32,
    torch.int8: DType.I8,
}


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def as_rows(x: Tensor) -> Tensor:
    """x [..., K] as [rows, K] with one stride between rows; a copy only where there is none."""
    flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


class Launcher:
    """The library on a device.

    Args:
        library: the loaded kernel library.
        device: where tensors live.
        stream: gives the stream (an integer) that work is enqueued on.
    """

    def __init__(
        self,
        library: Library,
        device: torch.device,
        stream: Callable[[], int] = lambda: torch.cuda.current_stream().cuda_stream,
    ) -> None:
        self.library = library
        self.device = device
        self._stream = stream
        self._workspaces: list[Tensor] = []
        self._sizes: dict[Any, int] = {}

    def launch(self, name: str, arguments: Arguments) -> None:
        """Enqueue a kernel."""
        self.library.launch(name, arguments, self._stream())

    def try_launch(self, name: str, arguments: Arguments) -> bool:
        """Enqueue a kernel; False where this device has none for the arguments."""
        try:
            self.launch(name, arguments)
        except UnsupportedError:
            return False
        return True

    def workspace(self, name: str, key: tuple[Any, ...], arguments: Any) -> None:
        """Give a call its workspace: one for all, zeroed once. Older ones stay alive, for captured
        graphs hold their addresses."""
        size = self._sizes.get((name, key))
        if size is None:
            size = self._sizes[name, key] = self.library.workspace(name, arguments)
        if size == 0:
            return
        if not self._workspaces or self._workspaces[-1].numel() < size:
            count = max(size, 1 << 20)
            self._workspaces.append(torch.zeros(count, dtype=torch.uint8, device=self.device))
        arguments.workspace = self._workspaces[-1].data_ptr()
        arguments.workspace_bytes = self._workspaces[-1].numel()
