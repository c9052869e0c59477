"""Programs: parameters, copies, types, files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from programs import NAMES, captured, tiny_program

from mqc.errors import ArtifactError, VerificationError
from mqc.ir import ParamStore, TensorType, format_program, load_program, save_program, verify
from mqc.ir.serialize import resolve_target, target_name
from mqc.ir.symbols import ExampleSizes, evaluate
from mqc.transform.equivalence import end_to_end_error


def test_params_load_lazily_and_once() -> None:
    calls = []
    store = ParamStore()

    def load() -> torch.Tensor:
        calls.append(1)
        return torch.ones(2)

    store["w"] = load
    copy = store.copy()
    assert not store.is_loaded("w") and not calls
    assert store["w"].sum() == 2 and store["w"].sum() == 2
    assert len(calls) == 1 and not copy.is_loaded("w")


def test_params_add_never_reuses_a_name() -> None:
    store = ParamStore()
    store["a.weight"] = torch.zeros(1)
    first = store.add("a.weight", torch.ones(1))
    second = store.add(first, torch.ones(1) * 2)
    assert [first, second] == ["a.weight~1", "a.weight~2"]
    assert store["a.weight"] == 0 and store[first] == 1 and store[second] == 2


def test_cast_keeps_integers() -> None:
    store = ParamStore()
    store["f"], store["i"] = torch.ones(1), torch.ones(1, dtype=torch.int64)
    cast = store.cast(torch.float64)
    assert cast["f"].dtype == torch.float64 and cast["i"].dtype == torch.int64


@pytest.mark.parametrize("name", NAMES)
def test_save_load_round_trip(name: str, tmp_path: Path) -> None:
    program = captured(name)
    save_program(program, tmp_path)
    again = load_program(tmp_path)
    assert format_program(again) == format_program(program)
    assert end_to_end_error(program, again) == 0.0
    assert not [key for key in tmp_path.iterdir() if key.suffix in (".pkl", ".pt", ".bin")]


def test_saving_twice_gives_equal_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        save_program(tiny_program(), tmp_path / folder)
    for file in ("program.json", "params.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"program\.json is missing"):
        load_program(tmp_path)
    save_program(tiny_program(), tmp_path)
    weights = tmp_path / "params.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(ArtifactError, match=r"params\.safetensors is damaged"):
        load_program(tmp_path)
    (tmp_path / "program.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"program\.json is damaged"):
        load_program(tmp_path)
    (tmp_path / "program.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ArtifactError, match="format 99"):
        load_program(tmp_path)


def test_targets_resolve_to_operators_only() -> None:
    for target in (torch.ops.aten.linear.default, torch.sym_max):
        assert resolve_target(target_name(target)) is target
    for name in ("os.system", "builtins.eval", "operator.__class__", "aten.nothing.default", "x"):
        with pytest.raises(ArtifactError):
            resolve_target(name)
    with pytest.raises(ArtifactError, match="cannot be named"):
        target_name(print)


def test_to_casts_everything() -> None:
    wide = tiny_program().to(torch.float64)
    for component in wide:
        for value in wide.module(component.name)(
            *(
                torch.zeros(2, 3, dtype=torch.int64)
                if port.type.dtype == torch.int64
                else torch.randn(2, 3, port.type.shape[-1], dtype=torch.float64)  # type: ignore[arg-type]
                for port in component.inputs
            )
        ):
            assert value.dtype == torch.float64


def test_verifier_finds_what_is_wrong() -> None:
    program = tiny_program()
    verify(program)
    node = next(iter(program.components["decoder"].graph.find_nodes(op="get_attr")))
    node.target = "gone"
    with pytest.raises(VerificationError, match="'gone'"):
        verify(program)
    program = tiny_program()
    program.components["embed"].output_value("embeddings").meta.pop("type")
    with pytest.raises(VerificationError, match="no type"):
        verify(program)
    program = tiny_program()
    program.params["head.weight"] = torch.zeros(3, 3)
    with pytest.raises(VerificationError, match=r"head\.weight"):
        verify(program)
    program = tiny_program()
    program.dialect = "quantized"
    program.components["embed"].output_value("embeddings").target = torch.ops.aten.kron.default
    with pytest.raises(VerificationError, match=r"aten\.kron\.default not legal"):
        verify(program)


def test_sizes_are_arithmetic_only() -> None:
    assert evaluate("past + tokens", {"past": 3, "tokens": 2}) == 5
    assert evaluate("4*((blocks//3))", {"blocks": 7}) == 8
    assert evaluate("Max(1, x)", ExampleSizes(5)) == 5
    with pytest.raises(ValueError, match="arithmetic"):
        evaluate("__import__('os')", {})


def test_types_print_as_text() -> None:
    kind = TensorType(("batch", 3), torch.bfloat16)
    assert str(kind) == "bf16[batch, 3]"
    assert TensorType.from_json(kind.to_json()) == kind
