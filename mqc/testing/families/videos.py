"""A family's prompts with videos, made by the road that users take, and transformers' answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.smolvlm import processing_smolvlm

from mqc.capture import Adapter, adapter_for, load_processor
from mqc.host import Engine, Prompt, build_prompt, make_batch, merge
from mqc.host.batch import KeyTable
from mqc.testing.families import FAMILIES
from mqc.testing.families.chats import CHATS, save_chat

Content = list[dict[str, Any]]


@dataclass(frozen=True)
class Sample:
    """A prompt and the tensors that the family's processor gave for it."""

    prompt: Prompt
    tensors: dict[str, torch.Tensor]


class _Recorder:
    """A processor that keeps what it gave last."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.last: Mapping[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, **inputs: Any) -> Mapping[str, Any]:
        self.last = self.processor(**inputs)
        return self.last


def noise(seed: int, height: int = 20, width: int = 28) -> Image.Image:
    """A picture of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def film(frames: int, seed: int = 0, fps: float | None = 2.0, **size: int) -> dict[str, Any]:
    """A message part: a video of random frames."""
    pictures = [noise(100 * seed + index, **size) for index in range(frames)]
    return {"type": "video", "frames": pictures, "fps": fps}


def text(words: str) -> dict[str, Any]:
    """A message part of text."""
    return {"type": "text", "text": words}


def contents(name: str) -> list[Content]:
    """What the family's prompts of the table hold: videos of an even and an odd number of frames,
    of one frame, two in a prompt, and, where the family takes both, images among them."""
    still = {"type": "image", "image": noise(7)}
    chats = [
        [film(4), text("what ?")],
        [text("see"), film(3, 1, height=28, width=16), text("and say")],
        [film(1, 2), text("how ?")],
        [film(2, 3), text("or"), film(2, 4, fps=1.0), text("which ?")],
    ]
    if _adapter(name).mixes_media:
        chats.append([text("a"), film(3, 5), text("b"), still, text("c"), film(3, 6), text("d")])
    return chats


def video_samples(
    name: str, chats: Sequence[Content] | None = None, wide: bool = False
) -> list[Sample]:
    """Prompts of family ``name``, each with one user message of ``chats`` (:func:`contents`).

    ``wide`` makes their tensors in float64 (:class:`Widened`).
    """
    if processing_smolvlm.num2words is None:  # not installed: digits do for any words
        processing_smolvlm.num2words = str
    with TemporaryDirectory() as place:
        folder = save_chat(name, Path(place))
        recorder, adapter = _Recorder(load_processor(folder).hf), adapter_for(folder)
    samples = []
    for content in contents(name) if chats is None else chats:
        with Widened() if wide else nullcontext():
            prompt = build_prompt([{"role": "user", "content": content}], recorder, adapter)
        tensors = {key: torch.as_tensor(value) for key, value in recorder.last.items()}
        samples.append(Sample(prompt, tensors))
    return samples


def takes_videos(name: str) -> bool:
    """Whether the prompts of family ``name`` may hold videos."""
    return name in CHATS


@torch.inference_mode()
def exact_logits(engine: Engine, prompt: Prompt) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one prompt in the engine's own dtype, in one call."""
    batch = make_batch([prompt])
    mask = KeyTable(1, engine.facts.get("attention_windows", (None,))).mask(
        batch.valid, batch.blocks
    )
    rows = torch.arange(len(prompt))[None]
    embeds = merge(engine, [prompt], batch)
    cache = engine.empty_cache(1)
    logits, _ = engine.decoder(embeds, batch.position_ids, mask, rows, batch.visual_mask, cache)
    return logits[0]


class Widened(TorchDispatchMode):
    """Casts to float32 give float64: models compute norms and rotary angles in float32 at least,
    which bounds what a float64 comparison can tell; without these casts it tells rounding apart
    from mistakes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.float32:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@torch.no_grad()
def own_logits(model: Any, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Logits [tokens, vocabulary] of transformers' own model for what its processor gave, in
    float64 throughout; ``model`` is float64.

    A model that takes images and videos of one prompt for one another gets the prompt's
    embeddings, put together from its own features.
    """
    inputs = {
        key: value.to(model.dtype) if value.is_floating_point() else value
        for key, value in tensors.items()
    }
    with Widened():
        if _shares_token(model.config, inputs):
            inputs = _embedded(model.model, inputs)
        logits: torch.Tensor = model(**inputs).logits[0]
    return logits


def _shares_token(config: Any, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether one token stands for the rows of images and of videos, and both are there."""
    kinds = inputs.get("mm_token_type_ids")
    if kinds is None or len(kinds.unique()) < 3:
        return False
    return bool((inputs["input_ids"][kinds > 0] == config.image_token_id).all())


def _embedded(base: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ids, kinds = inputs["input_ids"], inputs["mm_token_type_ids"]
    embeds = base.get_input_embeddings()(ids)
    image = base.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    video = base.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    embeds[kinds == 1] = torch.cat(image.pooler_output)
    embeds[kinds == 2] = torch.cat(video.pooler_output)
    grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw")}
    positions, _ = base.get_rope_index(ids, mm_token_type_ids=kinds, **grids)
    return {"inputs_embeds": embeds, "position_ids": positions}


def _adapter(name: str) -> Adapter:
    return adapter_for(FAMILIES[name].config())
