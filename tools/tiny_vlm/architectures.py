"""The three architectures, their tokenizer and their processors, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mqc.testing import vqa

IMAGE = 64


PATCH = 8


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}"
    "{% elif part['type'] == 'video' %}{{ 'VIDEO' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


LLAVA_CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else message['role'] | upper + ':\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '\n' }}{% else %}{{ eos_token + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:\n' }}{% endif %}"
)


def corpus() -> list[str]:
    """The words of the task, as they occur after a space and at the start of a text."""
    words = {"what", "is", "at", "character", "colour", "how", "many", "things", "characters"}
    words |= {"read", "where", "the", "of", "row", "column", "nothing", "user", "assistant"}
    words |= {"left", "right", "above", "below", "system", "USER", "ASSISTANT", "SYSTEM", "image"}
    words |= set(vqa.COLOURS) | set(vqa.SHAPES) | set(vqa.CHARACTERS)
    words |= {shape + ("es" if shape.endswith("s") else "s") for shape in vqa.SHAPES}
    words |= {str(number) for number in range(10)} | {"?", "."}
    return sorted(words) + [" " + word for word in sorted(words)]


def build_tokenizer(special: list[str], **names: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: each word of the task is one token, any text encodes."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=900,
        min_frequency=1,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=special,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        **names,
    )
    assert all(len(fast.encode(word)) == 1 for word in corpus())
    return fast


class ImageOnlyQwen2VLProcessor(Qwen2VLProcessor):
    """The family's processor without its video part, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accept that there is no video processor."""
        if argument_name == "video_processor" and argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


class ImageOnlyInternVLProcessor(InternVLProcessor):
    """The family's processor without its video part, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accept that there is no video processor."""
        if argument_name == "video_processor" and argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)


ImageOnlyQwen2VLProcessor.__name__ = "Qwen2VLProcessor"  # the name that is saved
ImageOnlyInternVLProcessor.__name__ = "InternVLProcessor"

HEADS: dict[str, Any] = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
}


def qwen2_vl() -> tuple[PreTrainedModel, Any]:
    """Qwen2-VL: 3D rotary positions, images of any size; MLP width 592 = 148 * 4."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer = build_tokenizer(special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    number = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            **HEADS,
            "vocab_size": 64 * -(-len(tokenizer) // 64),
            "intermediate_size": 592,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 3.0,  # few heads' dimensions: a larger base tells no columns apart
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": number("<|endoftext|>"),
            "eos_token_id": number("<|im_end|>"),
            "pad_token_id": number("<|endoftext|>"),
        },
        vision_config={
            "depth": 4,
            "embed_dim": 160,
            "hidden_size": 192,
            "mlp_ratio": 4,
            "num_heads": 5,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, temporal_patch_size=2, min_pixels=32 * 32, max_pixels=192**2
    )
    template = CHATML.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    template = template.replace("VIDEO", "<|vision_start|><|video_pad|><|vision_end|>")
    processor = ImageOnlyQwen2VLProcessor(images, tokenizer, None, chat_template=template)
    return Qwen2VLForConditionalGeneration(config), processor


def llava() -> tuple[PreTrainedModel, Any]:
    """LLaVA: a CLIP tower read at its last layer but one; MLP widths 560 = 140 * 4."""
    special = ["<pad>", "<s>", "</s>", "<image>"]
    tokenizer = build_tokenizer(special, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    number = tokenizer.convert_tokens_to_ids
    config = LlavaConfig(
        text_config=LlamaConfig(
            **HEADS,
            head_dim=32,
            vocab_size=64 * -(-len(tokenizer) // 64),
            intermediate_size=560,
            bos_token_id=number("<s>"),
            eos_token_id=number("</s>"),
            pad_token_id=number("<pad>"),
            tie_word_embeddings=False,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=560,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=IMAGE,
            patch_size=PATCH,
            projection_dim=128,
        ),
        image_token_index=number("<image>"),
        image_seq_length=(IMAGE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE}
    )
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_CHAT,
    )
    return LlavaForConditionalGeneration(config), processor


def internvl() -> tuple[PreTrainedModel, Any]:
    """InternVL: a ViT with layer scale, pixel shuffle, tied embeddings; MLP width 536 = 67 * 8."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    special += ["<video>"]
    tokenizer = build_tokenizer(
        special,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    number = tokenizer.convert_tokens_to_ids
    config = InternVLConfig(
        text_config=Qwen2Config(
            **HEADS,
            vocab_size=64 * -(-len(tokenizer) // 64),
            intermediate_size=536,
            bos_token_id=number("<|endoftext|>"),
            eos_token_id=number("<|im_end|>"),
            pad_token_id=number("<|endoftext|>"),
            tie_word_embeddings=True,
        ),
        vision_config=InternVLVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            attention_bias=True,
            image_size=IMAGE,
            patch_size=PATCH,
        ),
        image_token_id=number("<IMG_CONTEXT>"),
        image_seq_length=(IMAGE // PATCH // 2) ** 2,
        tie_word_embeddings=True,
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": IMAGE, "width": IMAGE}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    processor = ImageOnlyInternVLProcessor(
        images,
        tokenizer,
        None,
        image_seq_length=(IMAGE // PATCH // 2) ** 2,
        chat_template=CHATML.replace("IMAGE", "<IMG_CONTEXT>\n").replace("VIDEO", "<video>\n"),
    )
    return InternVLForConditionalGeneration(config), processor


MODELS: dict[str, Callable[[], tuple[PreTrainedModel, Any]]] = {
    "tiny-qwen2-vl": qwen2_vl,
    "tiny-llava": llava,
    "tiny-internvl": internvl,
}
