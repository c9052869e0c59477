"""Programs as files: ``program.json`` and ``params.safetensors``. Nothing is ever pickled."""

from __future__ import annotations

import json
import math
import operator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import fx

from mqc.errors import ArtifactError
from mqc.ir.params import Loader, ParamStore
from mqc.ir.program import Component, Link, Program
from mqc.ir.types import Port, TensorType, dtype_from_name, dtype_name

FORMAT_VERSION = 1

_PYTHON_MODULES = {"_operator": operator, "operator": operator, "math": math}

_NAMED = {
    str(value): value
    for value in (
        torch.strided,
        torch.contiguous_format,
        torch.preserve_format,
        torch.channels_last,
        torch.channels_last_3d,
    )
}


def target_name(target: Any) -> str:
    """Stable name of a target: ``aten.linear.default``, ``operator.add``, ``torch.sym_max``."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = getattr(target, "__module__", None)
    name = getattr(target, "__name__", str(target))
    if module in _PYTHON_MODULES:
        return f"{module.removeprefix('_')}.{name}"
    if module == "torch" and name.startswith("sym_"):
        return f"torch.{name}"
    raise ArtifactError(
        f"call target {target!r} cannot be named",
        hint="only torch operators, operator.*, math.* and torch.sym_* may be called in a graph",
    )


def resolve_target(name: str) -> Any:
    """Inverse of :func:`target_name`; refuses anything else, so a file cannot name foreign code."""
    head, _, rest = name.partition(".")
    try:
        if head in _PYTHON_MODULES and "." not in rest and not rest.startswith("_"):
            return getattr(_PYTHON_MODULES[head], rest)
        if head == "torch" and rest.startswith("sym_"):
            return getattr(torch, rest)
        namespace, op, overload = name.split(".")
        return getattr(getattr(getattr(torch.ops, namespace), op), overload)
    except (AttributeError, ValueError) as error:
        raise ArtifactError(
            f"unknown operator {name!r} in a saved graph",
            hint="import the module that adds it (mqc.ops.add_operator); where there is none, "
            "another version of mqc or torch wrote the file: compile it again",
        ) from error


def encode(value: Any) -> Any:
    """An fx argument as JSON data."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": dtype_name(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, (torch.layout, torch.memory_format)):
        return {"named": str(value)}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    raise ArtifactError(
        f"argument {value!r} of type {type(value).__name__} cannot be saved",
        hint="store constants as parameters of the program",
    )


def decode(data: Any, nodes: dict[str, fx.Node]) -> Any:
    """Inverse of :func:`encode`."""
    if isinstance(data, list):
        return [decode(item, nodes) for item in data]
    if not isinstance(data, dict):
        return data
    ((kind, value),) = data.items()
    if kind == "node":
        return nodes[value]
    if kind == "float":
        return float(value)
    if kind == "dtype":
        return dtype_from_name(value)
    if kind == "device":
        return torch.device(value)
    if kind == "named":
        return _NAMED[value]
    if kind == "slice":
        return slice(*(decode(item, nodes) for item in value))
    if kind == "tuple":
        return tuple(decode(item, nodes) for item in value)
    raise ArtifactError(f"unknown argument kind {kind!r} in a saved graph")


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    target = node.target if isinstance(node.target, str) else target_name(node.target)
    data: dict[str, Any] = {"name": node.name, "op": node.op, "target": target}
    if node.args:
        data["args"] = [encode(arg) for arg in node.args]
    if node.kwargs:
        data["kwargs"] = {key: encode(arg) for key, arg in node.kwargs.items()}
    meta = {
        key: value.to_json() if isinstance(value, TensorType) else value
        for key, value in sorted(node.meta.items())
    }
    if meta:
        data["meta"] = meta
    return data


def _node_from_json(graph: fx.Graph, data: dict[str, Any], nodes: dict[str, fx.Node]) -> fx.Node:
    op = data["op"]
    target = resolve_target(data["target"]) if op == "call_function" else data["target"]
    args = tuple(decode(arg, nodes) for arg in data.get("args", []))
    kwargs = {key: decode(arg, nodes) for key, arg in data.get("kwargs", {}).items()}
    node = graph.create_node(op, target, args, kwargs, name=data["name"])
    meta = dict(data.get("meta", {}))
    if isinstance(meta.get("type"), dict):
        meta["type"] = TensorType.from_json(meta["type"])
    node.meta = meta
    return node


def component_to_json(component: Component) -> dict[str, Any]:
    """A component's graph and ports as JSON data."""
    return {
        "name": component.name,
        "inputs": [port.to_json() for port in component.inputs],
        "outputs": [port.to_json() for port in component.outputs],
        "nodes": [_node_to_json(node) for node in component.graph.nodes],
    }


def component_from_json(data: dict[str, Any]) -> Component:
    """Inverse of :func:`component_to_json`."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for item in data["nodes"]:
        nodes[item["name"]] = _node_from_json(graph, item, nodes)
    return Component(
        data["name"],
        graph,
        [Port.from_json(port) for port in data["inputs"]],
        [Port.from_json(port) for port in data["outputs"]],
    )


def program_to_json(program: Program) -> dict[str, Any]:
    """Everything but the tensors."""
    return {
        "format": FORMAT_VERSION,
        "dtype": dtype_name(program.dtype),
        "dialect": program.dialect,
        "facts": program.facts,
        "links": [[list(link.source), list(link.target)] for link in program.links],
        "history": program.history,
        "components": [component_to_json(component) for component in program],
    }


def save_program(program: Program, folder: Path) -> None:
    """Write ``program.json`` and ``params.safetensors`` into an existing ``folder``."""
    used: set[str] = set()
    for component in program:
        used |= component.param_names()
    text = json.dumps(program_to_json(program), indent=1, sort_keys=True)
    (folder / "program.json").write_text(text + "\n", encoding="utf-8")
    tensors = {name: program.params[name].contiguous() for name in sorted(used)}
    save_file(_unshared(tensors), folder / "params.safetensors")


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of tensors that share storage with an earlier one (safetensors refuses them)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    return result


def load_program(folder: Path) -> Program:
    """Read a saved program; tensors are read when first used.

    Raises :class:`~mqc.errors.ArtifactError` for a missing, foreign or damaged file.
    """
    json_path, params_path = folder / "program.json", folder / "params.safetensors"
    for path in (json_path, params_path):
        if not path.is_file():
            raise ArtifactError(
                f"{folder} is not a saved program: {path.name} is missing",
                hint="give the folder that mqc opt or mqc compile wrote",
            )
    try:
        data = json.loads(json_path.read_text(encoding="utf-8"))
        version = data["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{json_path} is damaged: {error}", hint="compile it again") from error
    if version != FORMAT_VERSION:
        raise ArtifactError(
            f"{json_path} has format {version}; this mqc reads format {FORMAT_VERSION}",
            hint="compile the model again with this version",
        )
    params = ParamStore()
    try:
        with safe_open(params_path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                params[name] = _lazy(params_path, name)
    except SafetensorError as error:
        raise ArtifactError(
            f"{params_path} is damaged: {error}", hint="compile it again"
        ) from error
    return program_from_json(data, params)


def program_from_json(data: dict[str, Any], params: ParamStore) -> Program:
    """Inverse of :func:`program_to_json`, with ``params``."""
    components = [component_from_json(item) for item in data["components"]]
    return Program(
        {component.name: component for component in components},
        params,
        [Link((a[0], a[1]), (b[0], b[1])) for a, b in data["links"]],
        data["facts"],
        dtype_from_name(data["dtype"]),
        data["dialect"],
        data["history"],
    )


def _lazy(path: Path, name: str) -> Loader:
    def load() -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    return load
