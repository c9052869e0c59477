"""Calibration and evaluation data: chat messages with pictures, and where they are from.

Sources: a folder of pictures (a ``name.txt`` beside ``name.png`` is its question), a JSONL file
(one ``{"messages": [...], "answer": "..."}`` a line), a generated set by name
(``tiny-vqa:calibration:256``), or a sequence of conversations. Rows are kept by their paths and
opened when read.

A row's hash covers what the model sees: roles, text (Unicode NFC, white space collapsed) and the
decoded RGB pixels of its pictures and videos, but not the answer. So a row is known again after it
was copied, renamed or stored in another picture format, and :func:`refuse_overlap` can keep
evaluation clean.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

from mqc.errors import CalibrationError, MqcError, UsageError
from mqc.host.images import open_image
from mqc.host.prompt import image_source, split_media
from mqc.host.videos import PICTURES, open_video, video_source

DEFAULT_PROMPT = "Describe this image."
GENERATED = "tiny-vqa"


@dataclass(frozen=True)
class Row:
    """One conversation, its right answer where known, and where relative image paths start.

    ``where`` names the row in errors: ``"line 3 of rows.jsonl"``.
    """

    messages: list[dict[str, Any]]
    answer: str | None = None
    base: Path | None = None
    where: str = field(default="", compare=False)

    def loaded(self) -> list[dict[str, Any]]:
        """The messages with every picture (PIL, RGB) and video opened."""
        with self.named():
            return [{**item, "content": self._open(item["content"])} for item in self.messages]

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors from inside name this row too."""
        try:
            yield
        except MqcError as error:
            if self.where and self.where not in getattr(error, "__notes__", ()):
                error.add_note(self.where)
            raise

    def _open(self, content: Any) -> Any:
        if isinstance(content, str):
            return content
        return [self._opened(part) for part in content]

    def _opened(self, part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part.get("type") == "image":
            return {"type": "image", "image": open_image(image_source(part), self.base)}
        if part.get("type") == "video":
            return {"type": "video", "video": open_video(part, self.base)}
        return part

    @cached_property
    def sha256(self) -> str:
        """The row's hash, hexadecimal."""
        with self.named():
            return row_hash(self.messages, self.base)


class Dataset(Sequence[Row]):
    """Rows and the name of their source (a file or folder name, never a whole path)."""

    def __init__(self, rows: Sequence[Row], source: str) -> None:
        self.source = source
        self._rows = list(rows)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Row | Dataset:
        if isinstance(index, slice):
            return Dataset(self._rows[index], self.source)
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def provenance(self) -> dict[str, Any]:
        """What the manifest records: ``{"source", "rows", "sha256": [one per row, in order]}``."""
        return {
            "source": self.source,
            "rows": len(self),
            "sha256": [row.sha256 for row in self],
        }


def load_dataset(
    source: str | Path | Sequence[Any],
    *,
    limit: int | None = None,
    prompt: str = DEFAULT_PROMPT,
) -> Dataset:
    """Open a source of rows.

    Args:
        source: a folder, a ``.jsonl`` file, ``"tiny-vqa:<split>:<count>[:<first>]"``, or a
            sequence whose items are conversations or ``{"messages", "answer"}``.
        limit: take the first rows only.
        prompt: the question for pictures of a folder that have none.

    Raises:
        CalibrationError: the source is missing, malformed (the line is named) or empty.
    """
    if isinstance(source, (str, Path)):
        rows, name = _from_place(source, prompt)
    else:
        name = "given rows"
        rows = [_row(item, f"row {index}", None) for index, item in enumerate(source)]
    if limit is not None:
        rows = rows[:limit]
    if not rows:
        raise CalibrationError(
            f"{name} holds no rows", hint="give at least one picture or conversation"
        )
    return Dataset(rows, name)


def row_hash(messages: Sequence[Mapping[str, Any]], base: Path | None = None) -> str:
    """SHA-256 of a conversation as the model sees it, hexadecimal (see the module's text)."""
    plain, images, films = split_media(messages, base)
    digest = hashlib.sha256()
    pictures, videos = iter(images), iter(films)
    for message in plain:
        _feed(digest, "role", str(message["role"]).encode())
        for part in message["content"]:
            if part["type"] == "text":
                _feed(digest, "text", normalise(part["text"]).encode())
            elif part["type"] == "video":
                video = next(videos)
                _feed(digest, "video", repr((video.length, video.fps, video.rate)).encode())
                for frame in video.frames():
                    _feed(digest, "frame", b"%dx%d" % frame.size + frame.tobytes())
            else:
                picture = next(pictures)
                _feed(digest, "image", b"%dx%d" % picture.size + picture.tobytes())
    return digest.hexdigest()


def normalise(text: str) -> str:
    """Unicode NFC, runs of white space as one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def refuse_overlap(rows: Sequence[Row], provenance: Mapping[str, Any] | None) -> None:
    """Raise :class:`CalibrationError` if any of ``rows`` was used for calibration.

    ``provenance`` is the manifest's calibration record (None: no calibration, nothing to refuse).
    """
    used = set((provenance or {}).get("sha256", ()))
    if not used:
        return
    shared = [index for index, row in enumerate(rows) if row.sha256 in used]
    if shared:
        first = ", ".join(map(str, shared[:5])) + (", ..." if len(shared) > 5 else "")
        raise CalibrationError(
            f"{len(shared)} of {len(rows)} evaluation rows were used for calibration "
            f"(rows {first}; calibration source {(provenance or {}).get('source')!r})",
            hint="evaluate on other rows: a score on calibration data means nothing",
        )


def _feed(digest: Any, kind: str, data: bytes) -> None:
    """Add one field, its kind and length first, so that no two rows run into each other."""
    digest.update(f"{kind}:{len(data)}:".encode())
    digest.update(data)


def _from_place(source: str | Path, prompt: str) -> tuple[list[Row], str]:
    text = str(source)
    if text.split(":")[0] == GENERATED:
        return _generated(text), text
    path = Path(source).expanduser()
    name = path.resolve().name
    if path.is_dir():
        return _from_folder(path, prompt), name
    if path.is_file():
        return _from_jsonl(path), name
    raise CalibrationError(
        f"data source {text!r} does not exist",
        hint=f"give a folder of pictures, a .jsonl file, or {GENERATED}:calibration:256",
    )


def _generated(name: str) -> list[Row]:
    from mqc.testing import vqa

    hint = f"use {GENERATED}:<split>:<count>[:<first>], split one of {', '.join(vqa.SPLITS)}"
    _, *fields = name.split(":")
    if len(fields) not in (2, 3) or not all(field.isdecimal() for field in fields[1:]):
        raise CalibrationError(f"data source {name!r} is malformed", hint=hint)
    split, count, first = fields[0], int(fields[1]), int(fields[2]) if fields[2:] else 0
    if split not in vqa.SPLITS:
        raise CalibrationError(f"data source {name!r} names no split", hint=hint)
    samples = (vqa.sample(split, index) for index in range(first, first + count))
    return [Row(vqa.messages(sample), sample.answer) for sample in samples]


def _from_folder(folder: Path, prompt: str) -> list[Row]:
    rows = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in PICTURES or path.name.startswith("."):
            continue
        question = path.with_suffix(".txt")
        text = question.read_text(encoding="utf-8").strip() if question.is_file() else prompt
        parts = [{"type": "image", "image": path.name}, {"type": "text", "text": text}]
        row = Row([{"role": "user", "content": parts}], None, folder, f"in {folder.name}")
        rows.append(row)
    return rows


def _from_jsonl(path: Path) -> list[Row]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{path} cannot be read: {error}",
            hint="give a JSONL text file in UTF-8, or a folder of pictures",
        ) from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number} of {path.name}"
        try:
            item = json.loads(line)
        except ValueError as error:
            raise CalibrationError(
                f"{where} is not JSON: {error}", hint="one JSON object a line"
            ) from error
        rows.append(_row(item, where, path.parent))
    return rows


def _row(item: Any, where: str, base: Path | None) -> Row:
    """A conversation, or ``{"messages", "answer"}``; a last assistant message is the answer."""
    answer = None
    messages = item
    if isinstance(item, Row):
        return item
    if isinstance(item, Mapping):
        messages, answer = item.get("messages"), item.get("answer")
    try:
        _check(messages)
    except MqcError as error:
        raise CalibrationError(f"{where}: {error.message}", hint=error.hint) from error
    if answer is not None and not isinstance(answer, str):
        raise CalibrationError(f"{where}: the answer is not text", hint='use "answer": "..."')
    messages = [dict(message) for message in messages]
    if messages[-1]["role"] == "assistant":
        last = messages.pop()["content"]
        if not isinstance(last, str):
            last = "".join(part["text"] for part in last if part.get("type") == "text")
        answer = last if answer is None else answer
        if not messages:
            raise CalibrationError(f"{where}: there is an answer and no question")
    return Row(messages, answer, base, where)


def _check(messages: Any) -> None:
    """Check a conversation's form without opening its pictures."""
    if not isinstance(messages, (list, tuple)):
        raise UsageError(
            "it has no list of messages",
            hint='use {"messages": [{"role": "user", "content": [...]}], "answer": "..."}',
        )
    if not messages:
        raise UsageError("its list of messages is empty", hint="give at least one message")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise UsageError(
                "a message lacks 'role' or 'content'",
                hint='one row a line: {"messages": [{"role": "user", "content": ...}]}',
            )
        content = message["content"]
        if isinstance(content, str):
            continue
        if not isinstance(content, (list, tuple)):
            raise UsageError("a message's content is neither text nor a list")
        for part in content:
            if not _is_part(part):
                raise UsageError(
                    f"message part {part!r:.80} is not supported",
                    hint='use {"type": "text", "text": ...}, {"type": "image", "image": ...} or '
                    '{"type": "video", "video": ...}',
                )


def _is_part(part: Any) -> bool:
    if not isinstance(part, Mapping):
        return False
    if part.get("type") == "text":
        return isinstance(part.get("text"), str)
    if part.get("type") == "video":
        return video_source(part) is not None
    return part.get("type") == "image" and image_source(part) is not None
