"""Compiled artifacts: a folder with a manifest, the target's files and the model's text files.

::

    manifest.json            what it is, how it was made, sha256 and size of every other file
    model/                   config.json, tokenizer, processor and chat template, as the source had
    <anything else>          the target's graphs and weights

A folder is written beside its final place and renamed when complete, so a half-written artifact
never stands under its own name. Bytes are a function of the compile alone: no time stamps, no
absolute paths, sorted JSON.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from mqc import __version__
from mqc.errors import ArtifactError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MODEL_FOLDER = "model"

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded", "File too large")


class ArtifactWriter:
    """Context manager that writes an artifact to ``path``; nothing appears there until the end.

    Usage::

        with ArtifactWriter(path) as writer:
            writer.require_space(estimated_bytes)
            target.emit(program, writer)          # files by writer.path("graphs/decoder.onnx")
            writer.copy_model_files(source)
            writer.describe(target="onnx", scheme=..., history=..., facts=..., calibration=...)

    On an exception (Ctrl-C too) the temporary folder is removed and an older artifact stays as it
    was. Leftovers of killed writers are removed when the next one starts: a living writer holds a
    lock on its folder. Raises :class:`ArtifactError` where ``path`` is a file or a folder that is
    not an artifact, and for a full disk.
    """

    def __init__(self, path: str | Path) -> None:
        self.target = Path(os.path.realpath(path))
        self.folder: Path | None = None
        self._needed = 0
        self._manifest: dict[str, Any] = {}
        self._lock: int | None = None

    def path(self, name: str) -> Path:
        """Where to write file ``name`` (relative, ``/``-separated); its folder is made."""
        pure = PurePosixPath(name)
        if self.folder is None:
            raise ArtifactError("the artifact writer is not open", hint="use it in a with block")
        if pure.is_absolute() or ".." in pure.parts or not pure.parts:
            raise ArtifactError(f"{name!r} is not a file name inside an artifact")
        path = self.folder / pure
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def require_space(self, size: int) -> None:
        """Raise now if the disk has less than ``size`` bytes free."""
        self._needed = max(self._needed, size)
        if size > self._free():
            raise self._full()

    def copy_model_files(self, source: str | Path) -> list[str]:
        """Copy configuration, tokenizer, processor and chat template files of a model folder.

        Returns the names. Raises :class:`ArtifactError` where there is no ``config.json``.
        """
        from mqc.capture.processor import processor_files

        source = Path(source)
        if not (source / "config.json").is_file():
            raise ArtifactError(
                f"{source} has no config.json", hint="give a folder in the Hugging Face layout"
            )
        names = [file.relative_to(source).as_posix() for file in processor_files(source)]
        for name in names:
            shutil.copyfile(source / name, self.path(f"{MODEL_FOLDER}/{name}"))
        return names

    def describe(
        self,
        *,
        target: str,
        scheme: Any = None,
        history: Any = (),
        facts: Mapping[str, Any] | None = None,
        calibration: Any = None,
        **extra: Any,
    ) -> None:
        """Set the manifest's fields (JSON data). ``extra`` keys stand beside the others."""
        self._manifest = {
            "target": target,
            "scheme": scheme,
            "history": list(history),
            "facts": dict(facts or {}),
            "calibration": calibration,
            **extra,
        }

    def __enter__(self) -> Self:
        _refuse_foreign(self.target)
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            clean_leftovers(self.target)
            self.folder, self._lock = _make_locked(self.target)
        except OSError as error:
            raise self._io_error(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._finish()
            elif _is_full(error):
                raise self._full() from error
        except OSError as late:
            raise self._io_error(late) from late
        finally:
            self._discard()

    def _finish(self) -> None:
        assert self.folder is not None
        if not self._manifest:
            raise ArtifactError("the artifact was not described", hint="call writer.describe()")
        manifest = {
            "format": FORMAT_VERSION,
            "mqc": __version__,
            **self._manifest,
            "files": {
                name: {"sha256": sha256(path), "size": path.stat().st_size}
                for name, path in _files(self.folder)
            },
        }
        text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False)
        (self.folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
        _refuse_foreign(self.target)
        if self.target.exists():
            old = self.folder.with_suffix(".old")
            with _locked(self.target):
                self.target.rename(old)
                self.folder.rename(self.target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            self.folder.rename(self.target)

    def _discard(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self.folder = None

    def _free(self) -> int:
        return shutil.disk_usage(self.target.parent).free

    def _io_error(self, error: OSError) -> ArtifactError:
        if _is_full(error):
            return self._full()
        return ArtifactError(
            f"artifact {self.target} cannot be written: {error.strerror or error}",
            hint="check the permissions of the folder, or choose another place",
        )

    def _full(self) -> ArtifactError:
        written = sum(path.stat().st_size for _, path in _files(self.folder)) if self.folder else 0
        needed = format_size(self._needed)
        if self._needed <= written:
            needed = f"more than {format_size(written)}"
        return ArtifactError(
            f"no space for artifact {self.target}: it needs {needed}, and "
            f"{format_size(self._free() + written)} were free",
            hint="free some space, or choose another disk",
        )


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of an artifact.

    Raises :class:`ArtifactError` for a missing folder, one that is no artifact, a damaged manifest
    or another format version.
    """
    folder = Path(path)
    file = folder / MANIFEST
    if folder.is_file():
        raise ArtifactError(
            f"{folder} is a file, not an artifact", hint="give the folder that mqc compile wrote"
        )
    if not folder.is_dir():
        raise ArtifactError(f"artifact {folder} does not exist", hint=_old_hint(folder))
    if not file.is_file():
        raise ArtifactError(
            f"{folder} is not an artifact: it has no {MANIFEST}",
            hint="give the folder that mqc compile wrote",
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format"]
        if not isinstance(manifest["files"], dict) or not isinstance(manifest["target"], str):
            raise ValueError("fields are missing")
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{file} is damaged: {error}", hint="compile the model again"
        ) from error
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{file} has format {version}; this mqc reads format {FORMAT_VERSION}",
            hint="compile the model again with this version",
        )
    return dict(manifest)


def check_files(path: str | Path, *, hashes: bool = True) -> dict[str, Any]:
    """Compare every file with the manifest (sizes, and sha256 unless ``hashes`` is False).

    Returns the manifest. Raises :class:`ArtifactError` naming the first file that differs.
    """
    folder, manifest = Path(path), read_manifest(path)
    for name, entry in sorted(manifest["files"].items()):
        file = folder / name
        if not file.is_file():
            problem = "is missing"
        elif file.stat().st_size != entry["size"]:
            problem = f"has {file.stat().st_size} bytes instead of {entry['size']}"
        elif hashes and sha256(file) != entry["sha256"]:
            problem = "has changed: its sha256 differs from the manifest's"
        else:
            continue
        raise ArtifactError(
            f"{name} of artifact {folder} {problem}", hint="copy or compile it again"
        )
    return manifest


def clean_leftovers(target: Path) -> list[Path]:
    """Remove what killed writers of ``target`` left beside it; return the removed folders.

    A writer killed between its two renames leaves the previous artifact aside: it is put back.
    """
    removed = []
    for folder in _leftovers(target):
        with contextlib.suppress(OSError), _locked(folder, wait=False):
            if folder.suffix == ".old" and not target.exists() and (folder / MANIFEST).is_file():
                folder.rename(target)
            else:
                shutil.rmtree(folder)
                removed.append(folder)
    return removed


def folder_size(path: str | Path) -> int:
    """Bytes of all files below ``path``."""
    return sum(file.stat().st_size for _, file in _files(Path(path)))


def format_size(size: int) -> str:
    """Bytes for people: ``2.5 MB``."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(relative name, path) of every file below ``folder``, sorted, the manifest left out."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            yield name, path


def _refuse_foreign(target: Path) -> None:
    if not target.exists():
        return
    empty = target.is_dir() and not any(target.iterdir())
    if not empty and not (target / MANIFEST).is_file():
        kind = "folder that is not an mqc artifact" if target.is_dir() else "file"
        raise ArtifactError(
            f"{target} is a {kind}; it is not overwritten",
            hint="choose another place, or remove it yourself",
        )


def _make_locked(target: Path) -> tuple[Path, int]:
    """A new locked folder beside ``target``, on the same file system."""
    while True:
        folder = target.parent / f".{target.name}.mqc-{secrets.token_hex(6)}.tmp"
        folder.mkdir()
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if folder.exists():  # not swept away between mkdir and lock
                return folder, descriptor
            os.close(descriptor)


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a folder; without ``wait``, BlockingIOError where another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _is_full(error: BaseException | None) -> bool:
    """Whether an exception, or what caused it, is a full disk (libraries wrap the OSError)."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(text in str(error) for text in _FULL_TEXTS):
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False


def _old_hint(folder: Path) -> str:
    asides = [path for path in _leftovers(folder) if path.suffix == ".old"]
    if asides:
        return f"a compile was killed while replacing it; its previous state is in {asides[0]}"
    return "make it with mqc compile"


def _leftovers(target: Path) -> list[Path]:
    """Temporary and set-aside folders of all writers of ``target``, sorted."""
    name = re.compile(rf"\.{re.escape(target.name)}\.mqc-[0-9a-f]{{12}}\.(tmp|old)")
    folders = target.parent.glob(".*.mqc-*")
    return sorted(path for path in folders if name.fullmatch(path.name))
