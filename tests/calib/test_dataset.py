"""Data sets: every source, row hashes, and keeping evaluation apart from calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mqc.calib.dataset import (
    DEFAULT_PROMPT,
    load_dataset,
    normalise,
    refuse_overlap,
    row_hash,
)
from mqc.errors import CalibrationError, UsageError
from mqc.host import messages_from
from mqc.testing import vqa


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "photos"
    place.mkdir()
    picture(0).save(place / "b.png")
    picture(1).save(place / "a.PNG")
    (place / "b.txt").write_text("what is it ?\n")
    (place / "notes.md").write_text("not a picture")
    return place


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n")
    return path


def test_folder(folder: Path) -> None:
    data = load_dataset(folder)
    assert data.source == "photos" and len(data) == 2
    texts = [row.messages[0]["content"][1]["text"] for row in data]
    assert texts == [DEFAULT_PROMPT, "what is it ?"]
    images = [row.loaded()[0]["content"][0]["image"] for row in data]
    assert [image.tobytes() for image in images] == [picture(1).tobytes(), picture(0).tobytes()]
    asked = load_dataset(str(folder), prompt="colour ?", limit=1)
    assert asked[0].messages[0]["content"][1]["text"] == "colour ?" and len(asked) == 1


def test_jsonl(folder: Path) -> None:
    content = [{"type": "image", "image": "photos/b.png"}, {"type": "text", "text": "wh\u2028at"}]
    user = {"role": "user", "content": content}
    path = jsonl(
        folder.parent / "rows.jsonl",
        {"messages": [user], "answer": "red"},
        {"messages": [user, {"role": "assistant", "content": "blue"}]},
        [{"role": "user", "content": "text only"}],
    )
    data = load_dataset(path)
    assert [row.answer for row in data] == ["red", "blue", None]
    assert all(row.messages[-1]["role"] == "user" for row in data)
    assert data[0].sha256 == data[1].sha256 != data[2].sha256
    assert data[0].loaded()[0]["content"][0]["image"].size == (5, 6)
    assert data[2].loaded() == [{"role": "user", "content": "text only"}]


def test_sequences() -> None:
    chat = messages_from("what ?", [picture()])
    data = load_dataset([chat, {"messages": chat, "answer": "a"}])
    assert [row.answer for row in data] == [None, "a"]
    assert load_dataset(list(data))[1] is data[1]
    assert len(data[1:]) == 1 and data[1:].source == data.source


def test_generated() -> None:
    data = load_dataset("tiny-vqa:calibration:3")
    sample = vqa.sample("calibration", 2)
    assert len(data) == 3 and data[2].answer == sample.answer
    assert data[2].sha256 == row_hash(vqa.messages(sample))
    later = load_dataset("tiny-vqa:calibration:2:1")
    assert [row.sha256 for row in later] == [row.sha256 for row in data][1:]


def test_hash_is_of_what_the_model_sees(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "b.bmp")
    base = row_hash(messages_from("what  is\nit ?", [picture()]))
    assert base == row_hash(messages_from(" what is it ? ", [tmp_path / "b.bmp"]))
    assert base == row_hash(messages_from("what is it ?", ["a.png"]), tmp_path)
    others = [
        row_hash(messages_from("what is it", [picture()])),
        row_hash(messages_from("what is it ?", [picture(1)])),
        row_hash(messages_from("what is it ?")),
        row_hash([{**messages_from("what is it ?", [picture()])[0], "role": "system"}]),
        row_hash(messages_from("what is it ?", [picture(), picture()])),
    ]
    assert len({base, *others}) == 6
    tall = Image.frombytes("RGB", (1, 2), b"abcdef")
    wide = Image.frombytes("RGB", (2, 1), b"abcdef")
    assert row_hash(messages_from("", [tall])) != row_hash(messages_from("", [wide]))
    assert normalise("e\u0301 \t x") == "\u00e9 x"


def test_provenance_and_overlap(folder: Path) -> None:
    data = load_dataset(folder)
    record = data.provenance()
    assert record == json.loads(json.dumps(record))
    assert record["source"] == "photos" and record["rows"] == 2 == len(set(record["sha256"]))
    assert str(folder) not in json.dumps(record)
    generated = load_dataset("tiny-vqa:evaluation:4")
    refuse_overlap(generated, record)
    refuse_overlap(generated, None)
    mixed = [*generated, load_dataset([messages_from("what is it ?", [picture(0)])])[0]]
    with pytest.raises(CalibrationError, match=r"1 of 5 .*\(rows 4; .*'photos'") as caught:
        refuse_overlap(mixed, record)
    assert caught.value.hint is not None
    with pytest.raises(CalibrationError, match=r"4 of 4 .*rows 0, 1, 2, 3;"):
        refuse_overlap(generated, generated.provenance())


def test_splits_of_the_generated_set_do_not_meet() -> None:
    record = load_dataset("tiny-vqa:calibration:64").provenance()
    refuse_overlap(load_dataset("tiny-vqa:evaluation:64"), record)


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ("{", r"line 2 of rows\.jsonl is not JSON"),
        ("{}", "line 2 of .*no list of messages"),
        ("3", "no list of messages"),
        ('{"messages": []}', "empty"),
        ('{"messages": [{"role": "user"}]}', "lacks 'role' or 'content'"),
        ('{"messages": [{"role": "user", "content": 3}]}', "neither text nor a list"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "not supported"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', "not supported"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no question"),
        ('{"messages": [{"role": "user", "content": "a"}], "answer": 3}', "answer is not text"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: str, cause: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n' + row)
    with pytest.raises(CalibrationError, match=cause):
        load_dataset(path)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("nowhere", "'nowhere' does not exist"),
        ("tiny-vqa:calibration", "malformed"),
        ("tiny-vqa:calibration:many", "malformed"),
        ("tiny-vqa:test:3", "names no split"),
        ("tiny-vqa:calibration:0", "holds no rows"),
        ([], "holds no rows"),
    ],
)
def test_bad_sources(source: Any, cause: str) -> None:
    with pytest.raises(CalibrationError, match=cause):
        load_dataset(source)


def test_empty_places(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    for name in (".", "empty.jsonl"):
        with pytest.raises(CalibrationError, match="holds no rows"):
            load_dataset(tmp_path / name)
    with pytest.raises(CalibrationError, match="cannot be read"):
        load_dataset(tmp_path / "bytes.jsonl")


def test_missing_picture_is_named_when_read(tmp_path: Path) -> None:
    chat = messages_from("a", ["gone.png"])
    rows = {"messages": messages_from("a")}, {"messages": chat}
    data = load_dataset(jsonl(tmp_path / "rows.jsonl", *rows))
    for read in (data.provenance, data[1].loaded):
        with pytest.raises(UsageError, match=r"gone\.png") as info:
            read()
        assert info.value.__notes__ == ["line 2 of rows.jsonl"]
        assert str(tmp_path) in str(info.value.hint)


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", {"messages": messages_from("a")})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_dataset(path)) == 1
