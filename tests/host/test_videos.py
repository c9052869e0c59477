"""Videos: where frames come from, which are taken, and what is refused with a clear error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner

from mqc import api
from mqc.calib.dataset import load_dataset
from mqc.cli import app
from mqc.errors import UsageError
from mqc.host import generate_batch, messages_from
from mqc.host.videos import Video, open_video
from mqc.testing.families.videos import noise

FRAMES = [noise(index, 12, 16) for index in range(11)]


def part(source: Any, **more: Any) -> dict[str, Any]:
    return {"type": "video", "video": source, **more}


def pixels(video: Video) -> list[bytes]:
    return [frame.tobytes() for frame in video.frames()]


def animation(path: Path, frames: list[Image.Image] = FRAMES, **options: Any) -> Path:
    first, *rest = (frame.copy() for frame in frames)  # Pillow leaves options of a format in them
    first.save(path, save_all=True, append_images=rest, **options)
    return path


def test_lists_arrays_and_folders_are_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, frame in enumerate(FRAMES):
        frame.save(folder / f"f{index}.png")  # f10 is the last, not the third
    (folder / "notes.txt").write_text("no frame")
    expected = [frame.tobytes() for frame in FRAMES]
    places = [f"frames/f{index}.png" for index in range(11)]
    for video in (
        open_video({"type": "video", "frames": FRAMES, "fps": 4}),
        open_video(part([np.asarray(frame) for frame in FRAMES], fps=4)),
        open_video(part(np.stack([np.asarray(frame) for frame in FRAMES]), fps=4)),
        open_video({"type": "video", "frames": places, "fps": 4}, tmp_path),
        open_video(part("frames", fps=4), tmp_path),
        open_video({"type": "video", "path": f"file://{folder}", "fps": 4}),
    ):
        assert (video.length, video.fps, video.size, video.chosen) == (11, 4.0, (16, 12), True)
        assert pixels(video) == expected
        assert video.array([3, 3, 7]).shape == (3, 12, 16, 3)
        assert open_video(part(video)) is video


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".png", {"duration": 250}),
        (".webp", {"duration": 250, "lossless": True}),
        (".tiff", {}),
    ],
)
def test_animations(tmp_path: Path, suffix: str, options: dict[str, Any]) -> None:
    path = animation(tmp_path / f"a{suffix}", **options)
    video = open_video(part(path.name, fps=2), tmp_path)
    assert pixels(video) == [frame.tobytes() for frame in FRAMES]
    some = [frame.tobytes() for frame in video.frames([2, 2, 9])]
    assert some == [FRAMES[index].tobytes() for index in (2, 2, 9)]
    if suffix == ".tiff":  # its pages have no times: they are frames that somebody chose
        assert (video.fps, video.chosen, video.rate) == (2.0, True, None)
    else:
        assert (video.fps, video.chosen, video.rate) == (4.0, False, 2.0)


def test_a_gif_has_the_times_of_its_frames(tmp_path: Path) -> None:
    shades = [Image.new("RGB", (16, 12), (20 * index, 0, 0)) for index in range(4)]
    timed = animation(tmp_path / "a.gif", shades, duration=[100, 200, 300, 400])
    assert open_video(part(timed)).fps == pytest.approx(4.0)
    assert open_video(part(animation(tmp_path / "b.gif", shades))).fps == pytest.approx(10.0)


@pytest.mark.parametrize("fps", [0, -1, "2", True, float("nan")])
def test_impossible_rates(fps: Any) -> None:
    with pytest.raises(UsageError, match="is not possible"):
        open_video({"type": "video", "frames": FRAMES, "fps": fps})


def test_what_is_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.mp4").write_bytes(b"no film")
    half = animation(tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(half[: len(half) // 2])
    uneven = [*FRAMES[:2], noise(0, 10, 16)]
    monkeypatch.setitem(sys.modules, "av", None)  # as where PyAV is not installed
    for source, cause in (
        (None, "names no frames"),
        ([], "holds no frames"),
        (np.zeros((0, 4, 4, 3), np.uint8), "holds no frames"),
        ("empty", "folder 'empty' holds no frames"),
        ([FRAMES[0], "gone.png"], "frame 1 of a list of frames: image 'gone.png' does not exist"),
        (uneven, r"differ in size: 16x12 and 16x10 \(frame 2\)"),
        ("gone.gif", "video 'gone.gif' does not exist"),
        ("half.png", "video 'half.png' cannot be read"),
        ("a.mp4", "PyAV is not installed"),
        ("https://a/b.mp4", "on the network"),
        (3, "type int"),
    ):
        with pytest.raises(UsageError, match=cause) as info:
            list(open_video(part(source), tmp_path).frames())
        assert info.value.hint


def test_files_of_other_formats(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 32, 16
        for index in range(10):
            shade = np.full((16, 32, 3), 25 * index, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        file.mux(stream.encode())
    video = open_video(part(tmp_path / "a.mp4"))
    assert (video.length, video.fps, video.size, video.chosen) == (10, 5.0, (32, 16), False)
    shades = [round(float(np.asarray(frame).mean())) for frame in video.frames([0, 4, 4, 8])]
    assert all(abs(a - b) <= 6 for a, b in zip(shades, [0, 100, 100, 200], strict=True))
    (tmp_path / "b.mp4").write_bytes(b"no film")
    with pytest.raises(UsageError, match="cannot be read"):
        open_video(part(tmp_path / "b.mp4"))


def test_a_rate_takes_frames_of_a_file_and_times_a_list(tmp_path: Path) -> None:
    """Two frames make one temporal patch: 11 frames are 6, every second one of 10 a second 3."""
    run = tiny.runnable("tiny-qwen2-vl")
    frames = [frame.resize((64, 64)) for frame in FRAMES]
    path = animation(tmp_path / "a.png", frames, duration=100)
    for video, calls in ((path, 6), (part(path, fps=5), 3), (part(path, fps=60), 6)):
        assert len(run.prompt(prompt="what ?", videos=[video]).vision_calls) == calls
    assert len(run.prompt(prompt="what ?", videos=[part(frames, fps=5)]).vision_calls) == 6


@pytest.mark.parametrize("name", ["tiny-qwen2-vl", "tiny-internvl"])
def test_generation(name: str) -> None:
    """Video, image and text of one batch, on either side of the padding, in chunks or not."""
    run = tiny.runnable(name)
    film, still = part([frame.resize((64, 64)) for frame in FRAMES[:3]]), FRAMES[4].resize((64, 64))
    mixed = [film, {"type": "image", "image": still}, {"type": "text", "text": "and"}, film]
    chats = [
        messages_from("what ?", videos=[film]),
        messages_from("how many ?"),
        [{"role": "user", "content": [*mixed, {"type": "text", "text": "read row 1 ."}]}],
    ]
    prompts = [run.prompt(chat) for chat in chats]
    alone = [generate_batch(run.engine, [one], max_new_tokens=4, stop=())[0] for one in prompts]
    for padding, chunk in (("right", None), ("left", 11)):
        results = generate_batch(
            run.engine, prompts, max_new_tokens=4, stop=(), padding=padding, chunk=chunk
        )
        assert [one.tokens for one in results] == [one.tokens for one in alone]
    rows = [sum(run.engine.vision(call).shape[0] for call in p.vision_calls) for p in prompts]
    assert rows == [int(prompt.visual_mask.sum()) for prompt in prompts]
    assert (
        run.generate(chats[0], max_new_tokens=4).text
        == run.generate(prompt="what ?", videos=film["video"] and [film], max_new_tokens=4).text
    )


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``mqc run`` shows a file and a folder; ``--fps`` is the rate of the one to take, of the other
    to tell."""
    run = tiny.runnable("tiny-qwen2-vl")
    frames = [frame.resize((64, 64)) for frame in FRAMES[:4]]
    path, folder = animation(tmp_path / "a.png", frames, duration=250), tmp_path / "frames"
    folder.mkdir()
    for index in range(2):
        frames[2 * index].save(folder / f"{index}.png")
    monkeypatch.setattr(api, "load", lambda artifact, **options: run)
    given = ["run", str(tmp_path), "--prompt", "what ?", "--fps", "2", "--max-new-tokens", "2"]
    for videos in ([path], [folder], [path, folder]):
        named = [word for video in videos for word in ("--video", str(video))]
        result = CliRunner().invoke(app, [*given, *named, "--json"])
        assert result.exit_code == 0, result.output
        parts = [part(video, fps=2) for video in videos]
        wanted = run.generate(prompt="what ?", videos=parts, max_new_tokens=2)
        answer = json.loads(result.stdout)
        assert (answer["text"], answer["prompt_tokens"]) == (wanted.text, wanted.prompt_tokens)
    result = CliRunner().invoke(app, [*given, "--video", str(tmp_path / "gone.gif")])
    assert result.exit_code != 0


def test_who_takes_no_video() -> None:
    film = part(FRAMES[:2])
    with pytest.raises(UsageError, match="models of type 'llava' take no videos"):
        tiny.runnable("tiny-llava").prompt(prompt="what ?", videos=[film])
    run = tiny.runnable("tiny-qwen2-vl")
    with pytest.raises(UsageError, match="videos go into the messages"):
        run.prompt(messages_from("a"), videos=[film])
    with pytest.raises(UsageError, match="video placeholders"):
        run.prompt(prompt="what is <|video_pad|> ?", videos=[film])
    template = run.processor.hf.chat_template
    run.processor.hf.chat_template = template.replace("'video'", "'film'")
    try:
        with pytest.raises(UsageError, match="chat template has no place for videos"):
            run.prompt(prompt="what ?", videos=[film])
    finally:
        run.processor.hf.chat_template = template


def test_rows_of_a_data_set(tmp_path: Path) -> None:
    animation(tmp_path / "a.png", FRAMES[:3], duration=500)
    places = []
    for index in range(3):
        FRAMES[index].save(tmp_path / f"{index}.webp", lossless=True)
        places.append(f"{index}.webp")
    rows = [
        part("a.png"),
        part([frame.copy() for frame in FRAMES[:3]], fps=2),
        {"type": "video", "frames": places, "fps": 2},
        part(FRAMES[:3], fps=4),
        part(FRAMES[1:3], fps=2),
    ]
    lines = [
        [{"role": "user", "content": [row, {"type": "text", "text": "what ?"}]}] for row in rows
    ]
    data = load_dataset([{"messages": line, "answer": "red"} for line in lines])
    for row in data:
        object.__setattr__(row, "base", tmp_path)
    hashes = [row.sha256 for row in data]
    assert hashes[0] == hashes[1] == hashes[2] and len(set(hashes)) == 3
    run = tiny.runnable("tiny-internvl")
    items = [run.eval_item(row.loaded(), str(row.answer)) for row in data]
    assert [int(item.prompt.visual_mask.sum()) for item in items] == [48, 48, 48, 48, 32]
    assert torch.equal(items[1].prompt.input_ids, items[2].prompt.input_ids)
