"""The models that are timed: Qwen2-VL-2B's shapes, four layers deep, random weights.

Everything is made once into a cache folder, each in its own subfolder, and found there later.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

LAYERS = 4
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM = 1536, 8960, 12, 2, 128
VOCABULARY = 512
"""That of the embedded model, whose tokenizer is used: the head is left out of the comparison."""
POSITIONS = 4096
VISION = {"embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14, "depth": LAYERS}
IMAGE = 448
IMAGE_PATCHES = (IMAGE // 14) ** 2
IMAGE_TOKENS = IMAGE_PATCHES // 4
QUESTION = "how many circles are there ? what is at row 1 column 2 ?"
CONTEXT, STEPS = 256, 24
"""Tokens read before decoding, and tokens written while it is timed."""
SHAPE = f"hidden {HIDDEN}, intermediate {INTERMEDIATE}, {HEADS} heads, {KV_HEADS} KV heads"


def made(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, made by ``make`` in a temporary place where it is not there."""
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(partial)
        partial.rename(folder)
    return folder


def multimodal(cache: Path) -> Path:
    """A Qwen2-VL checkpoint with the embedded model's tokenizer, in bfloat16."""

    def make(folder: Path) -> None:
        import torch
        from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

        from mqc.capture import checkpoint_folder

        tiny = checkpoint_folder("tiny-qwen2-vl")
        for path in tiny.iterdir():
            if path.suffix in (".json", ".jinja") and path.name != "config.json":
                shutil.copy(path, folder)
        preprocessor = json.loads((tiny / "preprocessor_config.json").read_text())
        pixels = IMAGE * IMAGE
        preprocessor.update(patch_size=14, size={"longest_edge": pixels, "shortest_edge": 56 * 56})
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1))
        config = json.loads((tiny / "config.json").read_text())
        text, vision = config["text_config"], config["vision_config"]
        text.update(
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            num_hidden_layers=LAYERS,
            layer_types=["full_attention"] * LAYERS,
            max_position_embeddings=POSITIONS,
            vocab_size=VOCABULARY,
        )
        text["rope_parameters"].update(mrope_section=[16, 24, 24], rope_theta=1e6)
        vision.update(VISION, hidden_size=HIDDEN)
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(**config)).to(torch.bfloat16)
        model.save_pretrained(folder)

    return made(cache / "qwen2-vl", make)


def text_only(cache: Path) -> Path:
    """Its language model alone as a Qwen2 checkpoint, for tools that read text models."""

    def make(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        source = multimodal(cache)
        config = json.loads((source / "config.json").read_text())["text_config"]
        config.update(
            architectures=["Qwen2ForCausalLM"],
            model_type="qwen2",
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            rope_theta=1e6,
            tie_word_embeddings=False,
            dtype="bfloat16",
        )
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        weights = load_file(source / "model.safetensors")
        save_file(
            {
                name.replace("model.language_model.", "model."): value
                for name, value in weights.items()
                if "visual" not in name
            },
            folder / "model.safetensors",
            {"format": "pt"},
        )
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(source / name, folder)

    return made(cache / "qwen2", make)


def picture() -> Any:
    """A 448 x 448 picture, the same every time."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (IMAGE, IMAGE, 3), np.uint8)
    return Image.fromarray(pixels)


def token_ids(count: int) -> list[int]:
    """Ids of ordinary tokens."""
    return [100 + index % 300 for index in range(count)]


def prompt_arrays(cache: Path) -> dict[str, np.ndarray[Any, Any]]:
    """:func:`processed_prompt` as arrays, without loading torch; made by ``prepare``."""

    def make(folder: Path) -> None:
        arrays = {name: value.numpy() for name, value in processed_prompt(cache).items()}
        np.savez(folder / "prompt.npz", **arrays)

    return dict(np.load(made(cache / "prompt", make) / "prompt.npz"))


def processed_prompt(cache: Path) -> dict[str, torch.Tensor]:
    """The picture and the question as the processor's tensors."""
    from mqc.capture import load_processor

    processor = load_processor(multimodal(cache))
    processor = getattr(processor, "hf", processor)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    return dict(processor(text=[text], images=[picture()], return_tensors="pt"))
