"""Which passes a scheme asks for, custom passes, and their place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mqc.config import make_recipe
from mqc.errors import UsageError
from mqc.pipeline import default_passes, known_passes, load_pass_class, make_passes, pass_names
from mqc.spec import named_scheme

FULL = [
    "canonicalize",
    "fuse-norm",
    "hadamard-fuse",
    "hadamard-online",
    "rms-suppress",
    "modality-split",
    "quantize-weights",
    "static-scales",
    "aifs-reorder",
    "expert-slices",
    "cleanup",
]

CUSTOM = '''
from mqc.transform import Pass, PassContext, PassResult

class Early(Pass):
    """Runs on the canonical graph."""
    name = "early"
    def run(self, program, ctx):
        return PassResult(program)

class Late(Early):
    """Runs behind the quantizer."""
    name = "late"
    after = ("fuse-norm", "quantize-weights")

class Seeded(Early):
    """Takes the scheme's seed."""
    name = "seeded"
    @classmethod
    def from_scheme(cls, scheme):
        item = cls()
        item.seed = scheme.seed
        return item

NotAPass = 3
'''


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_custom_passes.py").write_text(CUSTOM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_custom_passes", raising=False)
    return "my_custom_passes"


def test_full_pipeline() -> None:
    assert pass_names(named_scheme("w4a8")) == FULL
    assert list(known_passes())[: len(FULL)] == FULL


@pytest.mark.parametrize(
    ("override", "missing"),
    [
        ("rotate=false", {"fuse-norm", "hadamard-fuse"}),
        ("online_hadamard=false", {"hadamard-online"}),
        ("rms_suppress=false", {"rms-suppress"}),
        ("aifs=false", {"aifs-reorder", "expert-slices"}),
    ],
)
def test_each_step_is_left_out_where_not_asked_for(override: str, missing: set[str]) -> None:
    scheme = make_recipe(overrides=[override]).scheme
    assert pass_names(scheme) == [name for name in FULL if name not in missing]


def test_other_schemes() -> None:
    plain = ["canonicalize", "quantize-weights", "static-scales", "cleanup"]
    assert pass_names(make_recipe(recipe="rtn-static").scheme) == plain
    assert pass_names(named_scheme("w4a16")) == ["canonicalize", "quantize-weights", "cleanup"]
    assert pass_names(named_scheme("float")) == ["canonicalize", "cleanup"]


def test_unknown_pass_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown pass 'fuse-norms'") as caught:
        make_passes(["fuse-norms"], named_scheme("w4a8"))
    assert caught.value.hint == "did you mean 'fuse-norm'?"


def test_custom_passes_take_their_place(custom: str) -> None:
    scheme = named_scheme("w4a8").replace(seed=5)
    passes = default_passes(scheme, [f"{custom}:{name}" for name in ("Early", "Late", "Seeded")])
    names = [item.name for item in passes]
    assert names[:4] == ["canonicalize", "early", "seeded", "fuse-norm"]
    assert names[names.index("quantize-weights") + 1] == "late"
    assert passes[2].seed == 5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("path", "message", "hint"),
    [
        ("nothing", "not of the form module:Class", "my_pkg.my_mod:MyPass"),
        ("no_such_module_here:X", "cannot be imported", "install its package"),
        ("my_custom_passes:NotAPass", "is not a pass class", "known: Early"),
        ("my_custom_passes:Earl", "is not a pass class", "did you mean 'Early'?"),
        ("json:Decoder", "is not a pass class", "derive it from mqc.Pass"),
    ],
)
def test_wrong_custom_passes(custom: str, path: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_pass_class(path)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_search_path_is_left_as_it_was(custom: str) -> None:
    before = list(sys.path)
    load_pass_class(f"{custom}:Early")
    assert sys.path == before
