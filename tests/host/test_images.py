"""Pictures of every mode become what a viewer shows, in RGB; others are refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mqc.errors import UsageError
from mqc.host.images import open_image

RAMP = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)


def pixels(source: Path | Image.Image) -> np.ndarray:
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)[..., 0]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "CMYK", "I;16", "I"])
def test_every_mode_shows_the_same_picture(mode: str, tmp_path: Path) -> None:
    if mode in ("I;16", "I"):
        wide = RAMP.astype(np.uint16 if mode == "I;16" else np.int32) * 257
        image = Image.fromarray(wide)
        assert image.mode == mode
    else:
        image = Image.fromarray(RAMP).convert("RGB")
        image = image.quantize(256) if mode == "P" else image.convert(mode)
    path = tmp_path / f"picture.{'tif' if mode in ('CMYK', 'I') else 'png'}"
    image.save(path)
    assert (pixels(path) == RAMP).all()


def test_values_of_no_known_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "f.tif")
    with pytest.raises(UsageError, match=r"f\.tif' holds floats") as info:
        open_image(tmp_path / "f.tif")
    assert "8 bits" in str(info.value.hint)
    with pytest.raises(UsageError, match="32-bit"):
        open_image(Image.fromarray(np.full((2, 2), 70_000, np.int32)))


def test_orientation_tags_are_applied(tmp_path: Path) -> None:
    tag = Image.Exif()
    tag[0x0112] = 6  # turn by 90 degrees to the right
    Image.fromarray(RAMP[:4]).save(tmp_path / "turned.png", exif=tag)
    assert (pixels(tmp_path / "turned.png") == np.rot90(RAMP[:4], -1)).all()


def test_a_large_picture_brings_no_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", RAMP.size - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(tmp_path / "large.png").shape == (8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", RAMP.size // 2 - 1)
    with pytest.raises(UsageError, match=r"large\.png' cannot be read"):
        open_image(tmp_path / "large.png")


@pytest.mark.parametrize("data", [b"", b"hello", None])
def test_what_is_no_picture_is_named(data: bytes | None, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(UsageError, match=r"a\.png") as info:
        open_image("a.png", tmp_path)
    assert info.value.hint
    if data is None:
        assert str(tmp_path) in str(info.value.hint)
