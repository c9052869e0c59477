"""Make ``.lint/mqc``: the installed package layout, as links to the source folders.

``pyproject.toml`` maps ``mqc.passes`` to ``passes/`` and so on. Type checkers and editors do not
read that mapping; they see the same modules through this git-ignored tree. Running it again
updates the links.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def mapped_rooms(root: Path) -> dict[str, str]:
    """Name below ``mqc`` to folder, e.g. ``{"passes": "passes"}``, from pyproject.toml."""
    config = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    mapping: dict[str, str] = config["tool"]["setuptools"]["package-dir"]
    return {
        package.removeprefix("mqc."): folder
        for package, folder in mapping.items()
        if package.startswith("mqc.")
    }


def wanted_links(root: Path) -> dict[str, Path]:
    """Every entry of ``.lint/mqc`` and the source that it stands for."""
    links = {
        entry.name: entry
        for entry in sorted((root / "mqc").iterdir())
        if entry.name != "__pycache__" and not entry.name.startswith(".")
    }
    links.update({name: root / folder for name, folder in mapped_rooms(root).items()})
    return links


def make_tree(root: Path = ROOT) -> Path:
    """Create or update the tree; return its folder."""
    tree = root / ".lint" / "mqc"
    tree.mkdir(parents=True, exist_ok=True)
    wanted = wanted_links(root)
    for entry in tree.iterdir():
        if entry.is_symlink() and (entry.name not in wanted or not entry.exists()):
            entry.unlink()
    for name, source in wanted.items():
        link = tree / name
        if not link.is_symlink():
            link.symlink_to(Path("..", "..", source.relative_to(root)))
    return tree


if __name__ == "__main__":
    make_tree()
    sys.exit(0)
