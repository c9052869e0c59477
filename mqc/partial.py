"""The folder beside an artifact in which its compile keeps what it has finished.

``OUT.partial`` holds the weights on their way through the passes, a checkpoint that refers to them
(:mod:`mqc.transform.checkpoint`), and ``key.json``: what the compile was asked for, and of what.
Only a compile of the same key goes on from there. One process at a time holds the folder's lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mqc import __version__
from mqc.artifact import folder_size, format_size, sha256
from mqc.calib.dataset import Dataset
from mqc.capture import processor_files
from mqc.errors import ArtifactError, UsageError
from mqc.ir import NamedScratch, Program
from mqc.ir.serialize import program_to_json
from mqc.spec import Scheme
from mqc.transform import Pass
from mqc.transform.checkpoint import CHECKPOINT

KEY = "key.json"
LIBRARIES = ("torch", "transformers", "pillow", "numpy")
_SHOWN = 4
_OWN = re.compile(r"(key\.json|checkpoint|parts-\d+-\d+)(\.tmp)?|tmp\w+\.scratch")
"""Names of files that a compile makes in its folder."""


class Partial:
    """Context manager of the folder ``<out>.partial``.

    It is removed where the body succeeds, and where it fails without having kept anything; else the
    error gets a note that says how to go on. Raises :class:`ArtifactError` where another process
    compiles into ``out``, and where the folder cannot be made or holds anything else.
    """

    def __init__(self, out: Path, *, fresh: bool = False) -> None:
        """``fresh``: throw away what an earlier compile kept."""
        self.out = Path(os.path.realpath(out))
        self.folder = self.out.with_name(self.out.name + ".partial")
        self.fresh = fresh
        self.scratch = NamedScratch(self.folder)
        self._lock: int | None = None
        self._own = False  # whether what is kept is known to be of this compile

    def __enter__(self) -> Self:
        try:
            self._lock = self._locked()
            self._refuse_foreign()
            if self.fresh or not self._holds_work():
                self._clear()
        except BlockingIOError as error:
            raise ArtifactError(
                f"another compile is writing {self.out} just now",
                hint="wait for it, or choose another --out",
            ) from error
        except ArtifactError:
            self._release()
            raise
        except OSError as error:
            self._release()
            raise ArtifactError(
                f"the working folder {self.folder} cannot be used: {error.strerror or error}",
                hint="check the permissions of the folder above, or choose another --out",
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None or not self._holds_work():
                shutil.rmtree(self.folder, ignore_errors=True)
                return
            self.scratch.leave()
            if self._own:
                assert error is not None
                error.add_note(
                    f"what was finished is kept in {self.folder}, "
                    f"{format_size(folder_size(self.folder))}; the same command goes on there"
                )
        finally:
            self._release()

    def require(self, key: Mapping[str, Any]) -> None:
        """Raise :class:`UsageError`, naming what differs, where another compile's work is kept.

        ``key`` may hold a part of the fields that :meth:`keep_key` was given.
        """
        if not self._holds_work():
            return
        kept = self._kept_key()
        if kept is None:  # work without a key cannot be judged
            self._clear()
            return
        differences = [
            line
            for field, value in _plain(key).items()
            for line in _differences(field, kept.get(field), value)
        ]
        if differences:
            more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise UsageError(
                f"{self.folder} holds an unfinished compile of other input: "
                f"{'; '.join(differences[:_SHOWN])}{more}",
                hint="--fresh (resume=False) throws it away and starts over; or choose another "
                "--out",
            )

    def keep_key(self, key: Mapping[str, Any]) -> str:
        """Write the whole key; returns its digest."""
        self._own = True
        text = json.dumps(_plain(key), indent=1, sort_keys=True)
        draft = self.folder / f"{KEY}.tmp"
        with contextlib.suppress(OSError):  # a full disk: then nothing else is kept, either
            draft.write_text(text, encoding="utf-8")
            draft.replace(self.folder / KEY)
        return hashlib.sha256(text.encode()).hexdigest()

    def _locked(self) -> int:
        """The locked folder, made where it is missing."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(handle)
                raise
            # A process that ended meanwhile may have removed the folder.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), self.folder.stat()):
                    return handle
            os.close(handle)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _refuse_foreign(self) -> None:
        foreign = sorted(p.name for p in self.folder.iterdir() if not _OWN.fullmatch(p.name))
        if foreign:
            raise ArtifactError(
                f"{self.folder} would be the working folder, and holds {foreign[0]!r}, which mqc "
                "did not make",
                hint="move it away, or choose another --out",
            )

    def _holds_work(self) -> bool:
        return any(self.folder.glob("parts-*")) or (self.folder / CHECKPOINT).is_file()

    def _kept_key(self) -> dict[str, Any] | None:
        try:
            data = json.loads((self.folder / KEY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) else None

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()


def asked_key(scheme: Scheme, passes: Sequence[Pass], options: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for, and the program that does it: known before anything is read."""
    return {
        "mqc": {"version": __version__, "sources": _own_sources()},
        "libraries": {name: version(name) for name in LIBRARIES},
        "scheme": scheme.to_json(),
        "passes": [_pass_name(item) for item in passes],
        "options": dict(options),
    }


def data_key(program: Program, folder: Path, data: Dataset | None) -> dict[str, Any]:
    """What is compiled: the captured program, the files of its checkpoint, calibration rows.

    The weights are in the program's facts, by the hashes of their files or the hub's commit.
    """
    text = json.dumps(program_to_json(program), sort_keys=True).encode()
    files = {*processor_files(folder), *folder.glob("*.py")}
    rows = hashlib.sha256()
    for row in data or ():
        rows.update(f"{row.sha256} {json.dumps(row.answer)}\n".encode())
    return {
        "model": {
            "source": program.facts.get("source"),
            "graphs": hashlib.sha256(text).hexdigest(),
            "files": {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(files)},
        },
        "calibration": {"rows": len(data or ()), "sha256": rows.hexdigest()},
    }


def _pass_name(item: Pass) -> str:
    """A pass by name; one from elsewhere with the hash of its source, which may change."""
    kind = type(item)
    name = f"{item.name} ({kind.__module__}:{kind.__qualname__}"
    if kind.__module__.partition(".")[0] != "mqc":
        with contextlib.suppress(OSError, TypeError):
            name += f" {sha256(Path(inspect.getfile(kind)))[:16]}"
    return name + ")"


def _own_sources() -> str:
    """The hash of mqc's sources but the targets', which run after the passes."""
    digest = hashlib.sha256()
    for package in ("mqc", "mqc.passes"):
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations is not None
        root = Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root).as_posix()
            if name.partition("/")[0] not in ("passes", "backends", "cuda", "commands"):
                digest.update(f"{package} {name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def _differences(name: str, kept: Any, now: Any) -> list[str]:
    """Where two values of JSON data differ, in words."""
    if kept == now:
        return []
    if isinstance(kept, dict) and isinstance(now, dict):
        return [
            line
            for field in sorted(kept.keys() | now.keys())
            for line in _differences(f"{name}.{field}", kept.get(field), now.get(field))
        ]
    before, after = (json.dumps(value) for value in (kept, now))
    if max(len(before), len(after)) > 60:  # hashes and lists say nothing to people
        return [f"{name} has changed"]
    return [f"{name} is {after}, was {before}"]


def _plain(key: Mapping[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(key, sort_keys=True))
    return data
