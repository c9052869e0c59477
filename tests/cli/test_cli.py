"""The command line: exit codes, messages, JSON. No model is compiled here."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mqc import __version__
from mqc.cli import app
from mqc.commands import _common as common
from mqc.commands import doctor
from mqc.commands.inspect import fold_ports, layer_row
from mqc.errors import TargetError, UsageError

COMMANDS = "compile run eval inspect probe opt passes targets doctor".split()


def run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(args), env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == code, f"{result.exit_code}: {result.output}"
    return result


def test_version_and_help() -> None:
    assert run("--version").stdout.strip() == f"mqc {__version__}"
    listing = run("--help").stdout
    assert all(name in listing for name in COMMANDS)
    assert "demo" not in listing


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(name: str) -> None:
    text = run(name, "--help").stdout
    assert f"Example: mqc {name}" in " ".join(text.split())
    if name != "demo":
        assert "--json" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compile", "tiny-qwen2-vl", "--scheme", "w4a9"], "did you mean 'w4a8'?"),
        (["compile", "tiny-qwen2-vl", "--set", "decodr.weights.bits=3"], "unknown key 'decodr'"),
        (["compile", "tiny-qwen2-vl", "--set", "rotate"], "is not key=value"),
        (["compile", "tiny-qwen2-vl", "--vision", "w5a8"], "is no bit setting"),
        (["compile", "tiny-qwen2-vl", "--head", "5"], "head.bits is 5"),
        (["compile", "tiny-qwen2-vl", "--recipe", "nowhere.yaml"], "cannot read recipe"),
        (["compile", "tiny-qwen2-vl", "--target", "tpu"], "unknown target 'tpu'"),
        (["compile", "tiny-qwen2-vl", "--pass", "nope"], "unknown pass 'nope'"),
        (["compile", "tiny-qwen2-vl", "--pass", "no_such_mod:X"], "cannot be imported"),
        (["opt", "tiny-qwen2-vl", "--passes", " , "], "names no pass"),
        (["opt", "tiny-qwen2-vl", "--passes", "cleanupp"], "did you mean 'cleanup'?"),
        (["passes", "--scheme", "zzz"], "unknown scheme 'zzz'"),
        (["compile", "tiny-qwen2-vl", "--scheme", "W4A8"], "did you mean 'w4a8'?"),
        (["compile", "tiny-qwen2-vl", "--scheme", ""], "unknown scheme ''"),
        (["compile"], "Missing argument"),
        (["compile", "tiny-qwen2-vl", "--no-such-option"], "No such option"),
        (["frobnicate"], "No such command"),
        (["compile", "tiny-llava", "--kv-cache", "int4"], "choose one of float, int8"),
    ],
)
def test_wrong_usage_is_exit_2_and_names_the_cause(args: list[str], message: str) -> None:
    result = run(*args, code=2)
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["compile", "./no/such/folder"], "does not exist"),
        (["inspect", "/no/such/artifact"], "does not exist"),
        (["run", "/no/such/artifact", "--prompt", "x"], "does not exist"),
        (["eval", "./no/such/model"], "does not exist"),
    ],
)
def test_failures_are_exit_1(args: list[str], message: str) -> None:
    result = run(*args, code=1)
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_json_errors_and_debug(tmp_path: Path) -> None:
    result = run("inspect", str(tmp_path), "--json", code=1)
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "ArtifactError"
    assert "not an artifact" in error["message"]
    assert error["hint"]
    result = run("inspect", str(tmp_path), "--debug", code=1)
    assert "Traceback" in result.stderr


def test_wrong_usage_is_json_too() -> None:
    """Whoever asked for JSON gets it for errors of the command line itself as well."""
    for args in (["inspect", "--json"], ["compile", "a", "--samples", "none", "--json"]):
        found = json.loads(run(*args, code=2).stdout)
        assert found["error"]["type"] == "UsageError" and found["error"]["message"]


def test_options_that_have_no_effect_are_refused() -> None:
    assert "no video" in run("run", "folder", "--prompt", "a", "--fps", "1", code=2).stderr


def test_what_the_system_refuses_is_no_internal_error(capsys: pytest.CaptureFixture[str]) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/a.json")
    assert common.report_error(error, debug=False, as_json=False) == 1
    message = capsys.readouterr().err
    assert "No space left on device: /full/a.json" in message and "internal" not in message


def test_streams_that_are_closed_or_know_few_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    monkeypatch.setattr(sys, "stderr", None)
    common.prepare_streams()
    print("größe", flush=True)
    common.print_json({"größe": 1})
    common.stderr().print("unheard")
    sys.stderr.close()
    narrow.flush()
    text = narrow.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert text.startswith("gr??e\n")
    assert json.loads(text.partition("\n")[2]) == {"größe": 1}


def test_a_long_stage_says_how_far_it_is_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds, lines in ((3600.0, 1), (-1.0, 3)):
        monkeypatch.setattr(common, "STEP_SECONDS", seconds)
        with common.progress_bars() as reporter:
            reporter.stage("quantize-weights", 0, 1)
            for done in range(2):
                reporter.step("layers", done, 2)
        told = capsys.readouterr().err.splitlines()
        assert told[0] == "[1/1] quantize-weights" and len(told) == lines
    assert told[-1].strip() == "layers: 1 of 2"


def test_report_error_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def code(error: BaseException) -> int:
        return common.report_error(error, debug=False, as_json=False)

    assert code(UsageError("a [b] is wrong", hint="use [c]")) == 2
    assert code(TargetError("t")) == 1
    assert code(KeyboardInterrupt()) == common.INTERRUPTED == 130
    noted = RuntimeError("boom")
    noted.add_note("while quantizing layer 3")
    assert code(noted) == 1
    text = capsys.readouterr().err
    assert "a [b] is wrong" in text
    assert "use [c]" in text
    assert "RuntimeError: boom (while quantizing layer 3)" in text
    assert "--debug" in text


def test_listings() -> None:
    targets = {entry["name"]: entry for entry in json.loads(run("targets", "--json").stdout)}
    assert {"reference", "onnx", "cuda"} <= targets.keys()
    assert targets["reference"]["available"]
    names = [entry["name"] for entry in json.loads(run("passes", "--json").stdout)]
    assert names[0] == "canonicalize"
    chosen = json.loads(run("passes", "--scheme", "w4a16", "--json").stdout)
    assert [entry["name"] for entry in chosen] == ["canonicalize", "quantize-weights", "cleanup"]
    assert all(entry["summary"] for entry in chosen)
    assert "canonicalize" in run("passes").stdout
    assert "reference" in run("targets").stdout


def test_doctor_reports_and_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {finding.what: finding for finding in doctor.findings()}
    assert found["mqc"].value == __version__
    assert found["torch"].level == "ok"
    assert "cores" in found["cpu"].value
    monkeypatch.setattr(doctor, "_installed", lambda name: None)
    broken = {finding.what: finding for finding in doctor.findings()}
    assert broken["onnxruntime"].level == "problem"
    assert "mqc[cpu]" in broken["onnxruntime"].meaning
    assert broken["torchvision"].level == "note"
    assert "video" in broken["torchvision"].meaning
    run("doctor", code=1)
    assert json.loads(run("doctor", "--json", code=1).stdout)


def test_doctor_says_what_is_known_of_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MQC_ONNX_OPS", __file__)
    for machine, level in (("aarch64", "note"), ("x86_64", "ok")):
        monkeypatch.setattr("platform.machine", lambda name=machine: name)
        found = {finding.what: finding for finding in doctor.findings()}["onnx operator library"]
        assert found.level == level
        assert ("never timed on an Arm machine" in found.meaning) == (machine == "aarch64")


def test_layer_rows() -> None:
    layer = {"layer": "model.a.weight", "component": "decoder", "bits": 4, "group_size": 64}
    assert layer_row(layer)[:5] == ["a", "W4g64A16", None, None, None]
    scales = {"text": 0.5, "visual": 0.25}
    row = layer_row({**layer, "scales": scales, "columns": [0, 7], "weight_sqnr_db": 20.04})
    assert row == ["a", "W4g64A8", None, "0.5", "0.25", "0, 7", None, "20.0", None]
    vision = {**layer, "component": "vision", "scales": {"all": 0.5}}
    assert layer_row(vision)[3:5] == [None, "0.5"]


def test_numbered_ports_are_folded() -> None:
    ports = ["ids: i64[1]", "past_key_0: f32[2]", "past_value_0: f32[2]", "past_key_1: f32[2]"]
    assert fold_ports(ports) == ["ids: i64[1]", "past_key_0..1: f32[2]", "past_value_0: f32[2]"]


def test_interrupt_is_130_without_a_trace() -> None:
    code = (
        "import signal, sys, time\n"
        # a run in the background inherits SIGINT ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from mqc import cli\n"
        "@cli.app.command()\n"
        "def hang(): print('ready', flush=True); time.sleep(60)\n"
        "sys.argv = ['mqc', 'hang']\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err


def test_eval_options_of_the_target_need_an_artifact() -> None:
    result = run("eval", "tiny-llava", "--n", "2", "--runtime", "device=reference", code=2)
    assert "is a checkpoint" in result.stderr


def test_an_interrupt_in_a_callback_stops_at_the_next_step() -> None:
    class Watched:
        pass

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    with common.progress_bars() as reporter:
        thing = Watched()
        watch = weakref.ref(thing, interrupted)
        del thing  # Python swallows what the callback raises
        assert watch() is None
        with pytest.raises(KeyboardInterrupt):
            reporter.step("work", 1, 2)
