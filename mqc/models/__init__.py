"""Small vision-language models shipped with the package, trained on :mod:`mqc.testing.vqa`."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

EMBEDDED: dict[str, str] = {
    "tiny-qwen2-vl": "tiny-qwen2-vl",
    "tiny-llava": "tiny-llava",
    "tiny-internvl": "tiny-internvl",
}
"""Folder of each embedded model under this package, by the model's name."""


def embedded_model_path(name: str) -> Path:
    """Folder of an embedded model, in the Hugging Face layout; KeyError for an unknown name."""
    if name not in EMBEDDED:
        raise KeyError(f"no embedded model {name!r}; there are: {', '.join(sorted(EMBEDDED))}")
    return Path(str(files(__name__))) / EMBEDDED[name]
