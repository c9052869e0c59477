"""Open what can answer prompts: compiled artifacts, and checkpoints as they are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mqc.artifact import MANIFEST
from mqc.backends.registry import load_artifact
from mqc.capture import adapter_for, capture, checkpoint_folder, load_processor
from mqc.errors import UsageError
from mqc.host import ProgramEngine, Runnable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load(artifact: str | Path, **options: Any) -> Runnable:
    """Open an artifact: ``mqc.load(path).generate(prompt="...", images=["a.png"])``.

    Args:
        artifact: folder that :func:`mqc.compile` wrote; every file is compared with its hash.
        options: the target's. ``onnx``: ``provider`` ("cpu", "cuda"), ``threads``, ``profile``;
            ``cuda``: ``device`` ("cuda", "reference"), ``kv_cache`` ("float", "int8"), ``graphs``,
            ``capacity``; all: ``trust_remote_code=True`` runs the code that the checkpoint brought.

    Returns:
        A runnable: ``generate`` (text, tokens, times), ``stream`` (pieces of text),
        ``generate_batch``. Prompts are a text with ``images`` and ``videos`` (paths, PIL images,
        uint8 arrays [height, width, 3]), or chat messages.

    Raises:
        ArtifactError: the folder is missing, damaged or of another format version.
        TargetError: what the target needs is not here; the hint says what.
        UsageError: an option that the target does not have.
    """
    return load_artifact(artifact, **options)


def load_float(
    model: str | Path | PreTrainedModel,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Runnable:
    """A checkpoint as it is, in float32, with the interface of a compiled artifact."""
    folder = checkpoint_folder(str(model), revision)
    program = capture(model, revision=revision, trust_remote_code=trust_remote_code)
    processor = load_processor(folder, trust_remote_code)
    return Runnable(ProgramEngine(program), processor, adapter_for(folder, trust_remote_code))


def open_model(
    model: str | Path | Runnable, *, trust_remote_code: bool = False, **options: Any
) -> Runnable:
    """An artifact (``options`` are its target's), a checkpoint (in float32), or what is open."""
    if isinstance(model, Runnable):
        return model
    if (Path(model) / MANIFEST).is_file():
        if trust_remote_code:
            options["trust_remote_code"] = True
        return load_artifact(model, **options)
    if options:
        raise UsageError(
            f"{model} is a checkpoint: it has no option {next(iter(options))!r}",
            hint="give the artifact that mqc compile made of it",
        )
    return load_float(model, trust_remote_code=trust_remote_code)
