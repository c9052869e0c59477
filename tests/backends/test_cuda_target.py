"""Target cuda from the command line: compiles here, says what running needs, runs by definition."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import mqc
from mqc.backends.cuda import CudaTarget
from mqc.backends.cuda.target import missing
from mqc.backends.registry import Target, get_target
from mqc.cli import app
from mqc.config import make_recipe
from mqc.cuda.library import KernelError, Library
from mqc.errors import ArtifactError, TargetError, UsageError
from mqc.testing import vqa

MODEL = "tiny-qwen2-vl"
QUICK = ["weights.method=rtn", "weights.clip=false"]


@cache
def compiled(target: str) -> Path:
    out = Path(mkdtemp()) / f"artifact-{target}"
    mqc.compile(MODEL, target=target, overrides=QUICK, samples=16, out=out)
    return out


def test_registered() -> None:
    target = get_target("cuda")
    assert isinstance(target, Target) and isinstance(target, CudaTarget)
    assert target.available() is None


def test_defaults_stand_below_what_the_user_says() -> None:
    scheme = make_recipe("w4a8", target="cuda").scheme
    assert not scheme.aifs and scheme.msq and scheme.component("decoder").static_head
    assert "head W8A8" in scheme.describe()
    chosen = make_recipe(
        "w4a8", overrides=["aifs=true", "quantize_head=false"], target="cuda"
    ).scheme
    assert chosen.aifs and not chosen.quantize_head
    assert not chosen.component("decoder").static_head
    assert make_recipe("w4a8", target="onnx").scheme == make_recipe("w4a8").scheme
    plain = make_recipe("float", target="cuda").scheme
    assert not plain.quantized


def test_artifact() -> None:
    folder = compiled("cuda")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["target"] == "cuda"
    facts = manifest["facts"]["cuda"]
    assert facts["dtype"] == "bf16" and facts["layouts"]["W8_64X128"] == 2
    assert "plan.json" in manifest["files"] and "program/params.safetensors" in manifest["files"]
    program = json.loads((folder / "program" / "program.json").read_text())
    assert program["dialect"] == "cuda" and program["dtype"] == "bf16"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_loading_says_what_is_missing_and_what_to_do() -> None:
    with pytest.raises(TargetError, match="needs an NVIDIA GPU") as caught:
        mqc.load(compiled("cuda"))
    assert "torch" in caught.value.message
    assert "device=reference" in str(caught.value.hint)
    assert "--target onnx" in str(caught.value.hint)
    result = CliRunner().invoke(app, ["run", str(compiled("cuda")), "--prompt", "what is red ?"])
    assert result.exit_code == 1 and "needs an NVIDIA GPU" in result.stderr


def test_a_driver_or_a_device_that_will_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why torch finds no GPU, and what a library says of a device, with a remedy each."""

    def refuse() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found 11040). Please update"
        )

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", refuse)
    what, remedy = missing()[0]
    assert what.endswith("is too old (found 11040)") and "a driver for CUDA 13.0" in remedy
    said = {3: "the device has compute capability 7.5", 5: "driver version is insufficient"}
    for status, words in said.items():
        library = object.__new__(Library)
        library.native = SimpleNamespace(  # type: ignore[assignment]
            mqc_check_device=lambda status=status: status,
            mqc_last_error=lambda words=words: words.encode(),
        )
        with pytest.raises(KernelError, match=words) as caught:
            library.check_device()
        assert ("another generation" if status == 3 else "driver") in str(caught.value.hint)


def test_options_are_checked() -> None:
    with pytest.raises(UsageError, match="no option 'devise'") as caught:
        mqc.load(compiled("cuda"), devise="reference")
    assert "device" in str(caught.value.hint)
    with pytest.raises(UsageError, match="'tpu'"):
        mqc.load(compiled("cuda"), device="tpu")
    with pytest.raises(UsageError, match="'cuda:one'"):
        mqc.load(compiled("cuda"), device="cuda:one")


def test_runs_by_definition_and_answers_as_the_reference() -> None:
    """bfloat16 rows against float32 ones: the answers agree, the numbers nearly."""
    cuda = mqc.load(compiled("cuda"), device="reference")
    reference = mqc.load(compiled("reference"))
    rows = [vqa.sample("evaluation", index) for index in range(12)]
    same = 0
    for row in rows:
        messages = vqa.messages(row)
        expected = reference.generate(messages, max_new_tokens=6).tokens
        same += cuda.generate(messages, max_new_tokens=6).tokens == expected
    assert same >= 11


def test_run_command_with_runtime_options() -> None:
    args = ["run", str(compiled("cuda")), "--prompt", "what is red ?", "--max-new-tokens", "3"]
    options = ["--runtime", "device=reference", "--runtime", "kv_cache=int8"]
    result = CliRunner().invoke(app, [*args, *options, "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["tokens"] >= 1
    result = CliRunner().invoke(app, [*args, "--runtime", "device"])
    assert result.exit_code != 0 and "key=value" in result.stderr


def test_damaged_plan(tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "artifact"
    shutil.copytree(compiled("cuda"), folder)
    (folder / "plan.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"plan\.json"):
        mqc.load(folder, device="reference")
