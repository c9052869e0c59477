"""From chat messages to what an engine is fed: one :class:`Prompt` per conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from mqc.errors import MqcError, UsageError
from mqc.host.images import open_image

Message = Mapping[str, Any]
Messages = Sequence[Message]
"""A conversation in the form of transformers' chat templates: a list of ``{"role", "content"}``;
content is a string, or a list of parts ``{"type": "text", "text": ...}`` and ``{"type": "image",
"image": <path, PIL image, bytes or array>}``."""


class PromptAdapter(Protocol):
    """What the host asks of a model family (:mod:`mqc.capture.adapters` implements it)."""

    @property
    def image_token_id(self) -> int: ...

    def vision_calls(self, processed: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]: ...

    def position_ids(
        self, input_ids: torch.Tensor, processed: Mapping[str, Any]
    ) -> tuple[torch.Tensor, int]: ...

    def attention_blocks(self, input_ids: torch.Tensor) -> torch.Tensor | None: ...


@dataclass(frozen=True)
class Prompt:
    """One conversation, ready for an engine.

    Attributes:
        input_ids: int64 [S].
        visual_mask: bool [S], True where a row of the vision tower replaces the embedding.
        position_ids: int64 [S], or [3, S] for three-axis rotary positions.
        next_position: position of the first generated token.
        vision_calls: inputs of each call of the vision tower, in the order of the image tokens.
        text: the templated text, for display.
        blocks: int64 [S], or None where attention is causal: tokens of one number >= 0 attend each
            other both ways (the tokens of an image, say), -1 is causal.
    """

    input_ids: torch.Tensor
    visual_mask: torch.Tensor
    position_ids: torch.Tensor
    next_position: int
    vision_calls: list[dict[str, torch.Tensor]] = field(default_factory=list)
    text: str = ""
    blocks: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


def messages_from(prompt: str, images: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """One user message: the pictures in order, then the text."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": prompt})
    return [{"role": "user", "content": content}]


def build_prompts(
    conversations: Sequence[Messages],
    processor: Any,
    adapter: PromptAdapter,
    *,
    base: Path | None = None,
) -> list[Prompt]:
    """:func:`build_prompt` for each conversation."""
    return [build_prompt(messages, processor, adapter, base=base) for messages in conversations]


def build_prompt(
    messages: Messages, processor: Any, adapter: PromptAdapter, *, base: Path | None = None
) -> Prompt:
    """Template, tokenise and preprocess one conversation.

    ``processor`` is a transformers processor, or mqc's around one (:mod:`mqc.capture.processor`);
    relative image paths are taken from ``base``. Raises :class:`UsageError` for messages of
    another form, unreadable pictures, text whose image placeholders do not match the pictures,
    and pictures the processor refuses.
    """
    processor = getattr(processor, "hf", processor)
    plain, images = split_images(messages, base)
    text = _template(plain, processor)
    _check_placeholders(text, images, processor)
    processed = _process(text, images, processor)
    input_ids = torch.as_tensor(processed["input_ids"]).reshape(-1).to(torch.int64)
    visual_mask = input_ids == adapter.image_token_id
    if bool(visual_mask.any()) and not images:
        raise UsageError(
            "the text holds the model's image token, but no image is given",
            hint="remove the token from the text, or give the image",
        )
    try:
        calls = adapter.vision_calls(processed)
        position_ids, next_position = adapter.position_ids(input_ids, processed)
        blocks = adapter.attention_blocks(input_ids)
    except MqcError:
        raise
    except Exception as error:
        raise _refused(images, error) from error
    return Prompt(input_ids, visual_mask, position_ids, next_position, calls, text, blocks)


def append_answer(prompt: Prompt, answer_ids: Sequence[int]) -> Prompt:
    """The prompt followed by an answer's tokens, for teacher forcing."""
    answer = torch.as_tensor(list(answer_ids), dtype=torch.int64)
    count = len(answer)
    positions = torch.arange(prompt.next_position, prompt.next_position + count)
    positions = positions.expand(*prompt.position_ids.shape[:-1], count)
    blocks = prompt.blocks
    if blocks is not None:
        blocks = torch.cat([blocks, torch.full((count,), -1)])
    return replace(
        prompt,
        input_ids=torch.cat([prompt.input_ids, answer]),
        visual_mask=torch.cat([prompt.visual_mask, torch.zeros(count, dtype=torch.bool)]),
        position_ids=torch.cat([prompt.position_ids, positions], dim=-1),
        next_position=prompt.next_position + count,
        blocks=blocks,
    )


def split_images(
    messages: Any, base: Path | None = None
) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Checked messages with bare image parts, and their pictures (RGB) in order of appearance."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise UsageError(
            f"chat messages must be a list, not {type(messages).__name__}",
            hint='use [{"role": "user", "content": [{"type": "text", "text": "..."}]}]',
        )
    if not messages:
        raise UsageError("the list of chat messages is empty", hint="give at least one message")
    images: list[Image.Image] = []
    plain = []
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise UsageError(
                f"a chat message must have 'role' and 'content', not {_shorten(message)}",
                hint='use {"role": "user", "content": "..."}',
            )
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence):
            raise UsageError(f"message content must be text or a list, not {_shorten(content)}")
        parts = [_plain_part(part, images, base) for part in content]
        plain.append({**message, "content": parts})
    return plain, images


def image_source(part: Mapping[str, Any]) -> Any:
    """What an image part names as its picture: a path, an image, bytes; None where it has none."""
    for key in ("image", "path", "url"):
        if part.get(key) is not None:
            return part[key]
    return None


def _plain_part(part: Any, images: list[Image.Image], base: Path | None) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        source = image_source(part)
        if source is None:
            raise UsageError(
                "an image part of a message names no image",
                hint='use {"type": "image", "image": <path or PIL image>}',
            )
        images.append(open_image(source, base))
        return {"type": "image"}
    if kind == "video":
        raise UsageError(
            "video prompts are not supported: transformers' video processors need torchvision",
            hint="give frames as images",
        )
    raise UsageError(
        f"message part {_shorten(part)} is not supported",
        hint='parts are {"type": "text", "text": ...} and {"type": "image", "image": ...}',
    )


def _template(messages: list[dict[str, Any]], processor: Any) -> str:
    try:
        return str(
            processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )
    except MqcError:
        raise
    except Exception as error:
        raise UsageError(
            f"the model's chat template cannot render these messages: {_cause(error)}",
            hint="check the roles, and that the model folder has a chat template",
        ) from error


def _check_placeholders(text: str, images: list[Image.Image], processor: Any) -> None:
    token = getattr(processor, "image_token", None)
    if not isinstance(token, str) or not token:
        return
    count = text.count(token)
    if count != len(images):
        raise UsageError(
            f"the prompt holds {count} image placeholders ({token}) for {len(images)} images",
            hint=f"give images as message parts and leave {token} out of the text",
        )


def _process(text: str, images: list[Image.Image], processor: Any) -> Mapping[str, Any]:
    options: dict[str, Any] = {"return_tensors": "pt"}
    bos = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    if bos is not None and text.startswith(bos):
        options["add_special_tokens"] = False
    if images:
        options["images"] = images
    try:
        processed: Mapping[str, Any] = processor(text=[text], **options)
    except MqcError:
        raise
    except Exception as error:
        raise _refused(images, error) from error
    return processed


def _refused(images: list[Image.Image], error: Exception) -> UsageError:
    sizes = ", ".join(f"{image.width}x{image.height}" for image in images) or "none"
    return UsageError(
        f"the model's processor refuses this prompt (image sizes: {sizes}): {_cause(error)}",
        hint="resize the image, or check that the prompt's images are what the model supports",
    )


def _cause(error: Exception) -> str:
    return str(error) or type(error).__name__


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
