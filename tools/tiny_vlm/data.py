"""Pictures and prompts of the generated task, as tensors."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from mqc.testing import vqa
from tiny_vlm.architectures import IMAGE
from tiny_vlm.forward import Layout

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
