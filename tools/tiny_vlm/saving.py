"""Model folders in the Hugging Face layout, and their cards."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)

from tiny_vlm.architectures import PATCH


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
