"""A generated visual question answering task.

A scene is a grid of cells on a dark, noisy ground. A cell is empty or holds one coloured thing, a
shape (circle, square, ...) or a character; things are moved, scaled and rotated a little. Questions
ask what stands at a position, for a colour, a character, the characters of a row or column, or a
count; the answers are one to five words or characters.

Everything follows from the split and an index: sample ``i`` of a split is the same on every
machine, and no two splits share a random stream. Shapes and characters are drawn here from formulas
and a small bitmap table, so the pictures depend on no font and no drawing library.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Split = Literal["train", "calibration", "evaluation"]
Size = int | tuple[int, int]

SPLITS: tuple[Split, ...] = ("train", "calibration", "evaluation")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 50, 50),
    "green": (50, 200, 70),
    "blue": (70, 110, 250),
    "yellow": (235, 220, 60),
    "purple": (190, 70, 220),
    "white": (235, 235, 235),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross", "ring", "diamond")
NOTHING = "nothing"

# Seven rows of five pixels a character, one row per two hexadecimal digits.
_GLYPHS = {
    "A": "0e11111f111111",
    "C": "0e11101010110e",
    "E": "1f10101e10101f",
    "F": "1f10101e101010",
    "H": "1111111f111111",
    "J": "0702020202120c",
    "K": "11121418141211",
    "L": "1010101010101f",
    "P": "1e11111e101010",
    "R": "1e11111e141211",
    "T": "1f040404040404",
    "U": "1111111111110e",
    "X": "11110a040a1111",
    "Y": "11110a04040404",
    "2": "0e11010204081f",
    "3": "1f02040201110e",
    "4": "02060a121f0202",
    "5": "1f101e0101110e",
    "6": "0608101e11110e",
    "7": "1f010204080808",
}
CHARACTERS: tuple[str, ...] = tuple(_GLYPHS)
_BITMAPS = {
    character: np.array(
        [[row >> (4 - column) & 1 for column in range(5)] for row in bytes.fromhex(rows)],
        dtype=np.float32,
    )
    for character, rows in _GLYPHS.items()
}
_SUPERSAMPLING = 3
CELL = 16
"""Width and height of a cell in pixels."""


@dataclass(frozen=True)
class Thing:
    """What one cell holds: a shape's name or a character, and its colour's name."""

    name: str
    colour: str

    @property
    def is_character(self) -> bool:
        """Whether the thing is a character rather than a shape."""
        return self.name in _BITMAPS

    @property
    def words(self) -> str:
        """The thing in words: its colour, then its name."""
        return f"{self.colour} {self.name}"


@dataclass(frozen=True)
class Scene:
    """A grid of things (``cells[row][column]``; ``None`` where empty) and its picture.

    ``pixels`` has shape (height, width, 3) and type uint8.
    """

    cells: tuple[tuple[Thing | None, ...], ...]
    pixels: NDArray[np.uint8]

    @property
    def rows(self) -> int:
        """Number of rows of cells."""
        return len(self.cells)

    @property
    def columns(self) -> int:
        """Number of columns of cells."""
        return len(self.cells[0])


@dataclass(frozen=True)
class Sample:
    """One picture (RGB), a question about it and the answer."""

    image: Image.Image
    question: str
    answer: str


def generator(split: Split, index: int, questions: bool = False) -> np.random.Generator:
    """The random generator of a sample's scene or of its questions: two streams of their own."""
    seed = np.random.SeedSequence([SPLITS.index(split), index, *([1] if questions else [])])
    return np.random.Generator(np.random.PCG64(seed))


def _shape_mask(name: str, u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where the points (u right, v down; the thing reaches to about -1..1) lie in a shape."""
    a, b = np.abs(u), np.abs(v)
    mask: NDArray[np.bool_]
    match name:
        case "circle":
            mask = u * u + v * v < 0.81
        case "square":
            mask = np.maximum(a, b) < 0.76
        case "triangle":
            mask = (v < 0.75) & (a * 1.7 < v + 0.95)
        case "cross":
            mask = (np.minimum(a, b) < 0.27) & (np.maximum(a, b) < 0.95)
        case "ring":
            mask = np.abs(np.sqrt(u * u + v * v) - 0.72) < 0.2
        case "diamond":
            mask = a * 1.25 + b < 1.0
        case _:
            raise KeyError(name)
    return mask


def _character_mask(name: str, u: NDArray[np.float32], v: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where the points lie in a character's bitmap, stretched to 1.5 wide and 2 high."""
    column = np.floor((u / 1.5 + 0.5) * 5).astype(np.int64)
    row = np.floor((v / 2 + 0.5) * 7).astype(np.int64)
    inside = (column >= 0) & (column < 5) & (row >= 0) & (row < 7)
    mask: NDArray[np.bool_] = inside & (_BITMAPS[name][row.clip(0, 6), column.clip(0, 4)] > 0)
    return mask


def _draw(pixels: NDArray[np.float32], row: int, column: int, grid: tuple[int, int], thing: Thing,
          rng: np.random.Generator) -> None:  # fmt: skip
    """Draw a thing into its cell of a (height, width, 3) float picture, in place."""
    high, wide = pixels.shape[0] / grid[0], pixels.shape[1] / grid[1]
    half = min(high, wide) * rng.uniform(0.36, 0.44)
    slack = np.array([high, wide]) / 2 - half
    middle = (np.array([row, column]) + 0.5) * (high, wide) + rng.uniform(-0.8, 0.8, 2) * slack
    angle = rng.uniform(-0.4, 0.4)
    colour = np.array(COLOURS[thing.colour]) + rng.uniform(-20, 20, 3)
    low = np.maximum(np.floor(middle - 1.3 * half).astype(int), 0)
    top = np.minimum(np.ceil(middle + 1.3 * half).astype(int), pixels.shape[:2])
    count = (top - low) * _SUPERSAMPLING
    y = (low[0] + (np.arange(count[0]) + 0.5) / _SUPERSAMPLING - middle[0]) / half
    x = (low[1] + (np.arange(count[1]) + 0.5) / _SUPERSAMPLING - middle[1]) / half
    cosine, sine = np.cos(angle), np.sin(angle)
    u = (x[None, :] * cosine + y[:, None] * sine).astype(np.float32)
    v = (y[:, None] * cosine - x[None, :] * sine).astype(np.float32)
    mask = (_character_mask if thing.is_character else _shape_mask)(thing.name, u, v)
    parts = mask.reshape(top[0] - low[0], _SUPERSAMPLING, top[1] - low[1], _SUPERSAMPLING)
    cover = parts.mean(axis=(1, 3), dtype=np.float32)[:, :, None]
    window = pixels[low[0] : top[0], low[1] : top[1]]
    window += cover * (colour.astype(np.float32) - window)


def things(rng: np.random.Generator, grid: tuple[int, int]) -> list[Thing | None]:
    """What the cells of a random scene hold, in reading order: the first that ``scene`` draws."""
    kinds = rng.choice(3, size=grid, p=(0.25, 0.33, 0.42)).flat
    shapes = rng.integers(len(SHAPES), size=grid).flat
    characters = rng.integers(len(CHARACTERS), size=grid).flat
    colours = rng.integers(len(COLOURS), size=grid).flat
    names = tuple(COLOURS)
    found: list[Thing | None] = []
    for kind, shape, character, colour in zip(kinds, shapes, characters, colours, strict=True):
        name = SHAPES[shape] if kind == 1 else CHARACTERS[character]
        found.append(Thing(name, names[colour]) if kind else None)
    return found


def scene(rng: np.random.Generator, image_size: Size = 64) -> Scene:
    """A random scene.

    ``image_size`` is the side of a square or (height, width). Cells are 16 pixels wide and high, so
    64 pixels make four rows and four columns.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    grid = (max(2, height // CELL), max(2, width // CELL))
    cells = things(rng, grid)
    pixels = np.empty((height, width, 3), np.float32)
    pixels[:] = rng.uniform(0, 50, 3)
    for place, thing in enumerate(cells):
        if thing is not None:
            _draw(pixels, place // grid[1], place % grid[1], grid, thing, rng)
    noise = rng.standard_normal((height, width, 3), dtype=np.float32)
    pixels += noise * np.float32(rng.uniform(4, 16))
    rows = tuple(tuple(cells[at : at + grid[1]]) for at in range(0, len(cells), grid[1]))
    return Scene(rows, pixels.round().clip(0, 255).astype(np.uint8))


def ask(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A random question about a scene, and its answer. Rows and columns count from one."""
    kind = int(rng.integers(6))
    row, column = int(rng.integers(scene.rows)), int(rng.integers(scene.columns))
    if kind < 3:  # what stands at a position
        thing = scene.cells[row][column]
        place = f"row {row + 1} column {column + 1} ?"
        if thing is not None and kind == 1:
            return f"what colour is {place}", thing.colour
        if thing is not None and kind == 2 and thing.is_character:
            return f"what character is at {place}", thing.name
        return f"what is at {place}", NOTHING if thing is None else thing.words
    if rng.integers(2):
        line, found = f"row {row + 1}", scene.cells[row]
    else:
        line, found = f"column {column + 1}", tuple(cells[column] for cells in scene.cells)
    things = [thing for thing in found if thing is not None]
    if kind < 5:  # a line of characters
        return f"read {line} .", " ".join(t.name for t in things if t.is_character) or NOTHING
    if rng.integers(2):  # a count
        return f"how many characters at {line} ?", str(sum(t.is_character for t in things))
    colour = tuple(COLOURS)[rng.integers(len(COLOURS))]
    return f"how many {colour} things at {line} ?", str(sum(t.colour == colour for t in things))


def sample(split: Split, index: int, image_size: Size = 64) -> Sample:
    """Sample ``index`` of a split: one picture and one question about it."""
    picture = scene(generator(split, index), image_size)
    question, answer = ask(picture, generator(split, index, questions=True))
    return Sample(Image.fromarray(picture.pixels), question, answer)


def messages(sample: Sample) -> list[dict[str, Any]]:
    """The sample's picture and question as chat messages of the transformers form."""
    content = [
        {"type": "image", "image": sample.image},
        {"type": "text", "text": sample.question},
    ]
    return [{"role": "user", "content": content}]
