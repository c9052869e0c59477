"""The passes of docs/passes.md run as printed, with a new operator down to an ONNX file."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from tiny import program

import mqc
from mqc.errors import UsageError
from mqc.ir.dialect import DIALECTS
from mqc.ops import OPS, add_operator
from mqc.passes.canonicalize import Canonicalize
from mqc.pipeline import make_passes
from mqc.spec import named_scheme
from mqc.transform import PassContext

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "passes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's folder with the page's modules in it, where Python finds them."""
    place = tmp_path_factory.mktemp("mine")
    for block in BLOCKS:
        if named := re.match(r"# (\w+\.py)\n", block):
            (place / named[1]).write_text(block, encoding="utf-8")
    sys.path.insert(0, str(place))
    yield place
    sys.path.remove(str(place))


def test_one_that_looks(folder: Path) -> None:
    (looks,) = make_passes(["spread:Spread"], named_scheme("float"))
    manager = mqc.PassManager([Canonicalize(), looks])
    manager.run(program("tiny-qwen2-vl"), PassContext())
    record = manager.records[-1]
    assert record.counts["linears"] == len(record.details) > 20
    assert all(layer["spread"] > 1 for layer in record.details)


def test_one_that_fuses_is_tested_as_printed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqc, "capture", program)  # the embedded model, captured once a run
    exec(compile(BLOCKS[-1], "docs/passes.md", "exec"), {})


def test_its_operator_reaches_the_onnx_file(folder: Path, tmp_path: Path) -> None:
    plain = program("tiny-qwen2-vl")
    mqc.compile(
        "tiny-qwen2-vl", scheme="float", passes=["swiglu:FuseSwiglu"], out=tmp_path / "artifact"
    )
    file = onnx.load(tmp_path / "artifact" / "decoder.onnx", load_external_data=False)
    assert sum(node.op_type == "Swiglu" for node in file.graph.node) == plain.facts["kv_layers"]
    assert "Swiglu" in {function.name for function in file.functions}
    answer = mqc.load(tmp_path / "artifact").generate(prompt="what is red ?", max_new_tokens=4)
    assert answer.tokens


def test_added_operators_are_legal_where_bodies_are_run(folder: Path) -> None:
    __import__("swiglu")
    assert DIALECTS["quantized"].illegal(["mqc.swiglu.default", "mqc.none.default"]) == [
        "mqc.none.default"
    ]
    assert DIALECTS["cuda"].illegal(["mqc.swiglu.default"]) == ["mqc.swiglu.default"]
    with pytest.raises(UsageError, match="mqc::hadamard already"):
        add_operator(OPS["hadamard"])
