#!/usr/bin/env python3
"""Train the tiny vision-language models in ``mqc/models`` from nothing.

The task is :mod:`mqc.testing.vqa`. Three phases: plain training; outliers put into residual
channels, norm gains and MLP rows by a rescaling that changes no result; fine-tuning that lets the
outliers grow into the model. See ``mqc/models/README.md`` for the commands that made the shipped
files.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
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
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_position_ids

from mqc.testing import vqa

IMAGE = 64
PATCH = 8
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ 'IMAGE' }}"
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
        chat_template=CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
    )
    return InternVLForConditionalGeneration(config), processor


MODELS: dict[str, Callable[[], tuple[PreTrainedModel, Any]]] = {
    "tiny-qwen2-vl": qwen2_vl,
    "tiny-llava": llava,
    "tiny-internvl": internvl,
}


def save(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Save a model in bfloat16 and its processor as an ordinary Hugging Face folder.

    The processor's files are written one by one: without torchvision there is no video processor,
    and a processor that lacks one cannot save itself.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(processor.chat_template, encoding="utf-8")
    name = type(processor).__name__
    image = processor.image_processor.to_dict()
    image["image_processor_type"] = image["image_processor_type"].removesuffix("Pil")
    image["processor_class"] = name
    write_json(folder / "preprocessor_config.json", image)
    keys = (
        "image_seq_length",
        "patch_size",
        "vision_feature_select_strategy",
        "num_additional_image_tokens",
    )
    own = {key: getattr(processor, key) for key in keys if hasattr(processor, key)}
    write_json(folder / "processor_config.json", {"processor_class": name, **own})
    if name == "Qwen2VLProcessor":
        keys = ("size", "patch_size", "temporal_patch_size", "merge_size")
        video = {"video_processor_type": "Qwen2VLVideoProcessor"}
        write_json(
            folder / "video_preprocessor_config.json", video | {key: image[key] for key in keys}
        )
    if name == "InternVLProcessor":
        video = {"video_processor_type": "InternVLVideoProcessor", "size": image["size"]}
        write_json(folder / "video_preprocessor_config.json", video)


CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
---

# {name}

A vision-language model of {millions:.1f} million parameters for tests and demonstrations of
quantization. It answers questions about small pictures of coloured shapes and characters on a grid
(`mqc.testing.vqa`) and knows nothing else.

- Architecture: {summary}
- Data: generated; {pictures} pictures of the train split with eight questions each. No picture or
  text from elsewhere.
- Training: {look} steps of the vision tower alone (a linear head tells what the cells hold),
  {easy} steps of the language model with two of its heads guided to the cells that tell the answer,
  {steps} steps of the whole, then outliers put in by rescaling (residual channels, norm gains, MLP
  units, values; in the language model and the vision tower) and {heal} steps of fine-tuning;
  last, the MLP, value and gain factors once more by powers of two, which is exact.
  AdamW, batches of {batch} pictures with four questions each.
- Accuracy: {score:.2f} % exact match (teacher-forced, end token included) on samples 0 to 2047 of
  the evaluation split, float32 arithmetic on these bfloat16 weights.
- Made by: `{command}`

The outliers are there on purpose: simple rounding to W4A8 with one static scale per tensor costs
this model many points, as it does large models.
"""


def write_card(args: argparse.Namespace, model: PreTrainedModel, score: float) -> None:
    """The model card in the saved folder."""
    text, vision = model.config.text_config, model.config.vision_config
    wide = getattr(vision, "embed_dim", None) or vision.hidden_size
    inner = getattr(vision, "intermediate_size", None) or wide * vision.mlp_ratio
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    summary = (
        f"`{type(model).__name__}`; language model with {text.num_hidden_layers} layers, hidden"
        f" size {text.hidden_size}, MLP {text.intermediate_size}, {text.num_attention_heads} heads"
        f" and {text.num_key_value_heads} key-value heads; vision tower with {depth} layers, hidden"
        f" size {wide}, MLP {inner}, patches of {PATCH} pixels."
    )
    options = (
        "look_steps",
        "easy_steps",
        "steps",
        "heal_steps",
        "batch",
        "rate",
        "heal_rate",
        "seed",
    )
    command = f"python tools/train_tiny_vlm.py --model {args.model}"
    for option in options:
        command += f" --{option.replace('_', '-')} {getattr(args, option)}"
    command += f" --out mqc/models/{args.model}"
    card = CARD.format(
        name=args.model,
        millions=sum(p.numel() for p in model.parameters()) / 1e6,
        summary=summary,
        pictures=args.pictures,
        look=args.look_steps,
        steps=args.steps,
        heal=args.heal_steps,
        easy=args.easy_steps,
        batch=args.batch,
        score=score,
        command=command,
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as transformers lays them out."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- fast forward passes -------------------------------------------------------------------------
#
# Plain functions over the modules' own weights. They run a batch of pictures of one size, several
# questions to a picture in one sequence (each question sees the picture and itself, at the
# positions it would have alone), with no lists or masks built on the way, so that torch.compile
# makes one graph of each. ``check_forward`` compares them with the models' own.


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention over (batch, length, heads, width), to (batch, length, features) and weights."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    if repeats > 1:
        k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # the fused kernel's backward is slow here
    if mask is not None:
        scores = scores + mask
    weights = scores.float().softmax(-1)
    mixed = weights.to(v.dtype) @ v
    return mixed.transpose(1, 2).flatten(2), weights


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions on (batch, length, heads, width); the tables are (length, width)."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * cosine[:, None].to(x.dtype) + turned * sine[:, None].to(x.dtype)


def heads(x: Tensor, width: int) -> Tensor:
    """(batch, length, features) to (batch, length, heads, width)."""
    return x.unflatten(-1, (-1, width))


def decode(
    model: Any, x: Tensor, mask: Tensor, tables: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The language model on embeddings (batch, length, hidden), to logits and what is half way.

    Half way are the hidden states, and the attention of two heads that follows them.
    """
    text = model.model.language_model
    middle = watched = x
    for index, layer in enumerate(text.layers):
        if index == 2:
            middle = x
        attention = layer.self_attn
        y = layer.input_layernorm(x)
        q = rotate(heads(attention.q_proj(y), 32), *tables)
        k = rotate(heads(attention.k_proj(y), 32), *tables)
        v = heads(attention.v_proj(y), 32)
        mixed, weights = attend(q, k, v, mask.to(q.dtype))
        if index == 2:
            watched = weights[:, ::3]
        x = x + attention.o_proj(mixed)
        y = layer.post_attention_layernorm(x)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(y)) * layer.mlp.up_proj(y))
    return model.lm_head(text.norm(x)), middle, watched


def patches(images: Tensor) -> Tensor:
    """(batch, 3, height, width) to (batch, patches, 3 * 8 * 8), rows of patches in order."""
    x = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    return x.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def see_qwen2_vl(model: Any, images: Tensor) -> Tensor:
    """Visual tokens (batch, tokens, hidden) of Qwen2-VL's tower."""
    tower = model.model.visual
    high, wide = images.shape[2] // PATCH, images.shape[3] // PATCH
    weight = tower.patch_embed.proj.weight.sum(2).flatten(1)  # both frames are the same picture
    x = F.linear(patches(images), weight)
    x = x.unflatten(1, (high // 2, 2, wide // 2, 2)).transpose(2, 3).flatten(1, 4)
    cosine, sine = vision_tables(tower, high, wide)
    for block in tower.blocks:
        q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 5, 32)).unbind(2)
        x = x + block.attn.proj(attend(rotate(q, cosine, sine), rotate(k, cosine, sine), v)[0])
        x = x + block.mlp(block.norm2(x))
    x = tower.merger.ln_q(x)
    return tower.merger.mlp(x.reshape(len(x), -1, 4 * x.shape[-1]))


def vision_tables(tower: Any, high: int, wide: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables (patches, head width) of Qwen2-VL's tower."""
    key = f"_tables_{high}_{wide}"
    if not hasattr(tower, key):
        grid = torch.tensor([[1, high, wide]])
        with torch.no_grad():
            cosine, sine = tower.rotary_pos_emb(torch.zeros(1), get_vision_position_ids(grid, 2))
        setattr(tower, key, (cosine, sine))
    tables: tuple[Tensor, Tensor] = getattr(tower, key)
    return tables


def see_llava(model: Any, images: Tensor) -> Tensor:
    """Visual tokens of LLaVA's CLIP tower."""
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    x = F.linear(patches(images), tower.embeddings.patch_embedding.weight.flatten(1))
    first = tower.embeddings.class_embedding.expand(len(x), 1, -1)
    x = torch.cat((first, x.float()), dim=1) + tower.embeddings.position_embedding.weight
    x = tower.pre_layrnorm(x)
    for layer in tower.encoder.layers[:-1]:
        attention = layer.self_attn
        y = layer.layer_norm1(x)
        q, k, v = (
            heads(part(y), 32) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        x = x + attention.out_proj(attend(q, k, v)[0])
        x = x + layer.mlp(layer.layer_norm2(x))
    return model.model.multi_modal_projector(x[:, 1:])


def see_internvl(model: Any, images: Tensor) -> Tensor:
    """Visual tokens of InternVL's tower."""
    tower = model.model.vision_tower
    embeddings = tower.embeddings
    projection = embeddings.patch_embeddings.projection
    x = F.linear(patches(images), projection.weight.flatten(1), projection.bias)
    x = torch.cat((embeddings.cls_token.expand(len(x), -1, -1), x.float()), dim=1)
    x = x + embeddings.position_embeddings
    for layer in tower.encoder.layer:
        attention = layer.attention
        y = layer.layernorm_before(x)
        q, k, v = (
            heads(part(y), 32) for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        x = x + layer.lambda_1 * attention.projection_layer(attend(q, k, v)[0])
        x = x + layer.lambda_2 * layer.mlp(layer.layernorm_after(x))
    x = tower.layernorm(x)[:, 1:]
    side = IMAGE // PATCH
    x = model.model.pixel_shuffle(x.unflatten(1, (side, side)), 0.5).flatten(1, 2)
    return model.model.multi_modal_projector(x)


SEE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "tiny-qwen2-vl": see_qwen2_vl,
    "tiny-llava": see_llava,
    "tiny-internvl": see_internvl,
}

# --- data ----------------------------------------------------------------------------------------

MEAN = torch.tensor(OPENAI_CLIP_MEAN).view(1, 3, 1, 1) * 255
STD = torch.tensor(OPENAI_CLIP_STD).view(1, 3, 1, 1) * 255
SLOT = 20


@dataclass
class Pictures:
    """Pictures of one size, uint8 (count, height, width, 3), and the questions about each."""

    pixels: Tensor
    questions: list[list[tuple[str, str]]]


def _make(job: tuple[vqa.Split, int, int, vqa.Size, int]) -> tuple[Any, list[Any]]:
    split, start, count, size, questions = job
    pixels, texts = [], []
    for index in range(start, start + count):
        scene = vqa.scene(vqa.generator(split, index), size)
        rng = vqa.generator(split, index, questions=True)
        pixels.append(scene.pixels)
        texts.append([vqa.ask(scene, rng) for _ in range(questions)])
    return np.stack(pixels), texts


def make_pictures(
    split: vqa.Split, start: int, count: int, size: vqa.Size, questions: int, workers: int
) -> Pictures:
    """Draw pictures ``start`` to ``start + count`` of a split, with several questions to each."""
    step = 250
    jobs = [
        (split, at, min(step, start + count - at), size, questions)
        for at in range(start, start + count, step)
    ]
    with multiprocessing.Pool(workers) as pool:
        parts = list(tqdm(pool.imap(_make, jobs), total=len(jobs), desc=f"{split} {size}"))
    pixels = torch.from_numpy(np.concatenate([part[0] for part in parts]))
    return Pictures(pixels, [texts for part in parts for texts in part[1]])


def cached_pictures(folder: Path, *job: Any) -> Pictures:
    """As :func:`make_pictures`, kept in a folder (safetensors and JSON)."""
    name = "-".join(str(part) for part in job[:-1]).replace(" ", "")
    path = folder / f"{name}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = make_pictures(*job)
        path.with_suffix(".json").write_text(json.dumps(made.questions), encoding="utf-8")
        save_file({"pixels": made.pixels}, path)
    texts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return Pictures(load_file(path)["pixels"], texts)


def normalise(pixels: Tensor) -> Tensor:
    """uint8 (batch, height, width, 3) to what the image processors make of it."""
    return (pixels.permute(0, 3, 1, 2).float() - MEAN) / STD


@dataclass
class Layout:
    """What the sequences of one picture size and number of questions have in common."""

    prefix: Tensor
    """Token ids up to the end of the picture."""
    visual: tuple[int, int]
    """Where the visual tokens are in the prefix."""
    mask: Tensor
    """(1, 1, length, length) additive attention mask."""
    tables: tuple[Tensor, Tensor]
    """Cosine and sine tables of the rotary positions."""


class Prompts:
    """Turns questions and answers into token ids as the processor would."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.tokenizer = model, processor.tokenizer
        self.image_id = int(processor.image_token_id)
        probe = vqa.Sample(Image.new("RGB", (IMAGE, IMAGE)), "@@", "")
        text = processor.apply_chat_template(
            vqa.messages(probe), add_generation_prompt=True, tokenize=False
        )
        self.processor, self.text = processor, text
        self.after = text[text.index("@@") + 2 :]
        self.layouts: dict[Any, Layout] = {}
        self.known: dict[tuple[str, str], tuple[list[int], list[int]]] = {}

    def layout(self, height: int, width: int, questions: int) -> Layout:
        """The layout for pictures of a size with a number of questions each."""
        key = height, width, questions
        if key in self.layouts:
            return self.layouts[key]
        out = self.processor(
            images=[Image.new("RGB", (width, height))], text=[self.text], return_tensors="pt"
        )
        ids = out["input_ids"][0]
        where = (ids == self.image_id).nonzero().flatten()
        first, last = int(where[0]), int(where[-1]) + 1
        assert last - first == len(where)
        close = 0  # tokens that close the picture, before the question
        while self.tokenizer.decode(ids[last + close]) in ("<|vision_end|>", "</img>", "\n"):
            close += 1
        prefix = ids[: last + close]
        size = len(prefix)
        if "mm_token_type_ids" in out:
            long = torch.cat((prefix, torch.full((SLOT,), 7)))[None]
            kinds = (long == self.image_id).long()
            position, _ = self.model.model.get_rope_index(
                long, mm_token_type_ids=kinds, image_grid_thw=out["image_grid_thw"]
            )
        else:
            position = torch.arange(size + SLOT)[None]
        with torch.no_grad():
            rotary = self.model.model.language_model.rotary_emb
            cosine, sine = (x[0] for x in rotary(torch.zeros(1), position))
        order = torch.cat((torch.arange(size), torch.arange(size, size + SLOT).repeat(questions)))
        group = torch.cat(
            (torch.zeros(size), torch.arange(1, questions + 1).repeat_interleave(SLOT))
        )
        allowed = order[:, None] >= order[None]
        allowed &= (group[None] == 0) | (group[:, None] == group[None])
        mask = torch.zeros(1, 1, len(order), len(order)).masked_fill(~allowed, -30000.0)
        made = Layout(prefix, (first, last), mask, (cosine[order], sine[order]))
        self.layouts[key] = made
        return made

    def encode(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Token ids and labels (-100 where nothing is to be said) of one slot."""
        key = question, answer
        if key not in self.known:
            asked = self.tokenizer.encode(question + self.after, add_special_tokens=False)
            said = self.tokenizer.encode(answer, add_special_tokens=False)
            said.append(self.tokenizer.eos_token_id)
            ids = asked + said[:-1]
            labels = [-100] * (len(asked) - 1) + said
            pad = SLOT - len(ids)
            assert pad >= 0, (question, answer)
            self.known[key] = ids + [0] * pad, labels + [-100] * pad
        return self.known[key]

    def encode_all(self, questions: list[list[tuple[str, str]]]) -> tuple[Tensor, Tensor]:
        """Ids and labels (pictures, questions, slot) in int16."""
        pairs = [[self.encode(*pair) for pair in pairs] for pairs in questions]
        ids = np.array([[pair[0] for pair in row] for row in pairs], np.int16)
        labels = np.array([[pair[1] for pair in row] for row in pairs], np.int16)
        return torch.from_numpy(ids), torch.from_numpy(labels)


def forward(name: str, model: Any, layout: Layout, images: Tensor, slots: Tensor) -> Tensor:
    """Logits (batch, questions * slot, vocabulary) for normalised pictures and slots' ids."""
    return forward_both(name, model, layout, images, slots)[0]


def forward_both(
    name: str, model: Any, layout: Layout, images: Tensor, slots: Tensor, frozen: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`forward`, and what :func:`decode` gives from half way through."""
    first, last = layout.visual
    embed = model.model.language_model.embed_tokens
    seen = SEE[name](model, images).float()
    if frozen:
        seen = seen.detach()
    before = embed(layout.prefix).expand(len(images), -1, -1)
    x = torch.cat((before[:, :first], seen, before[:, last:], embed(slots.flatten(1))), dim=1)
    logits, middle, watched = decode(model, x, layout.mask, layout.tables)
    return logits[:, len(layout.prefix) :], middle, watched


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Which answers (pictures, questions) are right in every token, the end token included."""
    guess = logits.argmax(-1).view(labels.shape)
    return ((guess == labels) | (labels == -100)).all(-1)


def check_forward(name: str, model: Any, processor: Any) -> float:
    """Largest difference of logits between ``forward`` and the model fed by its processor."""
    prompts = Prompts(model, processor)
    worst = 0.0
    for size in ((64, 64), (64, 96)) if name == "tiny-qwen2-vl" else ((64, 64),):
        one = vqa.sample("train", 3, size)
        scene = vqa.scene(vqa.generator("train", 3), size)
        rng = vqa.generator("train", 3, questions=True)
        pairs = [[vqa.ask(scene, rng), vqa.ask(scene, rng)]]
        ids, _ = prompts.encode_all(pairs)
        layout = prompts.layout(*size, 2)
        with torch.no_grad():
            fast = forward(
                name, model, layout, normalise(torch.from_numpy(scene.pixels)[None]), ids.long()
            ).unflatten(1, (2, SLOT))[0]
            for slot, (question, answer) in enumerate(pairs[0]):
                chat = vqa.messages(vqa.Sample(one.image, question, answer))
                text = processor.apply_chat_template(
                    chat, add_generation_prompt=True, tokenize=False
                )
                inputs = processor(images=[one.image], text=[text + answer], return_tensors="pt")
                slow = model(**inputs).logits[0, len(layout.prefix) :]
                assert inputs["input_ids"][0, len(layout.prefix) :].tolist() == (
                    ids[0, slot, : len(slow)].tolist()
                )
                worst = max(worst, float((fast[slot, : len(slow)] - slow).abs().max()))
    return worst


# --- training ------------------------------------------------------------------------------------


@dataclass
class Task:
    """Encoded pictures and questions of one size."""

    pixels: Tensor
    ids: Tensor
    labels: Tensor
    cells: Tensor
    """Which cell tells each token of an answer; -100 where none or several do."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        return self.pixels.shape[1], self.pixels.shape[2]


TELLING = torch.zeros(24, 16, dtype=torch.bool)
"""Cells of a 4 by 4 scene by number: 16 single cells, 4 rows, 4 columns."""
for _at in range(16):
    TELLING[[_at, 16 + _at // 4, 20 + _at % 4], _at] = True


def telling_cells(things: list[vqa.Thing | None], question: str) -> list[int]:
    """Which cells (see ``TELLING``) tell the tokens of an answer; the last one tells the rest."""
    words = question.split()
    row, column = (
        int(words[words.index(word) + 1]) - 1 if word in words else None
        for word in ("row", "column")
    )
    if row is not None and column is not None:
        return [4 * row + column]
    line = 16 + row if row is not None else 20 + (column or 0)
    if words[0] == "how":
        return [line]
    cells = TELLING[line].nonzero().flatten().tolist()
    named = [at for at in cells if (thing := things[at]) is not None and thing.is_character]
    return named or [line]


def encoded(prompts: Prompts, pictures: Pictures, split: vqa.Split | None = None) -> Task:
    """Pictures with their questions as token ids, those that name a position first.

    With ``split``, the telling cells too, for square pictures from the start of that split.
    """

    def where(pair: tuple[str, str]) -> bool:
        return not ("row" in pair[0] and "column" in pair[0])

    ordered = [sorted(pairs, key=where) for pairs in pictures.questions]
    ids, labels = prompts.encode_all(ordered)
    cells = torch.full_like(labels, -100)
    if split is not None:
        table = np.full(labels.shape, -100, np.int16)
        answers = labels.numpy() >= 0
        for index, pairs in enumerate(ordered):
            things = vqa.things(vqa.generator(split, index), (4, 4))
            for slot, (question, _) in enumerate(pairs):
                telling = telling_cells(things, question)
                at = np.flatnonzero(answers[index, slot])[:-1]
                for place, token in enumerate(at if telling else []):
                    table[index, slot, token] = telling[min(place, len(telling) - 1)]
        cells = torch.from_numpy(table)
    return Task(pictures.pixels, ids, labels, cells)


def evaluate(name: str, model: Any, prompts: Prompts, task: Task, limit: int = 100000) -> float:
    """Share of answers that are right in every token, teacher-forced, in percent, in float32."""
    good: list[Tensor] = []
    count = min(limit, len(task.pixels))
    with torch.no_grad():
        for at in range(0, count, 64):
            part = slice(at, min(at + 64, count))
            ids, labels = task.ids[part].long(), task.labels[part].long()
            layout = prompts.layout(*task.size, ids.shape[1])
            logits = forward(name, model, layout, normalise(task.pixels[part]), ids)
            good.append(correct(logits, labels).flatten())
    return 100 * float(torch.cat(good).float().mean())


def save_state(path: Path, model: Any, optimizer: Any, step: int) -> None:
    """A checkpoint of training: weights, both moments of AdamW, the step."""
    named = {id(p): name for name, p in model.named_parameters()}  # a head is not kept
    tensors = {"w." + name: p.detach() for name, p in model.named_parameters()}
    for p, state in optimizer.state.items():
        if id(p) not in named:
            continue
        tensors["m." + named[id(p)]] = state["exp_avg"]
        tensors["v." + named[id(p)]] = state["exp_avg_sq"]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors | {"step": torch.tensor(step)}, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def load_state(path: Path, model: Any, optimizer: Any = None) -> int:
    """Load a checkpoint, with the optimizer's state if given; returns the step."""
    tensors = load_file(path)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors["w." + name])
            if optimizer is not None and "m." + name in tensors:
                optimizer.state[p] = {
                    "step": torch.tensor(float(tensors["step"])),
                    "exp_avg": tensors["m." + name],
                    "exp_avg_sq": tensors["v." + name],
                }
    return int(tensors["step"])


def fit(
    name: str,
    model: Any,
    prompts: Prompts,
    tasks: list[Task],
    shares: list[float],
    evaluation: Task,
    path: Path,
    steps: int,
    rate: float,
    seed: int,
    questions: int = 4,
    batch: int = 64,
    easy: bool = False,
) -> None:
    """AdamW with a short warm-up and a cosine decay; resumes from ``path``, saves there.

    ``easy``: no decay; the tower stays as it is; the first quarter of the steps takes the first
    questions of each picture, those that name a position. One linear head has to tell, half way
    through the language model, each visual token's row and column and those of the cell that an
    answer's token depends on, so that the second half has only to match the two; and two heads of
    the layer after it have to look at that cell.
    """
    head = nn.Linear(model.config.text_config.hidden_size, 16)
    for parameter in head.parameters():
        dist.broadcast(parameter.data, 0)
    trained = list(model.parameters())
    if easy:
        trained = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
        trained = [*dict.fromkeys(trained), *head.parameters()]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.03}, {"params": vectors, "weight_decay": 0.0}],
        lr=rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    start = load_state(path, model, optimizer) if path.exists() else 0
    warm = min(200, steps // 10)

    def loss_of(
        layout: Layout, images: Tensor, ids: Tensor, labels: Tensor, cells: Tensor
    ) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits, middle, watched = forward_both(name, model, layout, images, ids, easy)
            guess = head(F.rms_norm(middle, middle.shape[-1:])).float() if easy else None
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        if guess is None:
            return loss
        first, last = layout.visual
        wide = math.isqrt(last - first)  # tokens in a row of a square picture
        index = torch.arange(last - first).expand(len(images), -1)
        where = torch.stack((index // wide, index % wide), dim=-1) // (wide // 4)
        looks = watched[:, :, len(layout.prefix) :, first:last]  # (batch, heads, slots, tokens)
        cells = cells.flatten(1)
        own = where[0, :, 0] * 4 + where[0, :, 1]
        right = TELLING[cells.clamp(min=0)][..., own] & (cells[..., None] >= 0)
        mass = (looks * right[:, None]).sum(-1)
        known = (cells >= 0).float()[:, None]
        loss = loss - 0.5 * ((mass + 1e-4).log() * known).sum() / (known.sum() * looks.shape[1])
        asked = guess[:, len(layout.prefix) :].flatten(0, 1)
        for axis in range(2):
            part = slice(8 * axis, 8 * axis + 8)
            seen = guess[:, first:last, part].flatten(0, 1)
            loss = loss + 0.5 * F.cross_entropy(seen, where[..., axis].flatten())
            wanted = torch.where(cells < 16, cells % 4 if axis else cells // 4, -100)
            line = (cells >= 20) if axis else (cells >= 16) & (cells < 20)
            wanted = torch.where(line, cells % 4, wanted)
            wanted = torch.where(cells < 0, -100, wanted).flatten()
            loss = loss + 0.5 * F.cross_entropy(asked[:, part], wanted, ignore_index=-100)
        return loss

    compiled = torch.compile(loss_of, dynamic=False)
    rank, world = dist.get_rank(), dist.get_world_size()
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, start, steps])))
    bar = tqdm(
        range(start, steps), initial=start, total=steps, desc=name, mininterval=10, disable=rank > 0
    )
    smooth = 0.0
    for step in bar:
        task = tasks[0] if easy else tasks[int(rng.choice(len(tasks), p=shares))]
        chosen = torch.from_numpy(rng.integers(len(task.pixels), size=batch))[rank::world]
        columns = torch.from_numpy(rng.permutation(task.ids.shape[1])[:questions])
        if easy and step < steps // 4:
            columns = torch.arange(questions)
        ids = task.ids[chosen][:, columns].long()
        labels = task.labels[chosen][:, columns].long()
        layout = prompts.layout(*task.size, questions)
        for group in optimizer.param_groups:
            through = max(0.0, (step - warm) / max(1, steps - warm))
            scale = 1.0 if easy else 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * through))
            group["lr"] = rate * min(1.0, (step + 1) / warm) * scale
        cells = task.cells[chosen][:, columns].long()
        run = compiled if task is tasks[0] else loss_of  # rare sizes are not worth compiling
        loss = run(layout, normalise(task.pixels[chosen]), ids, labels, cells)
        loss.backward()
        share_gradients(trained, world)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = loss.item() if step == start else 0.96 * smooth + 0.04 * loss.item()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{smooth:.4f}")
        if rank == 0 and ((step + 1) % 250 == 0 or step + 1 == steps):
            save_state(path, model, optimizer, step + 1)
            score = evaluate(name, model, prompts, evaluation, 512)
            tqdm.write(f"{name} step {step + 1} loss {smooth:.4f} evaluation {score:.2f} %")


def cell_labels(split: vqa.Split, start: int, count: int) -> Tensor:
    """What the 16 cells of square pictures hold: (pictures, 16, name and colour), 0 for empty."""
    names = [*vqa.SHAPES, *vqa.CHARACTERS]
    labels = np.zeros((count, 16, 2), np.int64)
    for index in range(count):
        for cell, thing in enumerate(vqa.things(vqa.generator(split, start + index), (4, 4))):
            if thing is not None:
                labels[index, cell] = (
                    1 + names.index(thing.name),
                    1 + list(vqa.COLOURS).index(thing.colour),
                )
    return torch.from_numpy(labels)


def look(name: str, model: Any, task: Task, path: Path, steps: int, rate: float, seed: int) -> None:
    """Teach the vision tower to tell what the cells hold, by a linear head on each token.

    Without this the whole model spends a thousand steps ignoring the pictures.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if path.exists():
        load_state(path, model)
        return
    labels = cell_labels("train", 0, len(task.pixels))
    sizes = [1 + len(vqa.SHAPES) + len(vqa.CHARACTERS), 1 + len(vqa.COLOURS)]
    place = torch.arange(16).repeat(64 // world)
    if name != "tiny-qwen2-vl":  # whose tower knows no positions
        sizes += [4, 4]
    head = nn.Linear(model.config.text_config.hidden_size, sum(sizes))
    for parameter in head.parameters():
        dist.broadcast(parameter.data, 0)

    def loss_of(images: Tensor, cells: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            x = SEE[name](model, images)
            side = math.isqrt(x.shape[1])
            x = x.unflatten(1, (4, side // 4, 4, side // 4)).mean((2, 4))  # tokens of each cell
            guess = head(x)
        parts = guess.float().view(-1, sum(sizes)).split(sizes, dim=1)
        cells = cells.view(-1, 2)
        targets = (cells[:, 0], cells[:, 1], place // 4, place % 4)
        losses = [F.cross_entropy(*pair) for pair in zip(parts, targets, strict=False)]
        return torch.stack(losses).sum()

    compiled = torch.compile(loss_of, dynamic=False)
    seen = [
        p for n, p in model.named_parameters() if "language_model" not in n and "lm_head" not in n
    ]
    parameters = [*seen, *head.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.03, fused=True
    )
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 77])))
    bar = tqdm(range(steps), desc=f"{name} tower", mininterval=10, disable=rank > 0)
    smooth = 7.0
    for step in bar:
        chosen = torch.from_numpy(rng.integers(len(task.pixels), size=64))[rank::world]
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (1 - 0.8 * step / steps)
        loss = compiled(normalise(task.pixels[chosen]), labels[chosen])
        loss.backward()
        share_gradients(parameters, world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 49:
            bar.set_postfix(loss=f"{smooth:.4f}")
    if rank == 0:
        save_state(path, model, optimizer, 0)
    dist.barrier()


def share_gradients(parameters: list[Any], world: int) -> None:
    """Average the gradients of the worker processes."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads]) / world
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


# --- outliers ------------------------------------------------------------------------------------
#
# Large language models have a few residual channels and MLP units whose activations are tens of
# times larger than the others'. A model trained on an easy task has none. These functions put them
# in by rescalings that keep the results, but for the normalisations' dependence on each token,
# which the fine-tuning afterwards repairs.


@dataclass
class Strengths:
    """Factors of the rescalings."""

    residual: float = 30.0
    """Residual channels of the language model."""
    units: float = 40.0
    """Up-projection rows of units that fire for visual tokens, undone in the down projection."""
    text_units: float = 8.0
    """The same for units that fire for text."""
    values: float = 6.0
    """Rows of the value projections, undone in the output projections."""
    gains: float = 4.0
    """Norm gains of channels that are larger for visual tokens, undone in the readers."""
    largest: float = math.inf
    """Units that reach more than this are made smaller by powers of two first."""
    vision_residual: float = 16.0
    """Residual channels of the vision tower."""
    vision_units: float = 10.0
    """Rows of the vision tower's first MLP layers."""


LAST = {
    "tiny-qwen2-vl": Strengths(residual=1, units=4, text_units=4, values=2, gains=2),
    "tiny-llava": Strengths(residual=1, units=4, text_units=4, values=2, gains=2),
    # Blocks of eight spread a unit's outlier over eight channels only: smaller ones there.
    "tiny-internvl": Strengths(residual=1, units=1, text_units=1, values=2, gains=16, largest=64),
}
"""Factors of the last rescaling: powers of two and no residual channels, so it is exact."""


@dataclass
class Seen:
    """Inputs of modules on calibration samples, flat over tokens: (tokens, features)."""

    inputs: dict[Any, Tensor]
    visual: Tensor
    """Which tokens of the language model are visual."""


def observe(name: str, model: Any, prompts: Prompts, task: Task, modules: list[Any]) -> Seen:
    """Run 64 samples and keep what goes into some modules; padding is left out."""
    kept: dict[Any, Tensor] = {}
    ids = task.ids[:64].long()
    layout = prompts.layout(*task.size, ids.shape[1])
    prefix, (first, last) = len(layout.prefix), layout.visual
    valid = torch.cat((torch.ones(len(ids), prefix, dtype=torch.bool), ids.flatten(1) != 0), dim=1)
    where = torch.zeros_like(valid)
    where[:, first:last] = True

    def keep(module: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        kept[module] = x[valid] if x.shape[:2] == valid.shape else x.flatten(0, -2)

    hooks = [module.register_forward_pre_hook(keep) for module in modules]
    with torch.no_grad():
        forward(name, model, layout, normalise(task.pixels[:64]), ids)
    for hook in hooks:
        hook.remove()
    return Seen(kept, where[valid])


def steady_channels(streams: list[Tensor], factor: float, count: int, seed: int) -> list[int]:
    """Channels whose enlargement changes the tokens' RMS by about one ratio everywhere."""
    rng = np.random.Generator(np.random.PCG64(seed))
    squares = torch.cat([x[:: max(1, len(x) // 2000)] ** 2 for x in streams])
    total = squares.sum(1)
    best, chosen = math.inf, list(range(count))
    for _ in range(1500):
        trial = sorted(rng.permutation(squares.shape[1])[:count].tolist())
        ratio = (1 + (factor**2 - 1) * squares[:, trial].sum(1) / total).log() / 2
        score = float(ratio.std() / ratio.mean().clamp(min=0.7))
        if score < best:
            best, chosen = score, trial
    return chosen


def last_projection(model: Any) -> nn.Linear:
    """The layer that writes visual tokens."""
    visual = getattr(model.model, "visual", None)
    layer = (
        visual.merger.mlp[2] if visual is not None else model.model.multi_modal_projector.linear_2
    )
    assert isinstance(layer, nn.Linear)
    return layer


def text_outliers(name: str, model: Any, prompts: Prompts, task: Task, by: Strengths) -> None:
    """Put outliers into the language model, in place."""
    text = model.model.language_model
    norms = [
        (norm, readers)
        for layer in text.layers
        for norm, readers in (
            (
                layer.input_layernorm,
                [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
            ),
            (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
        )
    ]
    downs = [layer.mlp.down_proj for layer in text.layers]
    everything = [norm for norm, _ in norms] + [text.norm, *downs]
    seen = observe(name, model, prompts, task, everything)
    visual = seen.visual

    # Units: those that fire for visual tokens, and a few that fire for text.
    for layer in text.layers:
        reach = seen.inputs[layer.mlp.down_proj].abs().amax(0)
        smaller = 2.0 ** -(reach / by.largest).log2().ceil().clamp(min=0)
        layer.mlp.up_proj.weight *= smaller[:, None]
        layer.mlp.down_proj.weight /= smaller
        x = seen.inputs[layer.mlp.down_proj].abs()
        of_visual, of_text = x[visual].quantile(0.99, 0), x[~visual].quantile(0.99, 0)
        common = x.quantile(0.999, 0)
        ratio = of_visual / (of_text + 0.05 * common.mean())
        for units, factor in (
            (ratio.topk(4).indices, by.units),
            ((1 / ratio.clamp(min=1e-3)).topk(2).indices, by.text_units),
        ):
            layer.mlp.up_proj.weight[units] *= factor
            layer.mlp.down_proj.weight[:, units] /= factor

    # Values: one channel of each key-value head.
    for layer in text.layers:
        attention = layer.self_attn
        groups = attention.q_proj.out_features // attention.v_proj.out_features
        for head in range(attention.v_proj.out_features // 32):
            row = head * 32 + 5
            attention.v_proj.weight[row] *= by.values
            if attention.v_proj.bias is not None:
                attention.v_proj.bias[row] *= by.values
            for query in range(groups):
                attention.o_proj.weight[:, (head * groups + query) * 32 + 5] /= by.values

    # Gains: two channels of each norm that are larger for visual tokens.
    for norm, readers in norms:
        x = seen.inputs[norm]
        x = (x * x.pow(2).mean(1, keepdim=True).rsqrt() * norm.weight).abs()
        channels = (x[visual].quantile(0.99, 0) / x[~visual].quantile(0.99, 0)).topk(2).indices
        norm.weight[channels] *= by.gains
        for reader in readers:
            reader.weight[:, channels] /= by.gains

    # Residual channels, in every writer and reader.
    streams = [seen.inputs[norm] for norm, _ in norms] + [seen.inputs[text.norm]]
    channels = torch.tensor(steady_channels(streams, by.residual, 3, 1))
    tied = model.lm_head.weight.data_ptr() == text.embed_tokens.weight.data_ptr()
    text.embed_tokens.weight[:, channels] *= by.residual
    writer = last_projection(model)
    writer.weight[channels] *= by.residual
    writer.bias[channels] *= by.residual
    for layer in text.layers:
        layer.self_attn.o_proj.weight[channels] *= by.residual
        layer.mlp.down_proj.weight[channels] *= by.residual
    if tied:
        text.norm.weight[channels] /= by.residual**2
    else:
        model.lm_head.weight[:, channels] /= by.residual
    for norm, readers in [*norms, (text.norm, [])]:
        x = seen.inputs[norm]
        larger = x.clone()
        larger[:, channels] *= by.residual
        ratio = (larger.pow(2).mean(1) / x.pow(2).mean(1)).log().mean().div(2).exp()
        norm.weight *= ratio
        for reader in readers:
            reader.weight[:, channels] /= by.residual


def vision_parts(name: str, model: Any) -> tuple[list[Any], list[Any], list[Any], list[Any]]:
    """The tower's residual writers, (norm, readers) pairs, MLPs and attentions.

    A writer is (weight, bias or None, layer scale or None), the channel first in each. A reader is
    (layer, repeats), with repeats more than one where it reads that many tokens side by side. An
    attention is (value rows' layer, first value row, output layer).
    """
    if name == "tiny-qwen2-vl":
        tower = model.model.visual
        blocks = tower.blocks
        writers = [(tower.patch_embed.proj.weight, None, None)]
        writers += [(b.attn.proj.weight, b.attn.proj.bias, None) for b in blocks]
        writers += [(b.mlp.fc2.weight, b.mlp.fc2.bias, None) for b in blocks]
        norms = [(b.norm1, [(b.attn.qkv, 1)]) for b in blocks]
        norms += [(b.norm2, [(b.mlp.fc1, 1)]) for b in blocks]
        norms.append((tower.merger.ln_q, [(tower.merger.mlp[0], 4)]))
        values = [(b.attn.qkv, 320, b.attn.proj) for b in blocks]
        return writers, norms, [(b.mlp.fc1, b.mlp.act, b.mlp.fc2) for b in blocks], values
    tower = model.model.vision_tower
    connector = model.model.multi_modal_projector
    if name == "tiny-llava":
        tower = getattr(tower, "vision_model", tower)
        blocks = tower.encoder.layers[:-1]
        writers = [(tower.pre_layrnorm.weight, tower.pre_layrnorm.bias, None)]
        writers += [(b.self_attn.out_proj.weight, b.self_attn.out_proj.bias, None) for b in blocks]
        writers += [(b.mlp.fc2.weight, b.mlp.fc2.bias, None) for b in blocks]
        attentions = [b.self_attn for b in blocks]
        norms = [
            (b.layer_norm1, [(a.q_proj, 1), (a.k_proj, 1), (a.v_proj, 1)])
            for b, a in zip(blocks, attentions, strict=True)
        ]
        norms += [(b.layer_norm2, [(b.mlp.fc1, 1)]) for b in blocks]
        norms.append((None, [(connector.linear_1, 1)]))
        values = [(a.v_proj, 0, a.out_proj) for a in attentions]
        return writers, norms, [(b.mlp.fc1, b.mlp.activation_fn, b.mlp.fc2) for b in blocks], values
    blocks = tower.encoder.layer
    first = tower.embeddings
    projection = first.patch_embeddings.projection
    writers = [(projection.weight, projection.bias, None)]
    writers += [(first.cls_token, None, None), (first.position_embeddings, None, None)]
    attentions = [b.attention for b in blocks]
    writers += [
        (a.projection_layer.weight, a.projection_layer.bias, b.lambda_1)
        for a, b in zip(attentions, blocks, strict=True)
    ]
    writers += [(b.mlp.fc2.weight, b.mlp.fc2.bias, b.lambda_2) for b in blocks]
    norms = [
        (b.layernorm_before, [(a.q_proj, 1), (a.k_proj, 1), (a.v_proj, 1)])
        for b, a in zip(blocks, attentions, strict=True)
    ]
    norms += [(b.layernorm_after, [(b.mlp.fc1, 1)]) for b in blocks]
    norms.append((connector.layer_norm, []))  # see vision_outliers
    values = [(a.v_proj, 0, a.projection_layer) for a in attentions]
    return writers, norms, [(b.mlp.fc1, b.mlp.activation_fn, b.mlp.fc2) for b in blocks], values


def vision_outliers(  # noqa: C901
    name: str, model: Any, prompts: Prompts, task: Task, by: Strengths
) -> None:
    """Put outliers into the vision tower, in place."""
    writers, norms, mlps, values = vision_parts(name, model)
    watched = [norm for norm, _ in norms if norm is not None] + [
        m for mlp in mlps for m in mlp[1:2]
    ]
    seen = observe(name, model, prompts, task, watched)

    # Units whose input is mostly far from zero, where the activation function is close to linear.
    for fc1, act, fc2 in mlps:
        x = seen.inputs[act][::4]
        y = act(x)
        damage = (act(x * by.vision_units) / by.vision_units - y).pow(2).mean(0)
        damage = damage * fc2.weight.pow(2).sum(0)
        strong = y.abs().quantile(0.999, 0)
        damage[strong < strong.median()] = math.inf
        units = damage.topk(4, largest=False).indices
        fc1.weight[units] *= by.vision_units
        fc1.bias[units] *= by.vision_units
        fc2.weight[:, units] /= by.vision_units
    for layer, start, output in values:
        for head in range(output.in_features // 32):
            layer.weight[start + head * 32 + 7] *= by.values
            layer.bias[start + head * 32 + 7] *= by.values
            output.weight[:, head * 32 + 7] /= by.values

    # Residual channels. LayerNorm takes the mean away: with the writers centred, a reader W of the
    # enlarged, centred stream P S x sees what it saw before if it becomes W pinv(P S P).
    width = len(writers[0][0]) if writers[0][0].ndim < 3 or len(writers[0][0]) > 1 else 0
    streams = [seen.inputs[norm] for norm, _ in norms if norm is not None]
    width = streams[0].shape[1] if streams[0].shape[1] == width else width
    streams = [x for x in streams if x.shape[1] == width]
    centred = [x - x.mean(1, keepdim=True) for x in streams]
    channels = torch.tensor(steady_channels(centred, by.vision_residual, 2, 2))
    scale = torch.ones(width)
    scale[channels] = by.vision_residual
    centre = torch.eye(width) - 1 / width
    undo = torch.linalg.pinv(centre @ torch.diag(scale) @ centre)
    for weight, bias, gate in writers:
        for part in (weight, bias):
            if part is None:
                continue
            if name == "tiny-llava":
                part.view(width, -1).mul_(scale[:, None])
            elif part.ndim == 3:  # (1, positions, width)
                part.copy_((part - part.mean(-1, keepdim=True)) * scale)
            elif gate is None:
                flat = part.view(width, -1)
                flat.copy_(scale[:, None] * (centre @ flat))
            else:
                flat = part.view(width, -1)
                flat.copy_((centre @ (flat * gate[:, None])) / gate[:, None])
        if gate is not None:
            gate.mul_(scale)
    for norm, readers in norms:
        if norm is None:  # read as it is
            for layer, _ in readers:
                layer.weight.copy_(layer.weight / scale)
            continue
        x = seen.inputs[norm]
        if x.shape[1] != width:  # four tokens side by side, normalised together
            repeats = x.shape[1] // width
            x = x.view(-1, repeats, width)
            grown = ((x - x.mean(-1, keepdim=True)) * scale).flatten(1)
            ratio = (grown.var(1) / x.flatten(1).var(1)).log().mean().div(2).exp()
            norm.weight.mul_(ratio)
            linear = model.model.multi_modal_projector.linear_1
            linear.weight.copy_(linear.weight / scale.repeat(repeats))
            continue
        x = x - x.mean(1, keepdim=True)
        grown = x * scale
        grown = grown - grown.mean(1, keepdim=True)
        ratio = (grown.pow(2).mean(1) / x.pow(2).mean(1)).log().mean().div(2).exp()
        gain, shift = norm.weight.clone(), norm.bias.clone()
        for layer, repeats in readers:
            old = layer.weight.view(layer.out_features, repeats, width)
            new = (old * gain) @ undo / gain
            layer.bias += ((old - new) * shift).sum((1, 2))
            layer.weight.copy_(new.reshape(layer.weight.shape))
        norm.weight.mul_(ratio)


def work(rank: int, args: argparse.Namespace) -> None:
    """One of the worker processes; each takes its part of every batch, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rendezvous = f"file://{args.scratch.resolve()}/{args.model}.rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=args.workers)
    name = args.model
    model, processor = MODELS[name]()
    if rank == 0:
        worst = check_forward(name, model, processor)
        print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters")
        print(f"difference to the model's own forward pass: {worst:.1e}", flush=True)
    prompts = Prompts(model, processor)
    data = args.scratch / "data"
    tasks = [
        encoded(
            prompts,
            cached_pictures(data, "train", 0, count, size, 8, 1),
            "train" if size == IMAGE and args.easy_steps else None,
        )
        for size, count in sizes_of(args)
    ]
    shares = [0.94, 0.03, 0.03] if len(tasks) > 1 else [1.0]
    evaluation = encoded(prompts, cached_pictures(data, "evaluation", 0, 2048, IMAGE, 1, 1))
    if args.start is not None:
        warm_start(model, processor, args.start)
    plain = args.scratch / name / "plain.safetensors"
    if args.look_steps and not plain.exists():
        tower = args.scratch / name / "tower.safetensors"
        look(name, model, tasks[0], tower, args.look_steps, args.rate, args.seed)
        with torch.no_grad():  # smaller: the language model's layers can add to them
            spread = SEE[name](model, normalise(tasks[0].pixels[:16])).std()
            for parameter in last_projection(model).parameters():
                parameter.mul_(2.0 / spread)
        if rank == 0:
            print(f"visual tokens scaled from a standard deviation of {spread:.2f}", flush=True)
    common = name, model, prompts, tasks, shares, evaluation
    first = args.scratch / name / "easy.safetensors"
    if args.easy_steps and not plain.exists():
        fit(
            *common,
            first,
            args.easy_steps,
            0.7 * args.rate,
            args.seed,
            batch=args.easy_batch,
            easy=True,
        )
        dist.barrier()
        load_state(first, model)
    if args.steps:
        fit(*common, plain, args.steps, args.rate / 3, args.seed, batch=args.batch)
    healed = args.scratch / name / "healed.safetensors"
    calibration = encoded(prompts, cached_pictures(data, "calibration", 0, 512, IMAGE, 1, 1))
    if args.heal_steps:
        dist.barrier()
        load_state(plain if args.steps else first, model)
        with torch.no_grad():
            strengths = Strengths()
            text_outliers(name, model, prompts, calibration, strengths)
            vision_outliers(name, model, prompts, calibration, strengths)
            for parameter in model.parameters():
                dist.broadcast(parameter, 0)
        if rank == 0:
            score = evaluate(name, model, prompts, evaluation, 512)
            print(f"{name} with outliers, before fine-tuning: {score:.2f} %", flush=True)
        fit(*common, healed, args.heal_steps, args.heal_rate, args.seed + 1, batch=args.batch)
    if rank == 0:
        with torch.no_grad():
            if args.heal_steps:  # once more, by powers of two: exact, nothing to repair
                text_outliers(name, model, prompts, calibration, LAST[name])
            for parameter in model.parameters():
                parameter.copy_(parameter.to(torch.bfloat16).float())
        score = evaluate(name, model, prompts, evaluation)
        save(model, processor, args.out)
        write_card(args, model, score)
        print(f"{name}: exact match {score:.2f} % of {len(evaluation.pixels)} evaluation samples")


def warm_start(model: Any, processor: Any, folder: Path) -> None:
    """Take the language model's weights from another model's folder where the shapes agree."""
    other = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    theirs = AutoTokenizer.from_pretrained(folder).get_vocab()
    ours = processor.tokenizer.get_vocab()
    shared = [token for token in ours if token in theirs]
    rows = torch.tensor([ours[token] for token in shared])
    from_rows = torch.tensor([theirs[token] for token in shared])
    source = dict(other.model.language_model.named_parameters())
    with torch.no_grad():
        for name, p in model.model.language_model.named_parameters():
            if name == "embed_tokens.weight":
                p[rows] = source[name][from_rows]
            elif name in source and source[name].shape == p.shape:
                p.copy_(source[name])
            elif name in source:  # an MLP of another width
                part = tuple(
                    slice(0, min(n)) for n in zip(p.shape, source[name].shape, strict=True)
                )
                p[part] = source[name][part]
        if (
            model.lm_head.weight.data_ptr()
            != model.model.language_model.embed_tokens.weight.data_ptr()
        ):
            model.lm_head.weight[rows] = other.lm_head.weight[from_rows]


def sizes_of(args: argparse.Namespace) -> list[tuple[vqa.Size, int]]:
    """Picture sizes trained on and how many pictures of each."""
    if args.model != "tiny-qwen2-vl":
        return [(IMAGE, args.pictures)]
    other = args.pictures // 10
    return [(IMAGE, args.pictures), ((64, 96), other), ((96, 64), other)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(MODELS), required=True)
    parser.add_argument("--look-steps", type=int, default=600, help="steps of the tower alone")
    parser.add_argument("--easy-steps", type=int, default=1000, help="steps on easy questions")
    parser.add_argument("--easy-batch", type=int, default=24, help="pictures in a step of those")
    parser.add_argument("--steps", type=int, default=0, help="steps of the whole model, plain")
    parser.add_argument("--batch", type=int, default=64, help="pictures in a step")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate of it")
    parser.add_argument("--heal-steps", type=int, default=600, help="steps after the rescaling")
    parser.add_argument("--heal-rate", type=float, default=5e-4, help="learning rate of them")
    parser.add_argument("--start", type=Path, help="folder of a model whose language model to take")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model to write")
    parser.add_argument("--scratch", type=Path, default=Path("build/tiny-vlm"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=32000)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    (args.scratch / f"{args.model}.rendezvous").unlink(missing_ok=True)
    data = args.scratch / "data"
    for size, count in sizes_of(args):
        cached_pictures(data, "train", 0, count, size, 8, args.workers)
    cached_pictures(data, "evaluation", 0, 2048, IMAGE, 1, args.workers)
    cached_pictures(data, "calibration", 0, 512, IMAGE, 1, args.workers)
    torch.multiprocessing.spawn(work, args=(args,), nprocs=args.workers)


if __name__ == "__main__":
    main()
