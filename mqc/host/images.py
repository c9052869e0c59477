"""Pictures as users give them, opened to RGB with errors that name the picture."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mqc.errors import UsageError

ImageLike = str | Path | Image.Image | np.ndarray


def open_image(source: Any, base: Path | None = None) -> Image.Image:
    """An RGB picture from a path, a PIL image, encoded bytes or a uint8 array [h, w(, 3)].

    Relative paths are taken from ``base``. Orientation tags are applied, transparency is dropped,
    16-bit greys become 8-bit ones. Raises :class:`UsageError` for anything that is not a readable
    picture.
    """
    name = _name(source)
    try:
        with warnings.catch_warnings():  # Pillow's own limit is an error, at twice the size
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = _open(source, base)
            return _eight_bits(ImageOps.exif_transpose(image), name).convert("RGB")
    except UsageError:
        raise
    except FileNotFoundError as error:
        raise UsageError(
            f"image {name} does not exist",
            hint="check the path" if base is None else f"relative paths start at {base}",
        ) from error
    except UnidentifiedImageError as error:
        raise UsageError(
            f"image {name} is not in a format that Pillow reads", hint="give a PNG or JPEG file"
        ) from error
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise UsageError(
            f"image {name} cannot be read: {error}", hint="check that the file is complete"
        ) from error


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """Greys of 16 bits scaled to 8; Pillow's ``convert`` would make all above 255 white."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise UsageError(
            f"image {name} holds floats or 32-bit values, of no range that is known",
            hint="scale them to 0..255 and save the picture with 8 bits a channel",
        )
    return Image.fromarray((values.astype(np.float32) / 257 + 0.5).astype(np.uint8))


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
