"""The tokenizer, image and video processor of a checkpoint, loaded without torchvision.

Families with a video part cannot be loaded by ``AutoProcessor`` where torchvision is missing.
:func:`load_processor` makes the family's own class with a video part that needs none
(:mod:`mqc.capture.videos`) or, for a family whose videos mqc does not know, without one: images and
text work as ever, a video prompt is refused.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    PROCESSOR_MAPPING,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)
from transformers.utils import is_torchvision_available

from mqc.capture.adapters import adapter_for
from mqc.capture.locate import load_config
from mqc.capture.videos import load_reader
from mqc.errors import CheckpointError, UsageError

logger = logging.getLogger(__name__)

Message = Mapping[str, Any]
"""One chat message in the form that transformers' chat templates take."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*",
    "preprocessor_config.json",
    "processor_config.json",
    "*.py",  # of a checkpoint that brings its own code
    "video_preprocessor_config.json",
)
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError)
_told: set[str] = set()


class Processor:
    """Chat messages with images in, the model's input tensors out; token ids in, text out."""

    def __init__(self, processor: Any, folder: Path, image_only: bool) -> None:
        self.hf = processor
        self.folder = folder
        self.image_only = image_only

    @property
    def tokenizer(self) -> Any:
        return self.hf.tokenizer

    def encode(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        add_generation_prompt: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Tensors for one conversation, or for a batch of them (padded, see ``attention_mask``).

        Images stand in the messages: ``{"type": "image", "image": <PIL image or path>}``. Returns
        ``input_ids`` and ``attention_mask`` [batch, tokens], and what the family's vision tower
        takes. Raises :class:`UsageError` for videos (:func:`mqc.host.build_prompt` takes them) and
        for images or messages that the processor refuses, :class:`CheckpointError` without a chat
        template.
        """
        batch: list[Any] = [messages] if _is_conversation(messages) else list(messages)
        conversations = [[_checked(m) for m in chat] for chat in batch]
        if not (getattr(self.hf, "chat_template", None) or self.tokenizer.chat_template):
            raise CheckpointError(
                f"{self.folder} has no chat template",
                hint="add chat_template.jinja (the original checkpoint has one)",
            )
        try:
            output = self.hf.apply_chat_template(
                conversations,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=add_generation_prompt,
                processor_kwargs={"padding": len(conversations) > 1},
            )
        except (ValueError, OSError, TypeError, KeyError) as error:
            raise UsageError(
                f"the model's processor refused the prompt: {error}",
                hint='give messages such as [{"role": "user", "content": [{"type": "image", '
                '"image": "a.png"}, {"type": "text", "text": "..."}]}]',
            ) from error
        return {key: torch.as_tensor(value) for key, value in output.items()}

    def prompt(self, text: str, images: Sequence[Any] = ()) -> dict[str, torch.Tensor]:
        """:meth:`encode` of one user message: the images, then the text."""
        content = [{"type": "image", "image": image} for image in images]
        return self.encode(
            [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
        )

    def decode(self, ids: torch.Tensor | Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of one sequence of token ids."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text


def load_processor(folder: str | Path, trust_remote_code: bool = False) -> Processor:
    """The processor of a checkpoint (or artifact) folder.

    Raises :class:`CheckpointError` naming the tokenizer or processor file that is missing or
    unreadable.
    """
    folder = Path(folder)
    config = load_config(folder, trust_remote_code)
    _require(folder, _TOKENIZER_FILES, "tokenizer")
    _require(folder, _IMAGE_FILES, "image processor")
    kind = PROCESSOR_MAPPING.get(type(config), None) or _named_class(folder)
    try:
        if kind is None:
            auto = AutoProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
            return Processor(auto, folder, False)
        if "video_processor" in kind.get_attributes():
            reader = load_reader(folder, adapter_for(config).video_reader)
            if reader is not None:
                return Processor(_assembled(kind, folder, reader), folder, False)
            if not is_torchvision_available():
                _tell_once(kind.__name__)
                return Processor(_assembled(kind, folder, None), folder, True)
        return Processor(kind.from_pretrained(folder, local_files_only=True), folder, False)
    except _LOAD_ERRORS as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"the tokenizer or processor in {folder} cannot be loaded: {reason}",
            hint="take all tokenizer and processor files from the original checkpoint",
        ) from error


def _named_class(folder: Path) -> type[ProcessorMixin] | None:
    """transformers' class that ``processor_config.json`` names, for a model type it does not know;
    None where it is the checkpoint's own."""
    try:
        settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
        found = getattr(transformers, str(settings["processor_class"]), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    own = "AutoProcessor" in (settings.get("auto_map") or {})
    return found if isinstance(found, type) and not own else None


def processor_files(folder: str | Path) -> list[Path]:
    """Files that :func:`load_processor` and :func:`~mqc.capture.adapter_for` need, sorted.

    Weights are not among them. Paths are inside ``folder``; copied with their relative names they
    make another folder that loads the same.
    """
    folder = Path(folder)
    found = {path for pattern in _CARRIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def _assembled(kind: type[ProcessorMixin], folder: Path, reader: Any) -> ProcessorMixin:
    """``kind`` from ``folder`` with ``reader``, maybe None, for a video processor."""

    def check(self: Any, name: str, argument: Any) -> Any:
        if name == "video_processor":  # transformers looks for its class among torchvision's
            return None
        return kind.check_argument_for_proper_class(self, name, argument)

    relaxed: Any = type(
        kind.__name__, (kind,), {"check_argument_for_proper_class": check, "__doc__": kind.__doc__}
    )
    parts: list[Any] = []
    for name in kind.get_attributes():
        if name == "video_processor":
            parts.append(reader)
        else:
            loader = AutoTokenizer if name == "tokenizer" else AutoImageProcessor
            parts.append(loader.from_pretrained(folder, local_files_only=True))
    settings, more = relaxed.get_processor_dict(folder, local_files_only=True)
    processor: ProcessorMixin = relaxed.from_args_and_dict(parts, settings, **more)
    return processor


def _tell_once(name: str) -> None:
    if name not in _told:
        _told.add(name)
        logger.warning(
            "%s takes text and images here, not videos: its video processor needs torchvision",
            name,
        )


def _require(folder: Path, names: Sequence[str], what: str) -> None:
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(
            f"{folder} has no {what}: none of {', '.join(names)} is there",
            hint="take all tokenizer and processor files from the original checkpoint",
        )


def _is_conversation(messages: Sequence[Any]) -> bool:
    return not messages or isinstance(messages[0], Mapping)


def _checked(message: Message) -> dict[str, Any]:
    """A copy of ``message`` (templates write into it), refusing videos."""
    content = message.get("content")
    if not isinstance(content, str) and content is not None:
        content = [dict(part) for part in content]
        if any(part.get("type") == "video" for part in content):
            raise UsageError(
                "tensors of a video are not made here", hint="use mqc.host.build_prompt"
            )
    return {**message, "content": content}
