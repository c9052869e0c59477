"""From what a user names (folder, embedded model, hub id) to a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, PretrainedConfig

from mqc.errors import CheckpointError
from mqc.models import EMBEDDED, embedded_model_path

_WEIGHTS = "*.safetensors"
_PATTERNS = ["*.json", _WEIGHTS, "*.jinja", "*.txt", "*.model", "*.py"]


def checkpoint_folder(
    name: str | Path, revision: str | None = None, *, weights: bool = True
) -> Path:
    """The folder of checkpoint ``name``: an existing folder, an embedded model, or a hub id.

    A hub id is downloaded (safetensors, configuration, tokenizer and processor files only) into
    huggingface_hub's cache, and found there when offline; without ``weights``, all but the
    safetensors are. Raises :class:`CheckpointError`.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if str(name) in EMBEDDED:
        return embedded_model_path(str(name)).resolve()
    embedded = ", ".join(sorted(EMBEDDED))
    looks_local = path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1
    if looks_local or path.exists():
        what = "is a file, not a folder" if path.exists() else "does not exist"
        raise CheckpointError(
            f"checkpoint {str(name)!r} {what}",
            hint=f"give a folder, a hub id (owner/name), or an embedded model: {embedded}",
        )
    if "/" not in str(name):
        raise CheckpointError(
            f"{str(name)!r} is neither a folder nor an embedded model",
            hint=f"give a folder, a hub id (owner/name), or an embedded model: {embedded}",
        )
    try:
        patterns = [pattern for pattern in _PATTERNS if weights or pattern != _WEIGHTS]
        return Path(
            snapshot_download(str(name), revision=revision, allow_patterns=patterns)
        ).resolve()
    except HFValidationError as error:
        raise CheckpointError(
            f"{str(name)!r} is neither a folder nor a hub id: {error}",
            hint=f"give a folder, a hub id (owner/name), or an embedded model: {embedded}",
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{str(name)!r} is no folder here, and fetching it from the hub failed: {reason}",
            hint="check the name and the network (HF_TOKEN for gated models), or download it "
            f"elsewhere and give the folder; embedded models need no network: {embedded}",
        ) from error


def load_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration in ``folder``. Raises :class:`CheckpointError`."""
    if not (folder / "config.json").is_file():
        artifact = (folder / "manifest.json").is_file()
        raise CheckpointError(
            f"{folder} is a compiled artifact, not a checkpoint"
            if artifact
            else f"{folder} has no config.json",
            hint="give the model that it was compiled from"
            if artifact
            else "give a folder in the Hugging Face layout",
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        if not trust_remote_code and _brings_code(folder):
            raise CheckpointError(
                f"the checkpoint {folder} brings its own code, which mqc does not run unasked",
                hint="read its .py files, then allow them with trust_remote_code "
                "(--trust-remote-code)",
            ) from error
        # A validator of transformers says in its second line what is wrong.
        lines = [line.strip() for line in str(error).split("\n") if line.strip()]
        reason = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
        raise CheckpointError(
            f"config.json in {folder} cannot be read: {reason or type(error).__name__}",
            hint="the file is damaged, or its model type is unknown to the installed transformers",
        ) from error
    return config


def _brings_code(folder: Path) -> bool:
    """Whether config.json names classes in files of the checkpoint."""
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and bool(data.get("auto_map"))
