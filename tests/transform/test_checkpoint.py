"""A pass list that is stopped anywhere goes on where it was, and ends with the same bytes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from programs import tiny_program

from mqc.config import make_recipe
from mqc.ir import NamedScratch, Program, Scratch, save_program
from mqc.ir.edit import aten, set_param
from mqc.passes import quantize_weights
from mqc.pipeline import make_passes
from mqc.transform import Pass, PassContext, PassManager, PassResult, checkpoint, record
from mqc.transform.checkpoint import Checkpoints

NAMES = "canonicalize fuse-norm hadamard-fuse hadamard-online quantize-weights cleanup".split()
SCHEME = make_recipe("w4a16", overrides=["weights.method=rtn", "vision.weights.bits=8"]).scheme


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep everything at once, and in files whatever has 256 bytes."""
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "SHARE", 0)


class Run:
    """One process's try; its messages, and where it went on."""

    def __init__(self, folder: Path, digest: str = "k") -> None:
        self.program = tiny_program(64)
        self.program.params.scratch = NamedScratch(folder, smallest=256)
        self.told: list[str] = []
        self.checkpoints = Checkpoints(folder, self.program, digest, self.told.append)
        self.state = self.checkpoints.restore()
        self.resumed = self.checkpoints.kept(NAMES, self.state)
        self.manager = PassManager(make_passes(NAMES, SCHEME), checkpoints=self.checkpoints)

    def run(self, stop: str = "", after: int = 0) -> Program:
        """``stop``: a pass, or what it says it does; the run ends after so many such reports."""
        seen = 0

        def progress(what: str, done: int, total: int) -> None:
            nonlocal seen
            seen += what == stop
            if what == stop and seen > after:
                raise Killed

        context = PassContext(SCHEME, seed=3, progress=progress)
        return self.manager.run(self.program, context, self.state)


def content(program: Program, folder: Path) -> dict[str, bytes]:
    """The program's files; they have the history with every detail."""
    folder.mkdir()
    save_program(program, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("expected")
    program = PassManager(make_passes(NAMES, SCHEME)).run(
        tiny_program(64), PassContext(SCHEME, seed=3)
    )
    return content(program, folder / "saved")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "a.partial"
    path.mkdir()
    return path


def killed(folder: Path, stop: str, after: int = 0) -> Run:
    run = Run(folder)
    with pytest.raises(Killed):
        run.run(stop, after)
    return run


def test_goes_on_behind_every_pass(
    folder: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    for index, name in enumerate(NAMES):
        run = killed(folder, name)
        done = max(index - 1, 0)
        assert [r.name for r in run.manager.records[:done]] == NAMES[:done]
        assert (run.resumed or "").startswith(f"after {NAMES[done - 1]} (" if done else "")
    last = Run(folder)
    assert last.resumed == f"after {NAMES[-2]} (5 of 6 passes)"
    assert content(last.run(), tmp_path / "saved") == expected
    assert not last.told
    whole = Run(folder)
    assert whole.resumed == "after cleanup (6 of 6 passes)"
    assert content(whole.run(), tmp_path / "again") == expected
    assert [record.name for record in whole.manager.records] == NAMES


def test_loses_one_layer_of_a_pass(
    folder: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = quantize_weights.quantize_rtn
    monkeypatch.setattr(
        quantize_weights, "quantize_rtn", lambda *a, **k: calls.append(1) or real(*a, **k)
    )
    killed(folder, "quantize decoder", after=2)
    assert len(calls) == 3  # one of vision, two of the decoder
    assert Run(folder).resumed == (
        "after hadamard-online (4 of 6 passes), with 3 layers of quantize-weights"
    )
    killed(folder, "quantize decoder", after=3)
    assert len(calls) == 4
    last = Run(folder)
    assert content(last.run(), tmp_path / "saved") == expected
    assert len(calls) == 5
    assert not list(folder.glob("parts-*")), "a checkpoint behind the pass replaces its parts"


def test_only_the_last_state_is_kept(folder: Path) -> None:
    run = killed(folder, "quantize-weights")
    large = [p for p in run.program.params if run.program.params[p].nbytes >= 256]
    del run
    Run(folder)  # a new process removes what no checkpoint needs
    files = sorted(path.name for path in folder.iterdir())
    scratch = [name for name in files if name.endswith(".scratch")]
    assert [name for name in files if name not in scratch] == ["checkpoint"]
    assert 0 < len(scratch) <= len(large)


@pytest.mark.parametrize("victim", ["checkpoint", "*.scratch", "parts-*"])
@pytest.mark.parametrize("how", ["flip", "cut", "empty"])
def test_damage_is_found_and_ignored(
    folder: Path, tmp_path: Path, expected: dict[str, bytes], victim: str, how: str
) -> None:
    killed(folder, "quantize decoder", after=2)
    Run(folder)
    path = sorted(folder.glob(victim))[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"flip": data, "cut": data[:-8], "empty": b""}[how])
    run = Run(folder)
    assert len(run.told) == 1 and "is ignored: " in run.told[0]
    assert content(run.run(), tmp_path / "saved") == expected
    assert not Run(folder).told


def test_another_compile_is_not_continued(folder: Path) -> None:
    killed(folder, "quantize decoder", after=2)
    run = Run(folder, "another")
    assert run.resumed is None and run.told and not list(folder.glob("*.scratch"))


def test_a_draft_left_by_a_kill_is_no_checkpoint(
    folder: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    killed(folder, "hadamard-fuse")
    (folder / "checkpoint.tmp").write_bytes(b"half")
    run = Run(folder)
    assert run.resumed == "after fuse-norm (2 of 6 passes)" and not run.told
    assert content(run.run(), tmp_path / "saved") == expected


def test_no_space_for_a_checkpoint_costs_no_compile(
    folder: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record.os, "fsync", full)
    run = Run(folder)
    assert content(run.run(), tmp_path / "saved") == expected
    assert len(run.told) == 2 and "cannot be kept" in run.told[0]
    assert not list(folder.glob("*.tmp")) and Run(folder).resumed is None


def test_a_checkpoint_makes_room_for_the_compile(
    folder: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full while the last checkpoint alone holds weights that nobody needs."""
    run = Run(folder)
    real, full = os.posix_fallocate, []

    def allocate(handle: int, at: int, size: int) -> None:
        if not full and run.checkpoints.scratch.idle():
            full.append(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle, at, size)

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    monkeypatch.setattr(checkpoint, "SECONDS", 1e9)
    saved: list[int] = []

    def passed(self: Checkpoints, state: object, *, last: bool = False) -> None:
        if not saved:
            saved.append(1)
            self._save(state)  # type: ignore[arg-type]

    monkeypatch.setattr(Checkpoints, "passed", passed)
    monkeypatch.setattr(Checkpoints, "finish", lambda *_: None)
    assert content(run.run(), tmp_path / "saved") == expected
    assert full and "is given up" in run.told[0]
    assert not (folder / "checkpoint").exists()


def test_where_nothing_is_gained_a_full_disk_is_an_error_and_loses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(folder, "hadamard-online")
    run = Run(folder)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        run.run()
    del run
    assert Run(folder).resumed == "after hadamard-fuse (3 of 6 passes)"


def test_short_work_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 10.0)
    run = Run(folder)
    program = run.run()
    kept = {path.name for path in folder.iterdir()}
    own = run.program.params.scratch.file_of  # type: ignore[union-attr]
    assert kept <= {
        own(value) for value in [*program.params.values(), *run.program.params.values()]
    }


def test_files_live_as_long_as_their_tensors(tmp_path: Path) -> None:
    scratch = NamedScratch(tmp_path, smallest=1)
    first, passing = torch.arange(12.0), scratch.keep(torch.ones(3))
    assert scratch.file_of(passing) is None and not list(tmp_path.iterdir())
    kept = scratch.keep(first, lasting=True)
    name = scratch.file_of(kept)
    assert name is not None and scratch.keep(kept, lasting=True) is kept
    view = kept[2:4]
    assert scratch.file_of(view) is None
    del kept
    assert (tmp_path / name).exists() and view.sum() == 5
    scratch.pin([name])
    del view
    assert scratch.idle() == 48
    again = NamedScratch(tmp_path).open(name, torch.float32, [3, 4])
    assert torch.equal(again, first.view(3, 4))
    scratch.pin([])
    assert not list(tmp_path.iterdir())
    assert Scratch(tmp_path, smallest=1).keep(first, lasting=True).sum() == 66
    assert not list(tmp_path.iterdir())


def test_a_custom_pass_that_overwrites_a_weight_is_kept_too(tmp_path: Path) -> None:
    """Names alone do not tell that a parameter is as it was captured."""

    class Overwrites(Pass):
        """Breaks the convention that stored tensors do not change."""

        name = "overwrites"

        def run(self, program: Program, ctx: PassContext) -> PassResult:
            program.params["head.weight"] = program.params["head.weight"] * 2
            head = program.components["decoder"].output_value("logits")
            set_param(program, head, 2, torch.ones(11))
            assert head.target == aten.linear.default
            return PassResult(program)

    def once() -> tuple[Program, Checkpoints]:
        program = tiny_program()
        program.params.scratch = NamedScratch(tmp_path)
        return program, Checkpoints(tmp_path, program, "k", pytest.fail)

    program, keeper = once()
    result = PassManager([Overwrites()], checkpoints=keeper).run(program, PassContext())
    again, keeper = once()
    state = keeper.restore()
    assert state is not None
    assert torch.equal(state.program.params["head.weight"], result.params["head.weight"])
    assert torch.equal(state.program.params["embed.weight"], again.params["embed.weight"])


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_checkpoint as t
t.checkpoint.SECONDS = t.checkpoint.SHARE = 0
base = Path(sys.argv[2])
folder = base / "a.partial"
folder.mkdir()

def once(where, saved):
    run = t.Run(where)
    (base / "log").open("a").write(f"{run.resumed}|{run.told}\\n")
    t.content(run.run(), base / saved)

def fork(*args):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            once(*args)
            code = 0
        finally:
            os._exit(code)
    return child

(base / "b").mkdir()
start = time.perf_counter()
assert os.waitpid(fork(base / "b", "whole"), 0)[1] == 0
length = time.perf_counter() - start
draw = random.Random(0)
for kill in range(20):
    child = fork(folder, f"killed{kill}")
    time.sleep(draw.random() * length * 0.7)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
assert os.waitpid(fork(folder, "end"), 0)[1] == 0
"""


def test_real_kills(tmp_path: Path, expected: dict[str, bytes]) -> None:
    """SIGKILL at 20 random points, in the middle of checkpoints too."""
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLS, str(here), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    log = (tmp_path / "log").read_text().splitlines()
    assert all(line.endswith("|[]") for line in log), "no kill leaves a damaged checkpoint"
    assert any(line.startswith("after ") for line in log)
    for name in ("whole", "end"):
        assert {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} == expected
