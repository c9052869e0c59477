"""The Python mirror of the C ABI, and what loading says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mqc.cuda import library
from mqc.cuda.pack import Layout

HEADER = (Path(__file__).resolve().parents[2] / "cuda/include/mqc_cuda.h").read_text()
CODE = re.sub(r"/\*.*?\*/", "", HEADER, flags=re.DOTALL)
C_TYPES = {
    "uint32_t": library.c_uint32,
    "int32_t": library.c_int32,
    "int64_t": library.c_int64,
    "float": library.c_float,
}


def header_fields(struct: str) -> list[tuple[str, object]]:
    """Names and ctypes of a struct's fields, in order."""
    body = re.search(rf"typedef struct {struct} \{{(.*?)\}} {struct};", CODE, re.DOTALL)
    assert body is not None
    fields: list[tuple[str, object]] = []
    for declaration in filter(None, (part.strip() for part in body.group(1).split(";"))):
        if "*" in declaration:
            assert declaration.count("*") == 1
            fields.append((declaration.split("*")[1].strip(), library.c_void_p))
        else:
            kind, names = declaration.split(None, 1)
            fields += [(name.strip(), C_TYPES[kind]) for name in names.split(",")]
    return fields


def test_every_struct_is_mirrored() -> None:
    assert set(re.findall(r"typedef struct (\w+)", CODE)) == set(library.STRUCTS)


@pytest.mark.parametrize("name", list(library.STRUCTS))
def test_struct_mirrors_the_header(name: str) -> None:
    assert library.STRUCTS[name]._fields_ == header_fields(name)


@pytest.mark.parametrize(
    ("enum", "prefix", "name"),
    [
        (library.DType, "MQC_", "mqc_dtype"),
        (library.Modality, "MQC_MODALITY_", "mqc_modality"),
        (library.LinearKernel, "MQC_LINEAR_", "mqc_linear_kernel"),
        (library.Activation, "MQC_ACT_", "mqc_activation"),
        (library.Rotary, "MQC_ROTARY_", "mqc_rotary"),
        (Layout, "MQC_LAYOUT_", "mqc_layout"),
    ],
)
def test_enums_mirror_the_header(enum: type, prefix: str, name: str) -> None:
    body = re.search(rf"typedef enum {name} \{{(.*?)\}}", CODE, re.DOTALL)
    assert body is not None
    values = {k: int(v) for k, v in re.findall(r"(\w+) = (\d+)", body.group(1))}
    assert values == {prefix + member.name: int(member) for member in enum}


def test_a_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(library.PATH_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(library.KernelError, match=r"none\.so cannot be loaded"):
        library.load()
    monkeypatch.delenv(library.PATH_VARIABLE)
    monkeypatch.setattr(library, "FILE_NAME", "nothing.so")
    with pytest.raises(library.KernelError, match="was not built") as caught:
        library.load()
    assert "mqc.cuda.build" in str(caught.value)


def test_doctor_tells_of_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mqc.commands import doctor

    monkeypatch.setenv(library.PATH_VARIABLE, str(tmp_path / "none.so"))
    found = {finding.what: finding for finding in doctor.findings()}["cuda kernels"]
    assert found.level == "problem" and "cannot be loaded" in found.meaning
    monkeypatch.delenv(library.PATH_VARIABLE)
    monkeypatch.setattr(library, "FILE_NAME", "nothing.so")
    found = {finding.what: finding for finding in doctor.findings()}["cuda kernels"]
    assert found.level == "note" and "mqc.cuda.build" in found.meaning
