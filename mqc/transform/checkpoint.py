"""Checkpoints of a running pass list: what is kept where a compile is killed, and found again."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mqc.errors import MqcError
from mqc.ir import NamedScratch, ParamStore, Program
from mqc.ir.serialize import program_from_json, program_to_json
from mqc.ir.types import dtype_from_name, dtype_name
from mqc.transform.base import Journal, Skip
from mqc.transform.manager import PassRecord, State
from mqc.transform.record import DamagedRecord, read_record, sync, write_record

FORMAT = 1
SECONDS = 10.0
"""Work that is worth keeping."""
SHARE = 20
"""Work to a checkpoint's cost, at least: checkpoints take a twentieth of the time, at most."""
CHECKPOINT = "checkpoint"
_PARTS = re.compile(r"parts-(\d+)-(\d+)")
_BYTES_PER_SECOND = 5e8
"""Hashing and writing, before the first checkpoint shows it."""


class Checkpoints:
    """The state after a pass, in a folder; only the last one is kept.

    Large tensors are there already, in the files of the program's :class:`NamedScratch`: a
    checkpoint hashes the new ones, has them written out, and refers to them. Parameters as they
    were captured are left out. All else is one record (:mod:`mqc.transform.record`), put in place
    at once, so there is a whole checkpoint at any time. ``parts-<pass>-<n>`` hold the finished
    parts of passes that keep a journal.

    Checkpoints cost work no error: where one cannot be written, ``tell`` is told, and the passes go
    on.
    """

    def __init__(
        self, folder: Path, captured: Program, digest: str, tell: Callable[[str], None]
    ) -> None:
        """``captured``: the program before the first pass, whose ``params.scratch`` is a
        :class:`NamedScratch` in ``folder``. ``digest``: a checkpoint of another one is ignored."""
        scratch = captured.params.scratch
        assert isinstance(scratch, NamedScratch)
        self.folder = folder
        self.captured = captured
        self.digest = digest
        self.tell = tell
        self.scratch = scratch
        self.parts: dict[int, dict[str, Path]] = {}
        self._hashes: dict[str, str] = {}
        self._saved = time.monotonic()
        self._current = False
        self._told: set[str] = set()
        self._rate = _BYTES_PER_SECOND
        scratch.make_room = self._make_room

    @property
    def path(self) -> Path:
        return self.folder / CHECKPOINT

    def restore(self) -> State | None:
        """The state that an earlier process left, if it is whole; what it left else is removed."""
        state = None
        if self.path.is_file():
            try:
                state = self._read()
            except (DamagedRecord, MqcError, OSError, ValueError, KeyError, TypeError) as error:
                self.tell(f"the checkpoint in {self.folder} is ignored: {error}")
                self._forget()
        self.scratch.sweep()
        done = 0 if state is None else len(state.records)
        for index, path in self._part_files():
            if index < done:
                path.unlink()
                continue
            try:
                data = read_record(path)[1]
            except (DamagedRecord, OSError) as error:
                self.tell(f"a part of a pass in {self.folder} is ignored: {error}")
                path.unlink(missing_ok=True)
                continue
            if data["digest"] == self.digest:
                self.parts.setdefault(index, {}).update(dict.fromkeys(data["parts"], path))
        self._current = state is not None
        return state

    def journal(self, index: int) -> Journal:
        """The journal of pass ``index``."""
        return FileJournal(self, index)

    def passed(self, state: State, *, last: bool = False) -> None:
        """A pass has ended: write a checkpoint where it is worth its cost; the ``last`` one is
        written wherever there is much to lose, because little has to be written then."""
        self._current = False
        work = time.monotonic() - self._saved
        cost = 0.0 if last else self._new_bytes(state.program.params) / self._rate
        if work >= max(SECONDS, SHARE * cost) or (last and self.path.is_file()):
            self._save(state)

    def finish(self, state: State) -> None:
        """All passes have ended; what follows writes much to the disk."""
        if not self._current:
            self.passed(state, last=True)

    def kept(self, names: Sequence[str], state: State | None) -> str | None:
        """Where the passes ``names`` go on, in words; None if from the start."""
        done = 0 if state is None else len(state.records)
        counts = [f"with {len(self.parts[i])} layers of {names[i]}" for i in sorted(self.parts)]
        if done:
            counts.insert(0, f"after {names[done - 1]} ({done} of {len(names)} passes)")
        return ", ".join(counts) or None

    def failed(self, what: str, error: Exception) -> None:
        """Tell, once, that something could not be kept."""
        if what not in self._told:
            self._told.add(what)
            self.tell(f"{what} cannot be kept in {self.folder}: {error}; going on without")

    def _save(self, state: State) -> None:
        start = time.monotonic()
        try:
            size = self._write(state)
        except (OSError, MqcError) as error:
            self.failed("a checkpoint", error)
            return
        self._saved = time.monotonic()
        self._current = True
        if size > 1 << 28:
            self._rate = size / (self._saved - start)
        for index, path in self._part_files():
            if index < len(state.records):
                path.unlink(missing_ok=True)
                self.parts.pop(index, None)

    def _write(self, state: State) -> int:
        params, new = state.program.params, 0
        small: dict[str, torch.Tensor] = {}
        files: dict[str, str] = {}
        entries: list[tuple[str, Any]] = []
        for name in list(params):
            if params.shares(name, self.captured.params):
                entries.append((name, "captured"))
                continue
            value = params[name]
            if value.nbytes >= self.scratch.smallest and self.scratch.file_of(value) is None:
                value = self.scratch.keep(value.clone(), lasting=True)
                params[name] = value
            file = self.scratch.file_of(value)
            if file is None:
                entries.append((name, f"{len(small)}"))
                small[f"{len(small)}"] = value
                continue
            if file not in self._hashes:
                self._hashes[file] = _sha256(value)
                sync(self.folder / file)
                new += value.nbytes
            files[file] = self._hashes[file]
            kind = [dtype_name(value.dtype), list(value.shape)]
            entries.append((name, {"file": file, "type": kind}))
        data = {
            "format": FORMAT,
            "digest": self.digest,
            "program": program_to_json(state.program),
            "params": entries,
            "files": files,
            "records": [asdict(record) for record in state.records],
            "taken": state.taken,
        }
        write_record(self.path, small, data)
        self.scratch.pin(files)
        self._hashes = files
        return new

    def _read(self) -> State:
        small, data = read_record(self.path)
        if data["format"] != FORMAT or data["digest"] != self.digest:
            raise DamagedRecord("it is of another compile")
        params = ParamStore(self.scratch)
        self.scratch.pin(data["files"])
        for name, entry in data["params"]:
            if entry == "captured":
                params.take(name, self.captured.params)
            elif isinstance(entry, str):
                params[name] = small[entry]
            else:
                dtype, shape = entry["type"]
                params[name] = self._open(
                    entry["file"], dtype_from_name(dtype), shape, data["files"][entry["file"]]
                )
        self._hashes = data["files"]
        records = [
            PassRecord(**{**item, "skips": [Skip(**skip) for skip in item["skips"]]})
            for item in data["records"]
        ]
        return State(program_from_json(data["program"], params), records, data["taken"])

    def _open(self, name: str, dtype: torch.dtype, shape: list[int], digest: str) -> torch.Tensor:
        path = self.folder / name
        if path.stat().st_size != torch.Size(shape).numel() * dtype.itemsize:
            raise DamagedRecord(f"{name} has another size")
        tensor = self.scratch.open(name, dtype, shape)
        if _sha256(tensor) != digest:
            raise DamagedRecord(f"{name} is not as it was written")
        return tensor

    def _new_bytes(self, params: ParamStore) -> int:
        """Bytes of large tensors that the last checkpoint does not have."""
        return sum(
            params[name].nbytes
            for name in params
            if params.is_loaded(name)
            and not params.shares(name, self.captured.params)
            and params[name].nbytes >= self.scratch.smallest
            and self.scratch.file_of(params[name]) not in self._hashes
        )

    def _make_room(self, size: int) -> bool:
        """Give the checkpoint up where that frees the bytes without which the compile fails."""
        parts = [path for _, path in self._part_files()]
        idle = self.scratch.idle() + sum(path.stat().st_size for path in parts)
        if idle == 0 or shutil.disk_usage(self.folder).free + idle < size:
            return False
        self.tell(f"the disk is full: the checkpoint in {self.folder} is given up, going on")
        for path in parts:
            path.unlink(missing_ok=True)
        self.parts.clear()
        self._forget()
        return True

    def _forget(self) -> None:
        self.path.unlink(missing_ok=True)
        self._hashes = {}
        self._current = False
        self.scratch.pin(())

    def _part_files(self) -> list[tuple[int, Path]]:
        found = ((_PARTS.fullmatch(path.name), path) for path in self.folder.glob("parts-*"))
        return sorted((int(match[1]), path) for match, path in found if match is not None)


@dataclass
class _Pending:
    tensors: Mapping[str, torch.Tensor]
    data: Any


class FileJournal(Journal):
    """The parts of one pass, written together when some seconds of work have come up."""

    def __init__(self, owner: Checkpoints, index: int) -> None:
        self.owner = owner
        self.index = index
        self._pending: dict[str, _Pending] = {}
        self._due = time.monotonic() + SECONDS
        self._read: tuple[Path | None, dict[str, torch.Tensor], Any] = (None, {}, None)

    def recall(self, name: str) -> tuple[dict[str, torch.Tensor], Any] | None:
        """See :meth:`Journal.recall`."""
        path = self.owner.parts.get(self.index, {}).get(name)
        if path is None:
            return None
        if self._read[0] != path:  # parts are asked for in the order they were kept
            try:
                self._read = (path, *read_record(path))
            except (DamagedRecord, OSError):
                return None
        _, tensors, data = self._read
        names, value = data["parts"][name]
        return {key: tensors[stored] for key, stored in names.items()}, value

    def keep(self, name: str, tensors: Mapping[str, torch.Tensor], data: Any) -> None:
        """See :meth:`Journal.keep`."""
        self._pending[name] = _Pending(tensors, data)
        if time.monotonic() >= self._due:
            self._flush()

    def _flush(self) -> None:
        start = time.monotonic()
        tensors: dict[str, torch.Tensor] = {}
        parts: dict[str, Any] = {}
        for name, part in self._pending.items():
            names = {key: f"{len(tensors) + at}" for at, key in enumerate(part.tensors)}
            tensors.update({names[key]: value for key, value in part.tensors.items()})
            parts[name] = [names, part.data]
        known = [int(path.name.rpartition("-")[2]) for _, path in self.owner._part_files()]
        path = self.owner.folder / f"parts-{self.index}-{max(known, default=-1) + 1}"
        try:
            write_record(path, tensors, {"digest": self.owner.digest, "parts": parts})
        except OSError as error:
            self.owner.failed("finished layers", error)
        self._pending.clear()
        took = time.monotonic() - start
        self._due = time.monotonic() + max(SECONDS, SHARE * took)


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
