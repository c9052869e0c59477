"""Checkpoint to answer through the command line and the API, and what goes wrong on the way."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mqc
from mqc.backends.onnx.library import ops_library
from mqc.cli import app
from mqc.host import evaluate
from mqc.models import embedded_model_path
from mqc.testing import vqa

MODEL = "tiny-llava"


@cache
def compiled(target: str, copy: int = 0) -> Path:
    """An artifact of the default scheme; ``copy`` distinguishes compiles of the same thing."""
    out = Path(mkdtemp()) / f"artifact-{target}-{copy}"
    mqc.compile(MODEL, target=target, samples=16, out=out)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run(args: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``mqc`` with ``args``."""
    result = CliRunner().invoke(app, args)
    return result.exit_code, result.stdout, result.stderr


def test_equal_compiles_give_equal_bytes() -> None:
    one, two = files(compiled("onnx")), files(compiled("onnx", copy=1))
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == []


def test_onnx_answers_as_the_reference() -> None:
    """Equal answers, and distributions as close as int8 steps allow.

    Integer operators are bit-equal (tests/backends). Float operators round differently, and a
    value within an ulp of a rounding boundary then takes the neighbouring int8 step; that noise is
    far below the quantization's own.
    """
    reference, onnx = mqc.load(compiled("reference")), mqc.load(compiled("onnx"))
    rows = [vqa.sample("evaluation", index) for index in range(12)]
    for row in rows:
        messages = vqa.messages(row)
        expected = reference.generate(messages, max_new_tokens=6)
        assert onnx.generate(messages, max_new_tokens=6).tokens == expected.tokens
    items = [reference.eval_item(vqa.messages(row), row.answer) for row in rows]
    report = evaluate(onnx.engine, items, baseline=reference.engine)
    assert report.kl is not None and report.kl <= 2e-3 and report.agreement == 1.0


@pytest.mark.parametrize("library", [True, False])
def test_the_program_of_the_deployment_page(library: bool, tmp_path: Path) -> None:
    """It runs as printed, imports neither torch nor mqc, and answers as ``mqc.load`` does."""
    page = (Path(__file__).parent.parent / "docs" / "deploy.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(# ask\.py.*?)```", page, re.DOTALL)
    ends = 'assert not {"torch", "transformers", "mqc"} & set(sys.modules)\n'
    (tmp_path / "ask.py").write_text(source + ends, encoding="utf-8")
    sample = vqa.sample("evaluation", 3)
    sample.image.save(tmp_path / "picture.png")
    if library and ops_library() is None:
        pytest.skip("the native library was not built")
    path = [str(ops_library())] if library else []
    question = "what is at row 1 column 2 ?"
    told = subprocess.run(
        [sys.executable, "-P", "ask.py", str(compiled("onnx")), "picture.png", question, *path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    answer = mqc.load(compiled("onnx")).generate(prompt=question, images=[sample.image])
    assert told.stdout.strip() == answer.text and answer.text


def test_threads_of_a_session() -> None:
    engine = mqc.load(compiled("onnx"), threads=1).engine
    assert engine.session("embed").get_session_options().intra_op_num_threads == 1  # type: ignore[attr-defined]
    with pytest.raises(mqc.MqcError, match="threads 0"):
        mqc.load(compiled("onnx"), threads=0)


def test_three_images_and_none() -> None:
    model = mqc.load(compiled("onnx"))
    picture = vqa.sample("evaluation", 0).image
    assert model.generate(prompt="how many ?", images=[picture] * 3, max_new_tokens=2).tokens
    assert model.generate(prompt="what is red ?", max_new_tokens=2).tokens


def test_evaluation_refuses_calibration_rows() -> None:
    artifact = str(compiled("onnx"))
    code, _, text = run(["eval", artifact, "--data", "tiny-vqa:calibration:4", "--n", "4"])
    assert code == 1 and "calibration" in text
    code, out, _ = run(["eval", artifact, "--n", "4", "--json"])
    assert code == 0 and json.loads(out)["rows"] == 4


def test_inspect_shows_every_layer() -> None:
    code, out, _ = run(["inspect", str(compiled("onnx")), "--json"])
    layers = json.loads(out)["layers"]
    assert code == 0
    decoder = [layer for layer in layers if layer["component"] == "decoder"]
    assert len(decoder) == 28
    assert all(layer["bits"] == 4 for layer in decoder)
    assert all(set(layer["scales"]) == {"text", "visual"} for layer in decoder)
    assert all(layer["weight_sqnr_db"] > 10 for layer in decoder)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    shutil.copytree(embedded_model_path(MODEL), folder)
    return folder


def compile_args(folder: Path, out: Path) -> list[str]:
    data = ["--calibration", "tiny-vqa:calibration:8"]
    return ["compile", str(folder), "--target", "reference", *data, "--out", str(out)]


def test_nan_weight(checkpoint: Path, tmp_path: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    name = next(key for key in weights if "layers.2.mlp.up_proj" in key)
    weights[name][0, 0] = float("nan")
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    code, _, text = run(compile_args(checkpoint, tmp_path / "out"))
    assert code == 1 and "up_proj" in text and "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_truncated_weights(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    code, _, text = run(compile_args(checkpoint, tmp_path / "out"))
    assert code == 1 and "model.safetensors" in text and "Traceback" not in text


def test_missing_tokenizer(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).unlink()
    code, _, text = run(compile_args(checkpoint, tmp_path / "out"))
    assert code == 1 and "tokenizer" in text and "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_empty_calibration(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    args = ["compile", str(checkpoint), "--calibration", str(tmp_path / "empty")]
    code, _, text = run([*args, "--target", "reference", "--out", str(tmp_path / "out")])
    assert code == 1 and "empty" in text and "Traceback" not in text


def test_ctrl_c_leaves_nothing_and_the_next_run_works(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    args = ["--target", "reference", "--set", "weights.method=rtn", "--samples", "8"]
    command = [sys.executable, "-m", "mqc", "compile", MODEL, *args, "--out", str(out)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # even below nohup
    )
    deadline = time.monotonic() + 120
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(1)  # well inside: the writer is open, the model is being captured or rewritten
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=120)
    assert (process.returncode, "Traceback" in text) == (130, False), text
    assert list(tmp_path.iterdir()) == []
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert (out / "manifest.json").is_file() and len(list(tmp_path.iterdir())) == 1
