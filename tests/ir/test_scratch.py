"""Tensors in unlinked files: same values, nothing left behind, errors before damage."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest
import torch

from mqc.ir import ParamStore, Scratch


def mapped_files(folder: Path) -> int:
    """How many files of ``folder``, unlinked ones too, this process has mapped."""
    text = Path("/proc/self/maps").read_text()
    return sum(str(folder) in line for line in text.splitlines())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
def test_kept_tensors_are_equal_and_leave_with_the_last_user(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    value = torch.randint(-100, 100, (7, 33)).to(dtype).T
    kept = Scratch(tmp_path, smallest=1).keep(value)
    assert kept.dtype == dtype and kept.is_contiguous() and torch.equal(kept, value)
    assert not list(tmp_path.iterdir()) and mapped_files(tmp_path) == 1
    part = kept[3:5]
    del kept
    assert torch.equal(part, value[3:5])
    del part
    gc.collect()
    assert mapped_files(tmp_path) == 0


def test_small_and_kept_tensors_stay_where_they_are(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, smallest=64)
    small, large = torch.ones(15), torch.ones(16)
    assert scratch.keep(small) is small
    kept = scratch.keep(large)
    assert kept is not large and scratch.keep(kept) is kept
    assert torch.equal(scratch.keep(kept.view(4, 4).T), torch.ones(4, 4))


def test_values_made_in_inference_mode_can_be_changed_later(tmp_path: Path) -> None:
    with torch.inference_mode():
        kept = Scratch(tmp_path, smallest=1).keep(torch.ones(4))
    kept.add_(1)
    assert not kept.is_inference() and kept.sum() == 8


def test_stores_keep_what_they_read_and_add(tmp_path: Path) -> None:
    store = ParamStore(Scratch(tmp_path, smallest=1))
    store["w"] = lambda: torch.ones(8)
    name = store.copy().add("w", torch.zeros(8))
    assert name == "w~1" and mapped_files(tmp_path) == 0
    cast = store.cast(torch.float64)
    assert cast["w"].dtype == torch.float64 and not store.is_loaded("w")
    assert cast["w"].untyped_storage().filename is not None
    assert mapped_files(tmp_path) == 1


def test_a_full_disk_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        Scratch(tmp_path, smallest=1).keep(torch.ones(8))
    assert not list(tmp_path.iterdir())
