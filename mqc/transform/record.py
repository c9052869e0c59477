"""Tensors and JSON data in one file that is whole or not there, and tells when it was damaged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

_JSON = "json"
_DIGEST = 65  # hexadecimal SHA-256 and a line feed


class DamagedRecord(Exception):  # noqa: N818  (what it is, not what failed)
    """A record does not hold what was written."""


def write_record(path: Path, tensors: Mapping[str, torch.Tensor], data: Any) -> None:
    """Write both to ``path``, on the disk when this returns; a kill leaves the file as it was.

    One line with the SHA-256 of the rest, then safetensors with the data as one tensor of bytes.
    Raises ``OSError`` for a full disk and the like; nothing is left behind then.
    """
    text = bytearray(json.dumps(data).encode())
    own = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    content = save({**own, _JSON: torch.frombuffer(text, dtype=torch.uint8)})
    draft = path.with_name(path.name + ".tmp")
    try:
        with draft.open("wb") as file:
            file.write(hashlib.sha256(content).hexdigest().encode() + b"\n")
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def read_record(path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """What :func:`write_record` wrote. Raises :class:`DamagedRecord`, ``OSError``."""
    content = path.read_bytes()
    digest, content = content[: _DIGEST - 1], content[_DIGEST:]
    if hashlib.sha256(content).hexdigest().encode() != digest:
        raise DamagedRecord(f"{path.name} is not as it was written")
    try:
        tensors = load(content)
        data = json.loads(tensors.pop(_JSON).numpy().tobytes())
    except (SafetensorError, KeyError, ValueError) as error:
        raise DamagedRecord(f"{path.name} is of another form: {error}") from error
    # Own memory, aligned as torch does: the sums of some math libraries depend on it.
    return {name: value.clone() for name, value in tensors.items()}, data


def sync(path: Path) -> None:
    """Have a file, or a folder's names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
