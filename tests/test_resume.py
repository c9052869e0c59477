"""Whole compiles that are killed for real, and the working folder's rules."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mqc.errors import ArtifactError, UsageError
from mqc.partial import Partial, asked_key
from mqc.pipeline import make_passes
from mqc.spec import named_scheme
from mqc.transform.checkpoint import CHECKPOINT

COMPILES = """
import os, signal, sys
from pathlib import Path
from mqc import compiler
from mqc.ir import scratch
from mqc.progress import Silent
from mqc.transform import checkpoint

checkpoint.SECONDS = checkpoint.SHARE = 0
scratch.SMALLEST = 65536
os.fsync = lambda handle: None  # what a kill leaves is in the system's memory: seconds saved
captured = compiler.capture("tiny-internvl")
compiler.capture = lambda *args, **options: captured.copy()
base = Path(sys.argv[1])

class Watch(Silent):
    def __init__(self, at, count, number):
        self.at, self.count, self.number = at, count, number
    def stage(self, name, index, count):
        self.met(name)
    def step(self, what, done, total):
        self.met(what)
    def met(self, what):
        self.count -= what == self.at
        if self.count < 0:
            os.kill(os.getpid(), self.number)
    def note(self, text):
        print(text, flush=True)

def run(out, at="", count=0, number=None):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            compiler.compile(
                "tiny-internvl", target="reference", samples=2, out=base / out,
                reporter=Watch(at, count, number),
            )
        except KeyboardInterrupt as error:
            print("interrupted:", *error.__notes__, flush=True)
        finally:
            sys.stdout.flush()
            os._exit(0)
    os.waitpid(child, 0)

run("whole")
for kill in (
    ("quantize decoder", 60, signal.SIGTERM),
    ("emit", 0, signal.SIGINT),
):
    run("killed", *kill)
    print(*sorted(path.name for path in base.iterdir() if path.name[0] != "."), flush=True)
run("killed")
"""


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_killed_compile_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """By SIGTERM inside GPTQ, by Ctrl-C before the emission; SIGKILL: test_checkpoint.py."""
    result = subprocess.run(
        [sys.executable, "-c", COMPILES, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    told = [line for line in lines if line.startswith("continues ")]
    layers = r" \(6 of 11 passes\), with \d\d layers of quantize-weights; --fresh starts over"
    assert re.fullmatch(f"continues after modality-split{layers}", told[0])
    assert "continues after cleanup (11 of 11 passes);" in told[1] and len(told) == 2
    (interrupt,) = (line for line in lines if line.startswith("interrupted:"))
    assert "killed.partial" in interrupt and "the same command goes on" in interrupt
    assert lines.count("killed.partial whole") == 2, "nothing stands under the artifact's name"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def fail(out: Path, name: str, key: dict[str, object]) -> None:
    """A compile that fails when it has written file ``name``."""
    with Partial(out) as partial:
        partial.keep_key(key)
        (partial.folder / name).write_bytes(b"x" * 100)
        raise ValueError("boom")


def work(out: Path, key: dict[str, object]) -> None:
    """Leave what a killed compile leaves."""
    with pytest.raises(ValueError) as caught:
        fail(out, CHECKPOINT, key)
    (note,) = caught.value.__notes__
    assert f"{out}.partial" in note


def test_the_folder_goes_with_success_or_without_work(tmp_path: Path) -> None:
    with Partial(tmp_path / "a") as partial:
        (partial.folder / CHECKPOINT).write_bytes(b"x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError) as caught:
        fail(tmp_path / "a", "tmpabc.scratch", {"a": 1})
    assert not list(tmp_path.iterdir()) and not hasattr(caught.value, "__notes__")


def test_a_failure_leaves_only_what_is_needed(tmp_path: Path) -> None:
    weights = []

    def failing(swept: bool) -> list[str]:
        with Partial(tmp_path / "a") as partial:
            if swept:
                partial.scratch.sweep()
            partial.scratch.smallest = 1
            weights.append(partial.scratch.keep(torch.ones(3), lasting=True))
            (partial.folder / CHECKPOINT).write_bytes(b"x")
            raise ValueError

    with pytest.raises(ValueError):
        failing(swept=False)
    assert len(list((tmp_path / "a.partial").iterdir())) == 2, "it may belong to the checkpoint"
    with pytest.raises(ValueError):
        failing(swept=True)
    assert [path.name for path in (tmp_path / "a.partial").iterdir()] == [CHECKPOINT]
    assert weights[1].sum() == 3


def test_a_folder_of_someone_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "thesis.tex").write_text("mine")
    for _ in range(2):
        with pytest.raises(ArtifactError, match=r"holds 'thesis.tex', which mqc did not make"):
            Partial(tmp_path / "a", fresh=True).__enter__()
    assert (tmp_path / "a.partial" / "thesis.tex").read_text() == "mine"


def test_one_compile_at_a_time(tmp_path: Path) -> None:
    with (
        Partial(tmp_path / "a"),
        pytest.raises(ArtifactError, match="another compile is writing"),
        Partial(tmp_path / "a"),
    ):
        raise AssertionError("two compiles into one folder")
    with Partial(tmp_path / "a"), Partial(tmp_path / "b"):
        pass


def test_other_input_is_named(tmp_path: Path) -> None:
    def key(name: str, bits: int = 8) -> dict[str, object]:
        scheme = named_scheme(name)
        return asked_key(scheme, make_passes(["canonicalize"], scheme), {"limit": bits})

    work(tmp_path / "a", {**key("w4a8"), "calibration": {"rows": 3, "sha256": "0" * 64}})
    with Partial(tmp_path / "a") as partial:
        partial.require(key("w4a8"))
        with pytest.raises(UsageError, match=r"options\.limit is 4, was 8\n") as caught:
            partial.require(key("w4a8", 4))
        assert "--fresh" in str(caught.value.hint)
        with pytest.raises(UsageError, match=r"decoder\.weights\.bits is 8, was 4; scheme\.name"):
            partial.require(key("w8a8"))
        with pytest.raises(UsageError, match=r"scheme.*and \d+ more\n"):
            partial.require(key("float"))
        with pytest.raises(UsageError, match=r"calibration\.sha256 has changed\n"):
            partial.require({**key("w4a8"), "calibration": {"rows": 3, "sha256": "1" * 64}})


def test_a_refused_compile_removes_nothing(tmp_path: Path) -> None:
    work(tmp_path / "a", {"a": 1})
    with pytest.raises(UsageError) as caught, Partial(tmp_path / "a") as partial:
        partial.require({"a": 2})
    assert not hasattr(caught.value, "__notes__")
    with Partial(tmp_path / "a", fresh=True) as partial:
        partial.require({"a": 2})
        assert not list(partial.folder.iterdir())


def test_work_without_its_key_is_not_trusted(tmp_path: Path) -> None:
    work(tmp_path / "a", {"a": 1})
    (tmp_path / "a.partial" / "key.json").write_text("{")
    with Partial(tmp_path / "a") as partial:
        partial.require({"a": 1})
        assert not list(partial.folder.iterdir())


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_text("mine")
    with pytest.raises(ArtifactError, match=r"a\.partial cannot be used: File exists"):
        Partial(tmp_path / "a").__enter__()
    assert (tmp_path / "a.partial").read_text() == "mine"
