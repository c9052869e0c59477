"""The README and the pages of docs/: commands, links and examples are what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mqc.cli import app
from mqc.config import make_recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.relative_to(ROOT): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = sorted(
    {
        tuple(line.split("#")[0].split())
        for page in PAGES.values()
        for kind, text in re.findall(r"```(\w+)\n(.*?)```", page, flags=re.DOTALL)
        if kind == "sh"
        for line in text.splitlines()
        if line.startswith("mqc ")
    }
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_use_options_that_exist(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for word in words[2:]:
        if word.startswith("--"):
            assert word in result.stdout, f"mqc {words[1]} has no option {word}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    """Files in the tree, and headings of pages; addresses on the network are left alone."""
    for link in LINK.findall(PAGES[page]):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = (ROOT / page.parent / name).resolve() if name else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        if heading:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {
                re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings
            }
            assert heading in anchors, f"{page} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_tools_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"python (tools/\w+\.py)", PAGES[page]))
    named |= {f"{n.replace('.', '/')}" for n in re.findall(r"python -m (tools\.\w+)", PAGES[page])}
    assert all((ROOT / name).exists() for name in named), named


def test_rows_are_one_a_line() -> None:
    """What is shown as a row of JSONL can be copied into a file."""
    (text,) = (text for kind, text in BLOCKS if kind == "json")
    assert [json.loads(line).keys() >= {"messages"} for line in text.splitlines()] == [True]


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
