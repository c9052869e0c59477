"""Pictures as users give them, opened to RGB with errors that name the picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mqc.errors import UsageError

ImageLike = str | Path | Image.Image | np.ndarray


def open_image(source: Any, base: Path | None = None) -> Image.Image:
    """An RGB picture from a path, a PIL image, encoded bytes or a uint8 array [h, w(, 3)].

    Relative paths are taken from ``base``. Orientation tags are applied, transparency is dropped.
    Raises :class:`UsageError` for anything that is not a readable picture.
    """
    name = _name(source)
    try:
        image = _open(source, base)
        return ImageOps.exif_transpose(image).convert("RGB")
    except UsageError:
        raise
    except FileNotFoundError as error:
        raise UsageError(f"image {name} does not exist", hint="check the path") from error
    except UnidentifiedImageError as error:
        raise UsageError(
            f"image {name} is not in a format that Pillow reads", hint="give a PNG or JPEG file"
        ) from error
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"image {name} cannot be read: {error}", hint="check that the file is complete"
        ) from error


def _open(source: Any, base: Path | None) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
    if isinstance(source, (str, Path)):
        text = str(source)
        if text.startswith(("http://", "https://")):
            raise UsageError(
                f"image {text} is on the network; mqc reads local files only",
                hint="download it and give its path",
            )
        path = Path(text.removeprefix("file://")).expanduser()
        if path.is_dir():
            raise UsageError(f"image {text} is a folder", hint="give the path of one picture")
        return Image.open(path if base is None else base / path)
    raise UsageError(
        f"an image of type {type(source).__name__} is not supported",
        hint="give a path, a PIL image, bytes or a uint8 array",
    )


def _name(source: Any) -> str:
    if isinstance(source, (str, Path)):
        return repr(str(source))
    return f"of type {type(source).__name__}"
