"""The package list, the lean import and the floors of the house."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
    "setuptools"
]
ROOMS: dict[str, str] = SETUPTOOLS["package-dir"]

# Imports go downward only. Within a floor, rooms must not import each other in a circle.
FLOORS: list[set[str]] = [
    {"errors", "spec", "numerics", "models", "recipes", "testing.vqa"},
    {"ops"},
    {"ir"},
    {"transform"},
    {"analysis", "capture", "calib", "host", "artifact"},
    {"passes"},
    {"cuda", "backends"},
    {"config", "pipeline", "progress", "loading"},
    {
        "",
        "compiler",
        "partial",
        "evaluation",
        "inspection",
        "planning",
        "probing",
        "api",
        "commands",
        "cli",
        "__main__",
    },
    {"testing"},
]
FLOOR = {room: index for index, rooms in enumerate(FLOORS) for room in rooms}


def packages_on_disk() -> set[str]:
    found = set()
    for package, folder in ROOMS.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *parts)))
    return found


def test_listed_packages_are_the_folders() -> None:
    assert set(SETUPTOOLS["packages"]) == packages_on_disk()
    assert SETUPTOOLS["packages"] == sorted(SETUPTOOLS["packages"])


def test_every_source_folder_is_a_package() -> None:
    for folder in ROOMS.values():
        for source in (ROOT / folder).rglob("*.py"):
            assert (source.parent / "__init__.py").is_file(), f"{source.parent} has no __init__.py"


def test_import_is_lean() -> None:
    code = (
        "import sys, mqc; mqc.__version__; dir(mqc); import mqc.cli, mqc.spec, mqc.config\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'matplotlib', 'numpy'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    assert result.stdout.strip() == "[]"


def test_public_names_resolve() -> None:
    import mqc

    for name in mqc.__all__:
        assert callable(getattr(mqc, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mqc.nothing


@pytest.mark.parametrize("first", ["import mqc.capture", "mqc.capture", "import mqc.calib"])
def test_capture_is_callable_and_a_package(first: str) -> None:
    code = f"import mqc; {first}; from mqc.capture import probe; assert callable(mqc.capture)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


@pytest.mark.slow
def test_wheel_holds_the_mapped_rooms_and_their_data(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns("__pycache__", ".*", "build", "dist", "out", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=skip)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    environment = {**os.environ, "MQC_NATIVE": "0"}
    subprocess.run(
        [*command, "-w", str(tmp_path), str(tree)],
        check=True,
        capture_output=True,
        env=environment,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"mqc/{name.replace('.', '/')}" for name in ("passes", "backends.onnx", "cuda")}
    assert {f"{folder}/__init__.py" for folder in expected} <= names
    data = ["py.typed", "commands/demo.png", "recipes/rtn-static.yaml"]
    data += [f"models/tiny-qwen2-vl/{name}" for name in ("model.safetensors", "config.json")]
    assert {f"mqc/{name}" for name in data} <= names
    assert not [name for name in names if name.startswith(("passes", "backends", "tests", "tools"))]
    assert not [name for name in names if name.endswith(".so")]


def packaging_tree(folder: Path) -> Path:
    """What an install reads, without the models' weights."""
    skip = shutil.ignore_patterns(
        "__pycache__", ".*", "build", "out", "*.egg-info", "*.safetensors", "*.so", "tests"
    )
    return Path(shutil.copytree(ROOT, folder, ignore=skip))


def install_commands(tree: Path, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    return subprocess.run(
        [*command, "-w", str(out), str(tree)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.slow
def test_wheel_without_a_compiler(tmp_path: Path) -> None:
    """An install succeeds where nothing native can be built, and says so; required, it fails."""
    tree = packaging_tree(tmp_path / "tree")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "env", "sh", "uname"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    result = install_commands(tree, tmp_path, PATH=str(tools), MQC_NATIVE="auto")
    assert result.returncode == 0, result.stderr
    assert "cmake is missing: apt-get install cmake" in result.stdout + result.stderr
    assert "`mqc doctor` says what is missing" in result.stdout + result.stderr
    assert len(list(tmp_path.glob("*-py3-none-any.whl"))) == 1
    assert install_commands(tree, tmp_path, PATH=str(tools), MQC_NATIVE="require").returncode


@pytest.mark.slow
def test_wheel_with_the_library(tmp_path: Path) -> None:
    """A wheel with the library is for this platform. Compiled without optimization, for speed."""
    cache = ROOT / "build" / "native" / "CMakeCache.txt"
    library = ROOT / "backends" / "onnx" / "libmqc_onnx.so"
    if not (cache.is_file() and library.is_file()):
        pytest.skip("the native library is not built here: make native")
    tree = packaging_tree(tmp_path / "tree")
    headers = next(
        line.split("=", 1)[1]
        for line in cache.read_text(encoding="utf-8").splitlines()
        if line.startswith("MQC_ORT_HEADERS:")
    )
    result = install_commands(
        tree,
        tmp_path,
        MQC_NATIVE="require",
        MQC_ORT_INCLUDE=headers,
        MQC_CMAKE_ARGS="-DMQC_CUDA=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O0",
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    assert "mqc/backends/onnx/libmqc_onnx.so" in zipfile.ZipFile(wheel).namelist()


@pytest.mark.slow
def test_every_module_can_be_imported_first() -> None:
    """One process loads the libraries; each module is imported in a fork of it."""
    names = [f"mqc.{name}" if name else "mqc" for name, _ in modules()]
    code = (
        "import os, sys, torch, onnx, onnxscript, onnxruntime, importlib\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer\n"
        "from transformers import PROCESSOR_MAPPING, GenerationConfig, PreTrainedModel\n"
        "import torch._dynamo, torch.export, torch.fx.experimental.symbolic_shapes\n"
        "bad = []\n"
        "for name in sys.argv[1:]:\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        importlib.import_module(name)\n"
        "        os._exit(0)\n"
        "    if os.waitpid(child, 0)[1]: bad.append(name)\n"
        "print(bad)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=True, cwd="/"
    )
    assert result.stdout.splitlines()[-1] == "[]", result.stdout + result.stderr[-3000:]


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted name below ``mqc`` and file of every module."""
    for package, folder in ROOMS.items():
        for source in sorted((ROOT / folder).rglob("*.py")):
            parts = (*package.split(".")[1:], *source.relative_to(ROOT / folder).parts)
            name = ".".join(parts).removesuffix(".py").removesuffix("__init__").rstrip(".")
            yield name, source


def room_of(module: str) -> str:
    """The room of a module name below ``mqc``; rooms listed with a dot come first."""
    for room in sorted(FLOOR, key=len, reverse=True):
        if room and (module == room or module.startswith(f"{room}.")):
            return room
    assert module == "", f"mqc.{module} is in no room: add it to FLOORS"
    return ""


def runtime_imports(tree: ast.AST) -> Iterator[str]:
    """Names below ``mqc`` that a module imports when it runs (lazy imports included)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                yield from runtime_imports(child)
            continue
        if isinstance(node, ast.Import):
            yield from (a.name[4:] for a in node.names if a.name.startswith("mqc."))
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            if node.module == "mqc":
                yield from (alias.name for alias in node.names if alias.name != "__version__")
            elif node.module.startswith("mqc."):
                base = node.module[4:]
                yield from (
                    f"{base}.{a.name}" if f"{base}.{a.name}" in FLOOR else base for a in node.names
                )
        yield from runtime_imports(node)


def all_imports() -> Iterator[tuple[str, str]]:
    for name, source in modules():
        for target in runtime_imports(ast.parse(source.read_text(encoding="utf-8"))):
            yield name, target


def test_imports_go_downward() -> None:
    wrong = [
        f"mqc.{name} imports mqc.{target}"
        for name, target in all_imports()
        if FLOOR[room_of(target)] > FLOOR[room_of(name)]
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_of_a_floor_form_no_circle() -> None:
    edges: dict[str, set[str]] = {}
    for name, target in all_imports():
        left, right = room_of(name), room_of(target)
        if left != right and FLOOR[left] == FLOOR[right]:
            edges.setdefault(left, set()).add(right)

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        stack = [start]
        while stack:
            for follower in edges.get(stack.pop(), set()) - found:
                found.add(follower)
                stack.append(follower)
        return found

    assert [room for room in edges if room in reachable(room)] == []


def test_backends_do_not_import_each_other() -> None:
    own = {path.name for path in (ROOT / "backends").iterdir() if (path / "__init__.py").is_file()}
    wrong = []
    for name, target in all_imports():
        here, there = (value.split(".")[1:2] for value in (name, target))
        both = name.startswith("backends.") and target.startswith("backends.")
        if both and here != there and {*here, *there} <= own:
            wrong.append(f"mqc.{name} imports mqc.{target}")
    assert not wrong, "\n".join(wrong)


FAMILIES = (
    "qwen llava internvl gemma glm minicpm idefics smolvlm pixtral mistral blip ovis deepseek "
    "siglip clip_ cogvlm llama"
).split()
MODULES = (
    "q_proj k_proj v_proj o_proj qkv gate_proj up_proj down_proj fc1 fc2 lm_head _layernorm "
    "post_attention vision_tower language_model mm_projector multi_modal"
).split()


@pytest.mark.parametrize("folder", ["mqc/analysis", "mqc/transform", "passes"])
def test_no_model_family_or_module_is_named(folder: str) -> None:
    for source in (ROOT / folder).rglob("*.py"):
        text = source.read_text(encoding="utf-8").lower()
        named = [name for name in (*FAMILIES, *MODULES) if name in text]
        assert not named, f"{source} names {named}: derive it from the graph"


def test_lint_tree_mirrors_the_mapping(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text("utf-8"))
    for folder in ("mqc/ir", *ROOMS.values()):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "__init__.py").touch()
    code = f"import lint_tree, pathlib; lint_tree.make_tree(pathlib.Path({str(tmp_path)!r}))"
    for _ in range(2):  # idempotent
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tools")
    tree = tmp_path / ".lint" / "mqc"
    assert (tree / "ir" / "__init__.py").is_file()
    for package in ROOMS:
        assert tree.joinpath(*package.split(".")[1:], "__init__.py").is_file()
