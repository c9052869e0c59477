"""Artifacts: what is written, and that nothing half-written ever stands under its name."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mqc.artifact import (
    FORMAT_VERSION,
    ArtifactWriter,
    check_files,
    folder_size,
    format_size,
    read_manifest,
)
from mqc.errors import ArtifactError
from mqc.models import embedded_model_path


def write(path: Path, text: str = "weights", name: str = "graphs/a.bin") -> None:
    with ArtifactWriter(path) as writer:
        writer.path(name).write_text(text)
        writer.describe(target="reference", scheme={"name": "w4a8"}, facts={"b": 1, "a": 2})


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def fail(path: Path, error: BaseException) -> None:
    with ArtifactWriter(path) as writer:
        writer.path("half.bin").write_text("half")
        raise error


def test_write_read_check(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model"
    write(path)
    manifest = check_files(path)
    assert manifest == read_manifest(path)
    assert manifest["format"] == FORMAT_VERSION and manifest["target"] == "reference"
    assert manifest["facts"] == {"a": 2, "b": 1} and manifest["calibration"] is None
    assert list(manifest["files"]) == ["graphs/a.bin"]
    assert manifest["files"]["graphs/a.bin"]["size"] == 7 == folder_size(path)
    assert hidden(path.parent) == []
    probe = tmp_path / "probe"
    probe.mkdir()
    assert path.stat().st_mode == probe.stat().st_mode


def test_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name)
    one, two = (tmp_path / name / "manifest.json" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert str(tmp_path) not in one.read_text()


def test_model_files(tmp_path: Path) -> None:
    source = embedded_model_path("tiny-qwen2-vl")
    with ArtifactWriter(tmp_path / "a") as writer:
        names = writer.copy_model_files(source)
        writer.describe(target="reference")
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= set(names)
    assert not [name for name in names if name.endswith(".safetensors")]
    assert (tmp_path / "a/model/config.json").read_bytes() == (source / "config.json").read_bytes()
    with (
        pytest.raises(ArtifactError, match=r"no config\.json"),
        ArtifactWriter(tmp_path / "b") as writer,
    ):
        writer.copy_model_files(tmp_path)
    assert not (tmp_path / "b").exists()


def test_overwriting_replaces_everything(tmp_path: Path) -> None:
    write(tmp_path / "a", name="old.bin")
    write(tmp_path / "a", name="new.bin")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["manifest.json", "new.bin"]
    assert hidden(tmp_path) == []


def test_foreign_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder")  # empty: fine
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("cat")
    (tmp_path / "file").write_text("text")
    for name in ("photos", "file"):
        with pytest.raises(ArtifactError, match="not overwritten"):
            write(tmp_path / name)
    assert (tmp_path / "photos" / "cat.png").read_text() == "cat"
    with pytest.raises(ArtifactError, match="cannot be written"):
        write(tmp_path / "file" / "below")


def test_a_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "more weights")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/graphs/a.bin").read_text() == "more weights"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_artifact(tmp_path: Path, error: type[BaseException]) -> None:
    write(tmp_path / "a")
    with pytest.raises(error):
        fail(tmp_path / "a", error())
    assert hidden(tmp_path) == []
    assert list(check_files(tmp_path / "a")["files"]) == ["graphs/a.bin"]


@pytest.mark.parametrize("name", ["/etc/a", "../a", "a/../../b", ""])
def test_names_stay_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="not a file name"), ArtifactWriter(tmp_path / "a") as w:
        w.path(name)


def test_misuse(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not described"), ArtifactWriter(tmp_path / "a"):
        pass
    with pytest.raises(ArtifactError, match="not open"):
        ArtifactWriter(tmp_path / "a").path("b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda a: (a / "graphs/a.bin").unlink(), r"graphs/a\.bin .* is missing"),
        (lambda a: (a / "graphs/a.bin").write_text("short"), "has 5 bytes instead of 7"),
        (lambda a: (a / "graphs/a.bin").write_text("weighty"), "has changed"),
        (lambda a: (a / "manifest.json").write_text("{"), "damaged"),
        (lambda a: (a / "manifest.json").write_text("[]"), "damaged"),
        (lambda a: (a / "manifest.json").write_text('{"format": 1, "files": []}'), "damaged"),
        (lambda a: (a / "manifest.json").unlink(), "not an artifact"),
        (lambda a: a.rename(a.parent / "b"), "does not exist"),
        (
            lambda a: (a / "manifest.json").write_text(
                json.dumps({**json.loads((a / "manifest.json").read_text()), "format": 99})
            ),
            "format 99",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, change: Callable[[Path], object], cause: str) -> None:
    write(tmp_path / "a")
    change(tmp_path / "a")
    with pytest.raises(ArtifactError, match=cause):
        check_files(tmp_path / "a")


WRITER = """
import sys, time
from mqc.artifact import ArtifactWriter
with ArtifactWriter(sys.argv[1]) as writer:
    writer.path("half.bin").write_bytes(b"x" * 100000)
    print("writing", flush=True)
    time.sleep(60)
"""


def writing(path: Path) -> subprocess.Popen[str]:
    """A process that is in the middle of writing ``path``."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=path.parent,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_a_killed_writer_is_cleaned_up_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "model[1]*"
    write(path)
    process = writing(path)
    process.kill()
    process.wait()
    assert len(hidden(tmp_path)) == 1
    assert check_files(path)["target"] == "reference"
    write(path, "more")
    assert hidden(tmp_path) == []
    assert (path / "graphs/a.bin").read_text() == "more"


def test_folders_of_like_names_are_left_alone(tmp_path: Path) -> None:
    for name in (".model.mqc-notes", ".model.mqc-0123456789ab.tmp.mqc-0123456789ab.tmp"):
        (tmp_path / name).mkdir()
    write(tmp_path / "model")
    assert len(hidden(tmp_path)) == 2


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    process = writing(tmp_path / "model")
    process.send_signal(signal.SIGINT)
    process.wait()
    assert list(tmp_path.iterdir()) == []


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    process = writing(tmp_path / "model")
    try:
        write(tmp_path / "model")
        assert len(hidden(tmp_path)) == 1
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
    assert hidden(tmp_path) == []
    check_files(tmp_path / "model")


def test_kill_between_the_two_renames(tmp_path: Path) -> None:
    """What such a kill leaves: the old artifact aside, the new one complete, none in place."""
    path = tmp_path / "model"
    write(path, "old")
    path.rename(tmp_path / ".model.mqc-0123456789ab.old")
    write(tmp_path / "other", "new")
    (tmp_path / "other").rename(tmp_path / ".model.mqc-0123456789ab.tmp")
    with pytest.raises(ArtifactError, match=r"killed while replacing.*\.old"):
        read_manifest(path)
    with pytest.raises(ValueError), ArtifactWriter(path):
        raise ValueError
    assert (path / "graphs/a.bin").read_text() == "old" and hidden(tmp_path) == []


def test_full_disk_in_mid_write(tmp_path: Path) -> None:
    """A file size limit stands for the full disk: the write fails part of the way through."""
    code = (
        "import resource, signal, sys\n"
        "from mqc.artifact import ArtifactWriter\n"
        "from mqc.errors import ArtifactError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))\n"
        "try:\n"
        "    with ArtifactWriter(sys.argv[1]) as writer:\n"
        "        writer.path('weights.bin').write_bytes(b'x' * 80000)\n"
        "except ArtifactError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert "no space for artifact" in result.stdout and "were free" in result.stdout
    assert "more than 50.0 kB" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: IoError(No space left on device (os error 28))"),
    ],
)
def test_full_disk_of_any_library(tmp_path: Path, error: Exception) -> None:
    write(tmp_path / "a")
    with pytest.raises(ArtifactError, match="it needs more than 4 B, and .* free") as caught:
        fail(tmp_path / "a", error)
    assert caught.value.hint is not None and hidden(tmp_path) == []
    check_files(tmp_path / "a")


def test_space_is_asked_for_first(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match="it needs 9000000000.0 TB"),
        ArtifactWriter(tmp_path / "a") as writer,
    ):
        writer.require_space(9 * 10**21)
    assert list(tmp_path.iterdir()) == []


def mount(folder: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_really_full_disk(tmp_path: Path) -> None:
    if not mount(tmp_path):
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises(ArtifactError, match="no space for artifact"):
            write(tmp_path / "a", "x" * 400_000)
        assert list(tmp_path.iterdir()) == []
        write(tmp_path / "a")
        check_files(tmp_path / "a")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ArtifactError, match="cannot be written: Permission denied"):
        write(tmp_path / "a")


def test_format_size() -> None:
    assert [format_size(n) for n in (0, 999, 2500, 3_000_000)] == [
        "0 B",
        "999 B",
        "2.5 kB",
        "3.0 MB",
    ]
    assert format_size(4 * 10**9) == "4.0 GB" and format_size(5 * 10**12) == "5.0 TB"
