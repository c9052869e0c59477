"""Videos as users give them: frames in a list or a folder, animations, and files PyAV decodes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from mqc.errors import UsageError
from mqc.host.images import ImageLike, open_image

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
"""Suffixes of the files that are frames in a folder."""

VideoLike = str | Path | np.ndarray | Sequence[ImageLike]

_FORMS = (
    'use {"type": "video", "frames": [<paths or PIL images>], "fps": 2} or '
    '{"type": "video", "video": <path>}'
)


@dataclass(frozen=True)
class Video:
    """Frames of one size, read when they are asked for.

    Attributes:
        name: what errors call it.
        length: number of frames, 1 or more.
        fps: frames a second, or None where nothing says so.
        size: (width, height) in pixels.
        read: RGB frames of given indices (ascending, repeats allowed), one after the other.
        chosen: True where the frames were picked already, and all of them are to be shown; False
            for a recording, of which a family takes the frames that it was trained on.
        rate: frames a second to take of a recording, where the user says so.
    """

    name: str
    length: int
    fps: float | None
    size: tuple[int, int]
    read: Callable[[Sequence[int]], Iterator[Image.Image]]
    chosen: bool = False
    rate: float | None = None

    def frames(self, indices: Sequence[int] | None = None) -> Iterator[Image.Image]:
        """RGB frames; all of them without ``indices``. Raises :class:`UsageError` for a frame that
        cannot be read, or that has another size than the first."""
        for place, frame in enumerate(
            self.read(range(self.length) if indices is None else indices)
        ):
            if frame.size != self.size:
                raise UsageError(
                    f"the frames of {self.name} differ in size: {self.size[0]}x{self.size[1]} and "
                    f"{frame.width}x{frame.height} (frame {place})",
                    hint="crop or resize them to one size",
                )
            yield frame

    def array(self, indices: Sequence[int]) -> np.ndarray:
        """Frames as uint8 [frames, height, width, 3]."""
        return np.stack([np.asarray(frame) for frame in self.frames(indices)])


def video_source(part: Mapping[str, Any]) -> Any:
    """What a video part of a message names as its frames; None where it names none."""
    for key in ("frames", "video", "path", "url"):
        if part.get(key) is not None:
            return part[key]
    return None


def open_video(part: Mapping[str, Any], base: Path | None = None) -> Video:
    """The video of a message part ``{"type": "video", ...}``.

    ``frames`` (or ``video``) is a list of pictures as :func:`~mqc.host.images.open_image` takes
    them, a uint8 array [frames, height, width, 3], a folder of pictures (ordered by name, numbers
    as numbers), or a file: GIF, WebP, PNG and TIFF with several pages by Pillow, all else by PyAV
    where it is installed. ``fps``: frames a second of a list or folder; of a file, how many to
    take a second. Relative paths are taken from ``base``. Files are not read before
    :meth:`Video.frames`, but for their first frame and their length.

    Raises :class:`UsageError` naming what is wrong: no frames, a frame or file that cannot be read
    or decoded, an impossible ``fps``.
    """
    fps, source = _rate(part.get("fps")), video_source(part)
    if isinstance(source, Video):
        return source
    if source is None:
        raise UsageError("a video part of a message names no frames", hint=_FORMS)
    if isinstance(source, np.ndarray) and source.ndim == 4:
        return _listed("a video array", list(source), fps, None)
    if isinstance(source, (list, tuple)):
        return _listed("a list of frames", source, fps, base)
    if not isinstance(source, (str, Path)):
        raise UsageError(f"a video of type {type(source).__name__} is not supported", hint=_FORMS)
    text = str(source)
    if text.startswith(("http://", "https://")):
        raise UsageError(
            f"video {text} is on the network; mqc reads local files only",
            hint="download it and give its path",
        )
    path = Path(text.removeprefix("file://")).expanduser()
    path = path if base is None else base / path
    if path.is_dir():
        files = [p for p in path.iterdir() if p.suffix.lower() in PICTURES]
        files = sorted((p for p in files if not p.name.startswith(".")), key=_order)
        return _listed(f"folder {text!r}", files, fps, None)
    if not path.is_file():
        raise UsageError(f"video {text!r} does not exist", hint="check the path")
    video = _recorded(path, f"video {text!r}")
    if video.fps is None:  # no times, as in a list
        return replace(video, fps=fps, chosen=True)
    return replace(video, rate=fps)


def _rate(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
        raise UsageError(f"fps {value!r} is not possible", hint="give frames a second, above 0")
    return float(value)


def _listed(name: str, sources: Sequence[Any], fps: float | None, base: Path | None) -> Video:
    if not sources:
        raise UsageError(f"{name} holds no frames", hint="give at least one picture")

    def read(indices: Sequence[int]) -> Iterator[Image.Image]:
        for index in indices:
            try:
                yield open_image(sources[index], base)
            except UsageError as error:
                raise UsageError(
                    f"frame {index} of {name}: {error.message}", hint=error.hint
                ) from error

    (first,) = read([0])
    return Video(name, len(sources), fps, first.size, read, chosen=True)


def _recorded(path: Path, name: str) -> Video:
    try:
        with Image.open(path) as animation:
            return _animation(path, name, animation)
    except UnidentifiedImageError:
        return _decoded(path, name)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(name, error) from error


def _animation(path: Path, name: str, animation: Image.Image) -> Video:
    """A file with several pages; its times are those of its pages, 100 ms where it says none."""
    count, size = int(getattr(animation, "n_frames", 1)), animation.size
    seconds = 0.0
    timed = animation.format != "TIFF"
    for page in ImageSequence.Iterator(animation) if timed else ():
        page.load()  # WebP knows the time of a page once it is read
        seconds += (float(page.info.get("duration") or 0) or 100.0) / 1000

    def read(indices: Sequence[int]) -> Iterator[Image.Image]:
        try:
            with Image.open(path) as file:
                for index in indices:
                    file.seek(index)
                    yield file.convert("RGB")
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise _unreadable(name, error) from error

    return Video(name, count, count / seconds if timed else None, size, read)


def _decoded(path: Path, name: str) -> Video:
    try:
        import av  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise UsageError(
            f"{name} is in no format that Pillow reads, and PyAV is not installed",
            hint="pip install mqc[video], or give the frames as pictures (a list, a folder, a GIF)",
        ) from None

    def read(indices: Sequence[int]) -> Iterator[Image.Image]:
        wanted = list(indices)
        try:
            with av.open(str(path)) as file:
                for index, frame in enumerate(file.decode(video=0)):
                    while wanted and wanted[0] == index:
                        yield frame.to_image()
                        wanted.pop(0)
                    if not wanted:
                        return
        except (av.FFmpegError, OSError, ValueError, IndexError) as error:
            raise _unreadable(name, error) from error
        raise UsageError(f"{name} ends before frame {wanted[0]}", hint="the file is incomplete")

    try:
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            rate = stream.average_rate
            # Containers may not say how many frames they hold, or say it wrongly.
            length = sum(1 for _ in file.decode(stream))
            size = (stream.codec_context.width, stream.codec_context.height)
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise _unreadable(name, error) from error
    if not length:
        raise UsageError(f"{name} holds no frames", hint="check that the file is complete")
    return Video(name, length, float(rate) if rate else None, size, read)


def _unreadable(name: str, error: Exception) -> UsageError:
    return UsageError(f"{name} cannot be read: {error}", hint="check that the file is complete")


def _order(path: Path) -> list[Any]:
    """Names in the order that people count in: 2 before 10."""
    return [(int(t), "") if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", path.name)]
