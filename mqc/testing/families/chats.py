"""Processors for the families that take videos: transformers' classes, a tiny tokenizer, a folder.

Token ids are those of the family's configuration, so what the processor gives can be fed to the
family's model of random weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mqc.testing.families import FAMILIES
from mqc.testing.families.frame import END, FIRST_TEXT, IMAGE, START

VIDEO = 8
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n<>.:,?!/-_[]()'\"="


@dataclass(frozen=True)
class Chat:
    """How a family's prompts are made.

    ``processor``: its class; ``images`` and ``videos``: settings of its image and video processor,
    their classes under ``image_processor_type`` and ``video_processor_type``; ``tokens``: special
    tokens and their ids; ``named``: those that the tokenizer has attributes for; ``image`` and
    ``video``: what a message part becomes; ``more``: settings of the processor.
    """

    processor: str
    images: dict[str, Any]
    videos: dict[str, Any]
    tokens: dict[str, int]
    image: str
    video: str
    named: dict[str, str] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def template(self) -> str:
        parts = [
            ("text", "{{ part['text'] }}"),
            *((kind, "{{ " + repr(getattr(self, kind)) + " }}") for kind in ("image", "video")),
        ]
        cases = "{% elif ".join(f"part['type'] == '{kind}' %}}{text}" for kind, text in parts)
        return (
            "{% for message in messages %}{% for part in message['content'] %}{% if "
            + cases
            + "{% endif %}{% endfor %}{% endfor %}"
        )


def _grid(processor: str, images: str, videos: str, frame: bool) -> Chat:
    """Patches of 4 pixels, merged by twos; limits of size for a frame or for a whole video."""
    cut = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    still = {"shortest_edge": 64, "longest_edge": 512}
    moving = (
        {"shortest_edge": 64, "longest_edge": 320} if frame else {**still, "longest_edge": 1600}
    )
    tokens = {"<|vision_start|>": START, "<|vision_end|>": END}
    return Chat(
        processor,
        {"image_processor_type": images, "size": still, **cut},
        {"video_processor_type": videos, "size": moving, **cut},
        {**tokens, "<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO},
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|vision_start|><|video_pad|><|vision_end|>",
    )


def _glm4v() -> Chat:
    base = _grid("Glm4vProcessor", "Glm4vImageProcessor", "Glm4vVideoProcessor", False)
    tokens = {
        "<|begin_of_image|>": START,
        "<|end_of_image|>": END,
        "<|begin_of_video|>": 5,
        "<|end_of_video|>": 6,
        "<|image|>": IMAGE,
        "<|video|>": VIDEO,
    }
    return Chat(
        base.processor,
        base.images,
        base.videos,
        tokens,
        "<|begin_of_image|><|image|><|end_of_image|>",
        "<|begin_of_video|><|video|><|end_of_video|>",
    )


_SQUARE = {"height": 16, "width": 16}


def _llava_onevision() -> Chat:
    pinpoints = FAMILIES["llava_onevision"].config().image_grid_pinpoints
    return Chat(
        "LlavaOnevisionProcessor",
        {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "size": _SQUARE,
            "image_grid_pinpoints": pinpoints,
        },
        {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": _SQUARE},
        {"<image>": IMAGE, "<video>": VIDEO},
        "<image>",
        "<video>",
        more={
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_2",
        },
    )


def _internvl() -> Chat:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    return Chat(
        "InternVLProcessor",
        {
            "image_processor_type": "GotOcr2ImageProcessor",
            "size": _SQUARE,
            "crop_to_patches": True,
            "max_patches": 3,
        },
        {"video_processor_type": "InternVLVideoProcessor", "size": _SQUARE},
        {"<img>": START, "</img>": END, "<IMG_CONTEXT>": IMAGE, "<video>": VIDEO},
        "<IMG_CONTEXT>",
        "<video>",
        named,
        {"image_seq_length": 4},
    )


def _smolvlm() -> Chat:
    settings = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    names = ("<fake_token_around_image>", "<global-img>", "<video>", "<end_of_utterance>")
    return Chat(
        "SmolVLMProcessor",
        {"image_processor_type": "SmolVLMImageProcessor", **settings},
        {"video_processor_type": "SmolVLMVideoProcessor", **settings},
        {"<image>": IMAGE, **{name: 12 + place for place, name in enumerate(names)}},
        "<image>",
        "<video>",
        more={"image_seq_len": 4},
    )


def _minicpm(processor: str) -> Chat:
    settings = {"patch_size": 4, "scale_resolution": 32, "max_slice_nums": 2}
    tokens = {
        "<image>": START,
        "</image>": END,
        "<slice>": 9,
        "</slice>": 10,
        "\n": 11,
        "<image_id>": 12,
        "</image_id>": 13,
        "<|image_pad|>": IMAGE,
        "<|video_pad|>": VIDEO,
    }
    names = [
        *("image_start", "image_end", "slice_start", "slice_end", "newline"),
        *("image_id_start", "image_id_end", "image", "video"),
    ]
    return Chat(
        processor,
        {"image_processor_type": "MiniCPMV4_6ImageProcessor", **settings},
        {"video_processor_type": "MiniCPMV4_6VideoProcessor", **settings, "slice_mode": False},
        tokens,
        "<|image_pad|>",
        "<|video_pad|>",
        {f"{name}_token": token for name, token in zip(names, tokens, strict=True)},
    )


_QWEN_IMAGES = "Qwen2VLImageProcessor"
CHATS: dict[str, Chat] = {
    "qwen2_vl": _grid("Qwen2VLProcessor", _QWEN_IMAGES, "Qwen2VLVideoProcessor", True),
    "qwen2_5_vl": _grid("Qwen2_5_VLProcessor", _QWEN_IMAGES, "Qwen2VLVideoProcessor", True),
    "qwen3_vl": _grid("Qwen3VLProcessor", _QWEN_IMAGES, "Qwen3VLVideoProcessor", False),
    "qwen3_vl_moe": _grid("Qwen3VLProcessor", _QWEN_IMAGES, "Qwen3VLVideoProcessor", False),
    "glm4v": _glm4v(),
    "minicpmv4_6": _minicpm("MiniCPMV4_6Processor"),
    "minicpmv4_6:dense": _minicpm("MiniCPMV4_6Processor"),
    "minicpmv4_7": _minicpm("MiniCPMV4_7Processor"),
    "internvl": _internvl(),
    "llava_onevision": _llava_onevision(),
    "smolvlm": _smolvlm(),
}
"""By family, for those whose prompts take videos."""


def tiny_tokenizer(chat: Chat) -> PreTrainedTokenizerFast:
    """Special tokens with the ids of ``chat``, all other text letter by letter."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **chat.tokens, "<unk>": 19}
    for place, letter in enumerate(_LETTERS, FIRST_TEXT):
        vocabulary.setdefault(letter, place)
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.add_special_tokens(list(chat.tokens))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=dict(chat.named),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def save_chat(name: str, folder: Path) -> Path:
    """Write the processor files and the configuration of family ``name`` into ``folder``."""
    chat = CHATS[name]
    tiny_tokenizer(chat).save_pretrained(folder)
    FAMILIES[name].config().save_pretrained(folder)
    files = {
        "preprocessor_config.json": chat.images,
        "video_preprocessor_config.json": chat.videos,
        "processor_config.json": {"processor_class": chat.processor, **chat.more},
    }
    for file, settings in files.items():
        (folder / file).write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(chat.template, encoding="utf-8")
    return folder
