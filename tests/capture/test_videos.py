"""Video processors on torch alone: against transformers' image processors and its own classes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from mqc.capture import adapter_for, load_processor
from mqc.capture.videos import load_reader, reader_class, reader_kind
from mqc.host import build_prompt
from mqc.testing.families.chats import CHATS, save_chat
from mqc.testing.families.videos import noise

NAMES = {"qwen2_vl": "Qwen2VLVideoProcessor", "internvl": "InternVLVideoProcessor"}


def clip(frames: int, height: int = 60, width: int = 90) -> np.ndarray:
    return np.stack([np.asarray(noise(index, height, width)) for index in range(frames)])


def upstream(model: str, monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """transformers' own class, from a module that imports torchvision and uses none of it."""
    for name in ("", ".transforms", ".transforms.v2", ".transforms.v2.functional"):
        monkeypatch.setitem(sys.modules, f"torchvision{name}", ModuleType(f"torchvision{name}"))
        parent, _, child = f"torchvision{name}".rpartition(".")
        if parent:
            monkeypatch.setattr(
                sys.modules[parent], child, sys.modules[f"torchvision{name}"], raising=False
            )
    root = Path(str(transformers.__file__)).parent
    name = f"transformers.models.{model}.video_processing_of_the_test"
    path = root / "models" / model / f"video_processing_{model}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return reader_class(getattr(module, NAMES[model]))


@pytest.mark.parametrize("model", sorted(NAMES))
def test_classes_written_here_do_what_transformers_does(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = upstream(model, monkeypatch), reader_kind(NAMES[model])
    assert ours is not None and theirs is not ours
    settings: list[dict[str, Any]] = [
        {},
        {"do_sample_frames": True, "fps": 3},
        {"do_sample_frames": True, "num_frames": 6},
    ]
    if model == "qwen2_vl":
        settings += [
            {"min_pixels": 28 * 28, "max_pixels": 28 * 84},
            {"cap_pixels_per_frame": True, "max_video_tokens": 30},
            {"do_sample_frames": True, "fps": 9, "max_frames": 8, "temporal_patch_size": 4},
        ]
    else:
        settings += [{"do_sample_frames": True, "num_frames": 4, "initial_shift": 2}]
    times = [(1, 1.0)] if model == "internvl" else []
    for options in settings:
        one, two = theirs(**options), ours(**options)
        for length, fps in ((40, 8.0), (9, 2.5), (200, 30.0), *times):
            if not options.get("do_sample_frames"):
                continue
            results = []
            for reader in (one, two):
                try:
                    results.append(reader.choose(length, fps))
                except ValueError:
                    results.append(None)
            assert results[0] == results[1]
        for shape in ((4, 60, 90), (3, 300, 40), (1, 20, 31)):
            given = {"video_metadata": [{"total_num_frames": shape[0], "fps": 2.0}]}
            given |= {"do_sample_frames": False, "return_tensors": "pt"}
            first, second = (reader([clip(*shape)], **given) for reader in (one, two))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_a_still_video_is_its_picture(name: str, tmp_path: Path) -> None:
    """Patches of two alike frames are those of the image, but for a rounding of its resizing."""
    folder = save_chat(name, tmp_path)
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        settings = json.loads((folder / file).read_text())
        settings["size"] = {"shortest_edge": 64, "longest_edge": 4096}  # neither is shrunk
        settings |= {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
        (folder / file).write_text(json.dumps(settings))
    processor, adapter = load_processor(folder), adapter_for(folder)
    picture = noise(3, 30, 44)
    video = {"type": "video", "frames": [picture, picture], "fps": 2}
    parts = [{"type": "image", "image": picture}, video]
    prompts = [build_prompt([{"role": "user", "content": [p]}], processor, adapter) for p in parts]
    still, moving = (prompt.vision_calls[0]["pixel_values"] for prompt in prompts)
    assert still.shape == moving.shape
    assert (still - moving).abs().max() <= 1.5 / 255 / 0.25


def test_resizing_is_pillows_up_to_rounding() -> None:
    kind = reader_kind("LlavaOnevisionVideoProcessor")
    assert kind is not None
    for resample, size in ((3, (24, 36)), (2, (90, 45)), (1, (31, 33)), (3, (60, 90))):
        reader = kind(size={"height": size[0], "width": size[1]}, resample=resample)
        reader.do_normalize = reader.do_rescale = False
        given = reader([clip(2)], do_sample_frames=False, return_tensors="pt")
        for frame, pixels in zip(clip(2), given["pixel_values_videos"][0], strict=True):
            wanted = Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling(resample))
            apart = np.asarray(wanted).astype(int) - pixels.permute(1, 2, 0).numpy().astype(int)
            assert np.abs(apart).max() <= 1


def test_center_crop() -> None:
    kind = reader_kind("LlavaOnevisionVideoProcessor")
    assert kind is not None
    options = {"do_resize": False, "do_center_crop": True, "do_normalize": False}
    reader = kind(crop_size={"height": 20, "width": 30}, **options)
    given = reader([clip(1)], do_rescale=False, do_sample_frames=False, return_tensors="pt")
    middle = torch.from_numpy(clip(1)[:, 20:40, 30:60]).permute(0, 3, 1, 2)
    assert torch.equal(given["pixel_values_videos"][0], middle)
    with pytest.raises(ValueError, match="smaller than the crop"):
        reader([clip(1, 10, 60)], do_sample_frames=False)


def test_which_frames_are_taken() -> None:
    """By the user's rate, by the family's rule, or all."""
    for name in ("Qwen3VLVideoProcessor", "InternVLVideoProcessor"):
        kind = reader_kind(name)
        assert kind is not None
        assert kind().choose(20, 10.0, 5.0) == list(range(0, 20, 2))
        assert kind().choose(4, 2.0, 60.0) == [0, 1, 2, 3]
        assert kind().choose(3, 30.0, 0.01) == [0]
    qwen, glm, mini = (
        reader_kind(f"{name}VideoProcessor") for name in ("Qwen3VL", "Glm4v", "MiniCPMV4_6")
    )
    assert qwen is not None and glm is not None and mini is not None
    assert len(qwen().choose(300, 30.0)) == 20  # two a second
    assert len(glm().choose(300, 30.0)) == 20
    assert mini().choose(300, 30.0) == list(range(0, 300, 30))  # one a second
    assert qwen(do_sample_frames=False).choose(7, None) == list(range(7))
    with pytest.raises(ValueError, match="metadata"):
        glm().choose(7, None)


def test_settings_come_from_the_folder(tmp_path: Path) -> None:
    folder = save_chat("qwen3_vl", tmp_path)
    name = adapter_for(folder).video_reader
    assert load_reader(folder, name).size.longest_edge == 1600
    (folder / "video_preprocessor_config.json").unlink()
    assert load_reader(folder, name).size.longest_edge == 512  # the image processor's
    nested = {"processor_class": "Qwen3VLProcessor", "video_processor": {"patch_size": 8}}
    (folder / "processor_config.json").write_text(json.dumps(nested))
    assert load_reader(folder, name).patch_size == 8
    assert load_reader(folder, None) is None and load_reader(folder, "NoVideoProcessor") is None


def test_every_reader_takes_one_frame_and_an_odd_number() -> None:
    for name in {str(chat.videos["video_processor_type"]) for chat in CHATS.values()}:
        kind = reader_kind(name)
        assert kind is not None
        for frames in (1, 3):
            about = [{"total_num_frames": frames, "fps": 2.0, "frames_indices": [*range(frames)]}]
            given = kind()([clip(frames)], video_metadata=about, do_sample_frames=False)
            pixels = given.get("pixel_values_videos", given.get("pixel_values"))
            assert all(bool(torch.isfinite(one).all()) and one.numel() for one in pixels)
