"""Launching the library's kernels: streams, workspaces, rows and pointers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mqc.cuda.library import Arguments, DType, Library, UnsupportedError
from mqc.errors import TargetError

DTYPES = {
    torch.bfloat16: DType.BF16,
    torch.float16: DType.F16,
    torch.float32: DType.F32,
    torch.int8: DType.I8,
}


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """The current device is ``device``: graphs, streams and launches belong to the current one.

    Raises:
        TargetError: its memory was not enough for what was done.
    """
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    except torch.OutOfMemoryError as error:
        said = ". ".join(str(error).split(". ")[:3]).rstrip(".")
        raise TargetError(
            f"the memory of device {device} is not enough: {said}",
            hint="read prompts in chunks (chunk), run fewer sequences at once, shorten the prompt, "
            "or keep the KV cache in 8 bits (kv_cache=int8)",
        ) from error


def as_rows(x: Tensor) -> Tensor:
    """x [..., K] as [rows, K] with one stride between rows; a copy only where there is none."""
    flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


class Launcher:
    """The library on a device.

    Args:
        library: the loaded kernel library.
        device: where tensors live.
        stream: gives the stream (an integer) that work is enqueued on; torch's current one on the
            device where None.
    """

    def __init__(
        self,
        library: Library,
        device: torch.device,
        stream: Callable[[], int] | None = None,
    ) -> None:
        self.library = library
        self.device = device
        self._stream = stream or (lambda: torch.cuda.current_stream(device).cuda_stream)
        self._workspaces: list[Tensor] = []
        self._sizes: dict[Any, int] = {}

    def launch(self, name: str, arguments: Arguments) -> None:
        """Enqueue a kernel, on this device whichever is the current one."""
        if self._is_current():
            self.library.launch(name, arguments, self._stream())
            return
        with torch.cuda.device(self.device):
            self.library.launch(name, arguments, self._stream())

    def _is_current(self) -> bool:
        device = self.device
        return device.type != "cuda" or device.index in (None, torch.cuda.current_device())

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
            with nullcontext() if self._is_current() else torch.cuda.device(self.device):
                size = self._sizes[name, key] = self.library.workspace(name, arguments)
        if size == 0:
            return
        if not self._workspaces or self._workspaces[-1].numel() < size:
            count = max(size, 1 << 20)
            self._workspaces.append(torch.zeros(count, dtype=torch.uint8, device=self.device))
        arguments.workspace = self._workspaces[-1].data_ptr()
        arguments.workspace_bytes = self._workspaces[-1].numel()
