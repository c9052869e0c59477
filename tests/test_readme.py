"""The README's commands have the options they use, and its example pass works."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mqc.cli import app
from mqc.config import make_recipe

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("#")[0].split()
    for kind, text in BLOCKS
    if kind == "sh"
    for line in text.splitlines()
    if line.startswith("mqc ")
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_use_options_that_exist(words: list[str]) -> None:
    result = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for word in words[2:]:
        if word.startswith("--"):
            assert word in result.stdout, f"mqc {words[1]} has no option {word}"


def test_the_recipe_is_valid(tmp_path: Path) -> None:
    (text,) = (text for kind, text in BLOCKS if kind == "yaml")
    path = tmp_path / "my.yaml"
    path.write_text(text)
    recipe = make_recipe(recipe=path)
    assert recipe.scheme.component("decoder").label == "W3g64A8"
    assert recipe.passes == ("tanh_gelu:TanhGelu",)


def test_the_example_pass_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = (text for _, text in BLOCKS if text.startswith("# tanh_gelu.py"))
    assert len(source.splitlines()) <= 40
    (tmp_path / "tanh_gelu.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    args = "opt tiny-internvl --passes canonicalize,tanh_gelu:TanhGelu --dump-after tanh-gelu"
    result = CliRunner().invoke(app, [*args.split(), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passes"][1]["counts"]["gelus"] > 0
    (dump,) = (tmp_path / "mqc-dump").iterdir()
    assert "approximate=tanh" in dump.read_text()
