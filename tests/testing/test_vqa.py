"""The generated task, and the embedded models on it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mqc.models import EMBEDDED, embedded_model_path
from mqc.testing import vqa

SPLITS: tuple[vqa.Split, ...] = ("train", "calibration", "evaluation")


def fingerprint(sample: vqa.Sample) -> str:
    return hashlib.sha256(sample.image.tobytes() + sample.question.encode()).hexdigest()


def test_samples_follow_from_split_and_index() -> None:
    for index in (0, 7, 12345):
        first, again = vqa.sample("train", index), vqa.sample("train", index)
        assert fingerprint(first) == fingerprint(again)
        assert first.answer == again.answer


def test_known_sample() -> None:
    """The stream of samples must not change: recorded accuracies refer to it."""
    sample = vqa.sample("evaluation", 0)
    assert (sample.question, sample.answer) == ("what character is at row 2 column 2 ?", "R")
    assert sample.image.size == (64, 64)
    assert sample.image.mode == "RGB"


def test_splits_are_disjoint() -> None:
    seen = [fingerprint(vqa.sample(split, index)) for split in SPLITS for index in range(300)]
    assert len(set(seen)) == len(seen)
    pictures = {vqa.sample(split, i).image.tobytes() for split in SPLITS for i in range(100)}
    assert len(pictures) == 300


def test_picture_sizes() -> None:
    image = vqa.sample("train", 0, (64, 96)).image
    assert image.size == (96, 64)
    scene = vqa.scene(vqa.generator("train", 1), (96, 64))
    assert (scene.rows, scene.columns) == (6, 4)
    assert scene.pixels.shape == (96, 64, 3)
    assert scene.pixels.dtype == np.uint8


def test_things_are_drawn_where_the_scene_says() -> None:
    """The strongest colour of a cell's middle is its thing's, and empty cells are dark."""
    for index in range(40):
        scene = vqa.scene(vqa.generator("train", index))
        for row, cells in enumerate(scene.cells):
            for column, thing in enumerate(cells):
                window = scene.pixels[
                    row * vqa.CELL + 2 : (row + 1) * vqa.CELL - 2,
                    column * vqa.CELL + 2 : (column + 1) * vqa.CELL - 2,
                ].astype(float)
                if thing is None:
                    assert np.median(window) < 110
                    continue
                pixels = window.reshape(-1, 3)
                bright = pixels[np.argsort(pixels.max(1))[-12:]].mean(0)
                hues = np.array(list(vqa.COLOURS.values()), float)
                distance = (bright / bright.max() - hues / hues.max(1, keepdims=True)) ** 2
                assert list(vqa.COLOURS)[int(distance.sum(1).argmin())] == thing.colour


def check_answer(scene: vqa.Scene, question: str, answer: str) -> None:
    """Work the answer out again from the words of the question."""
    words = question.removesuffix(" ?").removesuffix(" .").split()
    spoken = [[thing.words if thing else "" for thing in cells] for cells in scene.cells]

    def line(axis: str, number: str) -> list[list[str]]:
        at = int(number) - 1
        found = spoken[at] if axis == "row" else [cells[at] for cells in spoken]
        return [text.split() for text in found if text]

    match words:
        case ["what", "is", "at", "row", row, "column", column]:
            expected = spoken[int(row) - 1][int(column) - 1] or "nothing"
        case ["what", "character", "is", "at", "row", row, "column", column]:
            expected = spoken[int(row) - 1][int(column) - 1].split()[1]
            assert len(expected) == 1
        case ["what", "colour", "is", "row", row, "column", column]:
            expected = spoken[int(row) - 1][int(column) - 1].split()[0]
        case ["how", "many", "characters", "at", axis, number]:
            expected = str(sum(len(name) == 1 for _, name in line(axis, number)))
        case ["how", "many", colour, "things", "at", axis, number]:
            expected = str(sum(other == colour for other, _ in line(axis, number)))
        case ["read", axis, number]:
            names = [name for _, name in line(axis, number) if len(name) == 1]
            expected = " ".join(names) or "nothing"
        case _:
            raise AssertionError(question)
    assert answer == expected, question


def test_answers() -> None:
    kinds: Counter[str] = Counter()
    for index in range(200):
        rng = vqa.generator("train", index, questions=True)
        scene = vqa.scene(vqa.generator("train", index))
        for _ in range(5):
            question, answer = vqa.ask(scene, rng)
            check_answer(scene, question, answer)
            kinds[" ".join(question.split()[:2])] += 1
            assert 1 <= len(answer.split()) <= 5
    assert len(kinds) >= 6


def test_messages() -> None:
    sample = vqa.sample("calibration", 4)
    (message,) = vqa.messages(sample)
    assert message["role"] == "user"
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert message["content"][1]["text"] == sample.question


# --- the embedded models ---


def test_unknown_model() -> None:
    with pytest.raises(KeyError, match="tiny-llava"):
        embedded_model_path("no-such-model")


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_folder(name: str) -> None:
    folder = embedded_model_path(name)
    expected = {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert expected <= {path.name for path in folder.iterdir()}
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8 * 2**20


@cache
def load_processor(folder: Path) -> Any:
    """The family's processor without its video part, from the folder's files."""
    from transformers import (
        AutoImageProcessor,
        AutoTokenizer,
        InternVLProcessor,
        LlavaProcessor,
        Qwen2VLProcessor,
    )

    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    wanted = settings.pop("processor_class")
    families = (InternVLProcessor, LlavaProcessor, Qwen2VLProcessor)
    (family,) = (kind for kind in families if kind.__name__ == wanted)

    class ImageOnly(family):  # type: ignore[misc, valid-type]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    return ImageOnly(
        image_processor=AutoImageProcessor.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        chat_template=(folder / "chat_template.jinja").read_text(encoding="utf-8"),
        **settings,
    )


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_answers_are_one_to_five_tokens(name: str) -> None:
    tokenizer = load_processor(embedded_model_path(name)).tokenizer
    for index in range(200):
        answer = vqa.sample("evaluation", index).answer
        ids = tokenizer.encode(answer, add_special_tokens=False)
        assert 1 <= len(ids) <= 5
        assert tokenizer.decode(ids) == answer
    strange = "Zürich, 東京 and <other> things!"
    assert tokenizer.decode(tokenizer.encode(strange, add_special_tokens=False)) == strange


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_embedded_model_answers(name: str) -> None:
    """Opened by the auto class in float32, teacher-forced, the end token included."""
    import torch
    from transformers import AutoModelForImageTextToText

    folder = embedded_model_path(name)
    processor = load_processor(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    eos = processor.tokenizer.eos_token
    right = 0
    count = 64
    for index in range(count):
        sample = vqa.sample("evaluation", index)
        prompt = processor.apply_chat_template(
            vqa.messages(sample), add_generation_prompt=True, tokenize=False
        )
        inputs = processor(
            images=[sample.image], text=[prompt + sample.answer + eos], return_tensors="pt"
        )
        answer = processor.tokenizer.encode(sample.answer + eos, add_special_tokens=False)
        with torch.no_grad():
            logits = model(**inputs).logits[0, -len(answer) - 1 : -1]
        right += logits.argmax(-1).tolist() == answer
    assert right >= 0.9 * count


@pytest.mark.parametrize("name", sorted(EMBEDDED))
def test_embedded_model_generates(name: str) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    folder = embedded_model_path(name)
    processor = load_processor(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    right = 0
    for index in range(8):
        sample = vqa.sample("evaluation", index)
        prompt = processor.apply_chat_template(
            vqa.messages(sample), add_generation_prompt=True, tokenize=False
        )
        inputs = processor(images=[sample.image], text=[prompt], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        ids = out[0, inputs["input_ids"].shape[1] :]
        right += processor.tokenizer.decode(ids, skip_special_tokens=True) == sample.answer
    assert right >= 6
