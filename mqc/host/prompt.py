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
from mqc.host.videos import Video, open_video

Message = Mapping[str, Any]
Messages = Sequence[Message]
"""A conversation in the form of transformers' chat templates: a list of ``{"role", "content"}``;
content is a string, or a list of parts ``{"type": "text", "text": ...}``, ``{"type": "image",
"image": <path, PIL image, bytes or array>}``, and ``{"type": "video", "video": <path>}`` or
``{"type": "video", "frames": <pictures>}`` (:func:`~mqc.host.videos.open_video`)."""


class PromptAdapter(Protocol):
    """What the host asks of a model family (:mod:`mqc.capture.adapters` implements it)."""

    @property
    def config(self) -> Any: ...

    @property
    def video_reader(self) -> str | None: ...

    @property
    def mixes_media(self) -> bool: ...

    def modalities(self, input_ids: torch.Tensor) -> torch.Tensor: ...

    def vision_calls(self, processed: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]: ...

    def video_calls(self, processed: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]: ...

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
        vision_calls: inputs of each call of the vision tower, in the order of the image tokens;
            those of images before those of videos where ``visual_order`` is given.
        text: the templated text, for display.
        blocks: int64 [S], or None where attention is causal: tokens of one number >= 0 attend each
            other both ways (the tokens of an image, say), -1 is causal.
        visual_order: int64 [visual tokens], which row of all calls together stands at each visual
            token; None where they stand in the calls' order.
    """

    input_ids: torch.Tensor
    visual_mask: torch.Tensor
    position_ids: torch.Tensor
    next_position: int
    vision_calls: list[dict[str, torch.Tensor]] = field(default_factory=list)
    text: str = ""
    blocks: torch.Tensor | None = None
    visual_order: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


def messages_from(
    prompt: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()
) -> list[dict[str, Any]]:
    """One user message: the pictures in order, the videos in order, then the text.

    A video is a path, a list of frames, or a whole message part that may name its ``fps``.
    """
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    content += [
        {**video} if isinstance(video, Mapping) else {"type": "video", "video": video}
        for video in videos
    ]
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
    relative paths of images and videos are taken from ``base``. Raises :class:`UsageError` for
    messages of another form, unreadable pictures and videos, text whose placeholders do not match
    them, videos for a family that takes none, and what the processor refuses.
    """
    processor = getattr(processor, "hf", processor)
    plain, images, videos = split_media(messages, base)
    if videos:
        _check_videos(images, adapter, processor)
    text = _template(plain, processor)
    _check_placeholders(text, len(images), len(videos), processor)
    processed = _process(text, images, videos, processor)
    input_ids = torch.as_tensor(processed["input_ids"]).reshape(-1).to(torch.int64)
    kinds = adapter.modalities(input_ids)
    if bool(kinds.any()) and not images and not videos:
        raise UsageError(
            "the text holds the model's image token, but no image is given",
            hint="remove the token from the text, or give the image",
        )
    try:
        calls = [*adapter.vision_calls(processed), *adapter.video_calls(processed)]
        position_ids, next_position = adapter.position_ids(input_ids, processed)
        blocks = adapter.attention_blocks(input_ids)
    except MqcError:
        raise
    except Exception as error:
        raise _refused(images, videos, error) from error
    return Prompt(
        input_ids,
        kinds > 0,
        position_ids,
        next_position,
        calls,
        text,
        blocks,
        visual_order(kinds),
    )


def visual_order(kinds: torch.Tensor) -> torch.Tensor | None:
    """:attr:`Prompt.visual_order` of tokens that stand for ``kinds`` (int64 [S]: 0 text, 1 image,
    2 video), where the calls of images come before those of videos."""
    visual = kinds[kinds > 0]
    order = torch.argsort(torch.argsort(visual, stable=True), stable=True)
    return None if bool((order == torch.arange(len(order))).all()) else order


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


def split_media(
    messages: Any, base: Path | None = None
) -> tuple[list[dict[str, Any]], list[Image.Image], list[Video]]:
    """Checked messages with bare parts, their pictures (RGB) and videos in order of appearance."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise UsageError(
            f"chat messages must be a list, not {type(messages).__name__}",
            hint='use [{"role": "user", "content": [{"type": "text", "text": "..."}]}]',
        )
    if not messages:
        raise UsageError("the list of chat messages is empty", hint="give at least one message")
    images: list[Image.Image] = []
    videos: list[Video] = []
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
        parts = [_plain_part(part, images, videos, base) for part in content]
        plain.append({**message, "content": parts})
    return plain, images, videos


def image_source(part: Mapping[str, Any]) -> Any:
    """What an image part names as its picture: a path, an image, bytes; None where it has none."""
    for key in ("image", "path", "url"):
        if part.get(key) is not None:
            return part[key]
    return None


def _plain_part(
    part: Any, images: list[Image.Image], videos: list[Video], base: Path | None
) -> dict[str, Any]:
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
        videos.append(open_video(part, base))
        return {"type": "video"}
    raise UsageError(
        f"message part {_shorten(part)} is not supported",
        hint='parts are {"type": "text", "text": ...}, {"type": "image", "image": ...} and '
        '{"type": "video", "frames": [...]}',
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


def _check_videos(images: list[Image.Image], adapter: PromptAdapter, processor: Any) -> None:
    model = str(adapter.config.model_type)
    if adapter.video_reader is None:
        raise UsageError(
            f"models of type {model!r} take no videos", hint="give some of the frames as images"
        )
    if getattr(processor, "video_processor", None) is None:
        raise UsageError(
            f"the processor of this model ({type(processor).__name__}) has no video part",
            hint="take the processor files from the original checkpoint, or give frames as images",
        )
    if images and not adapter.mixes_media:
        raise UsageError(
            f"the processor of models of type {model!r} takes images or videos, not both in one "
            "prompt",
            hint="ask about one of them, or give the video's frames as images",
        )


def _check_placeholders(text: str, images: int, videos: int, processor: Any) -> None:
    for what, given in (("image", images), ("video", videos)):
        token = getattr(processor, f"{what}_token", None)
        if not isinstance(token, str) or not token:
            continue
        count = text.count(token)
        if given and not count:
            raise UsageError(
                f"the model's chat template has no place for {what}s",
                hint="take chat_template.jinja from the original checkpoint",
            )
        if count != given:
            raise UsageError(
                f"the prompt holds {count} {what} placeholders ({token}) for {given} {what}s",
                hint=f"give {what}s as message parts and leave {token} out of the text",
            )


def _process(
    text: str, images: list[Image.Image], videos: list[Video], processor: Any
) -> Mapping[str, Any]:
    options: dict[str, Any] = {"return_tensors": "pt"}
    bos = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
    if bos is not None and text.startswith(bos):
        options["add_special_tokens"] = False
    if images:
        options["images"] = images
    try:
        if videos:
            options.update(_watched(videos, processor.video_processor))
        processed: Mapping[str, Any] = processor(text=[text], **options)
    except MqcError:
        raise
    except Exception as error:
        raise _refused(images, videos, error) from error
    return processed


def _watched(videos: list[Video], reader: Any) -> dict[str, Any]:
    """The frames that the family takes of each video, and what it says about their times.

    Frames that are given one by one are all taken; without ``fps``, families that read times take
    them for 24 a second, as transformers does.
    """
    options: dict[str, Any] = {"videos": [], "video_metadata": [], "do_sample_frames": False}
    for video in videos:
        if (video.chosen or video.rate) and getattr(reader, "stack_frames", 1) > 1:
            raise UsageError(
                f"the model shows frames between the seconds of {video.name} too, and chooses all "
                "by itself",
                hint="give the file itself, without fps",
            )
        if video.chosen:
            indices = list(range(video.length))
        else:
            indices = reader.choose(video.length, video.fps, video.rate)
        options["videos"].append(video.array(indices))
        options["video_metadata"].append(
            {
                "total_num_frames": video.length,
                "fps": video.fps,
                "duration": video.length / video.fps if video.fps else None,
                "width": video.size[0],
                "height": video.size[1],
                "frames_indices": indices,
            }
        )
    return options


def _refused(images: list[Image.Image], videos: list[Video], error: Exception) -> UsageError:
    sizes = ", ".join(f"{image.width}x{image.height}" for image in images) or "none"
    shapes = ", ".join(f"{v.length} frames of {v.size[0]}x{v.size[1]}" for v in videos)
    hint = "resize the image, or check that the prompt's images are what the model supports"
    if len({video.length for video in videos}) > 1:
        hint = "give videos with as many frames each: some families take no others in one prompt"
    return UsageError(
        f"the model's processor refuses this prompt (image sizes: {sizes}"
        + (f"; videos: {shapes}" if shapes else "")
        + f"): {_cause(error)}",
        hint=hint,
    )


def _cause(error: Exception) -> str:
    return str(error) or type(error).__name__


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
