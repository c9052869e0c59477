"""Where the values of parameters come from: safetensors files, or a model in memory.

A source yields loaders, not tensors: nothing is read before a parameter is used, and a tensor is
checked (shape, finite values) and cast when it is. Names in a checkpoint are translated by the
same table that ``from_pretrained`` applies.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from mqc.errors import CheckpointError

Loader = Callable[[], torch.Tensor]

_CORRUPT_HINT = "download or save the checkpoint again"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F64", "F32", "F16", "BF16")
QUANTIZED_HINT = (
    "mqc quantizes by itself: give the checkpoint in bfloat16, float16 or float32 (the original, "
    "or one that transformers loaded with dequantize=True and saved again)"
)


class FolderWeights:
    """The safetensors files of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all weight files (no tensor data).

        Raises :class:`CheckpointError`: no safetensors file, a pickle-only checkpoint, a damaged
        index, a missing or truncated file.
        """
        self.folder = folder
        self.files = _weight_files(folder)
        self.where: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for path in self.files:
            try:
                with safe_open(path, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                        part = file.get_slice(key)
                        self.where[key] = path
                        self.shapes[key] = tuple(part.get_shape())
                        self.dtypes[key] = str(part.get_dtype())
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is truncated or damaged: {error}", hint=_CORRUPT_HINT
                ) from error

    def loaders(
        self, model: PreTrainedModel, types: dict[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> dict[str, Loader]:
        """Loaders for the parameters named in ``types`` (name -> shape, dtype).

        ``model`` is the skeleton that transformers' conversion table is asked about. Parameters
        that the checkpoint does not hold are left out. Raises :class:`CheckpointError` for a wrong
        shape and for integers or 8-bit floats in place of floats (headers tell, nothing is read).
        """
        keys = _translated(model, self.where)
        result: dict[str, Loader] = {}
        for name, (shape, dtype) in types.items():
            if name not in keys:
                continue
            key, swap = keys[name]
            if dtype.is_floating_point and self.dtypes[key] not in _FLOATS:
                raise CheckpointError(
                    f"tensor {key!r} in {self.where[key]} is stored as {self.dtypes[key]}: this "
                    "checkpoint is quantized already",
                    hint=QUANTIZED_HINT,
                )
            stored = self.shapes[key]
            if swap is not None and (not swap.only_if_needed or stored != shape):
                stored = swap.shape(stored)
            else:
                swap = None
            if stored != shape:
                raise CheckpointError(
                    f"tensor {key!r} in {self.where[key]} has shape {list(self.shapes[key])}; "
                    f"config.json asks for {list(shape)}",
                    hint="config.json and the weights belong to different models",
                )
            result[name] = self._loader(key, dtype, swap)
        return result

    def _loader(self, key: str, dtype: torch.dtype, swap: _Swap | None) -> Loader:
        path = self.where[key]

        def load() -> torch.Tensor:
            try:
                with safe_open(path, framework="pt") as file:
                    tensor: torch.Tensor = file.get_tensor(key)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"tensor {key!r} in {path} cannot be read: {error}", hint=_CORRUPT_HINT
                ) from error
            if swap is not None:
                tensor = tensor.transpose(*swap.axes).contiguous()
            return checked(tensor, key, str(path)).to(dtype)

        return load

    def digest(self) -> dict[str, str]:
        """sha256 of every weight file by name. Reads the files."""
        result = {}
        for path in self.files:
            with path.open("rb") as file:
                result[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return result


class NoWeights:
    """No weights at all: parameters keep the skeleton's fake tensors, which have a shape only."""

    def loaders(
        self, model: PreTrainedModel, types: dict[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> dict[str, Loader]:
        """Loaders that give the fake tensors; a graph of them can be planned, not run."""
        fakes = dict(model.named_parameters(remove_duplicate=False))
        return {name: fakes[name].detach for name in types if name in fakes}

    def digest(self) -> dict[str, str]:
        return {}


class ModelWeights:
    """The parameters and buffers of a model in memory."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.values = dict(model.named_parameters(remove_duplicate=False))
        self.values.update(dict(model.named_buffers(remove_duplicate=False)))

    def loaders(
        self, model: PreTrainedModel, types: dict[str, tuple[tuple[int, ...], torch.dtype]]
    ) -> dict[str, Loader]:
        """As :meth:`FolderWeights.loaders`; a value changed after capture is read as changed
        until it is first used."""
        result: dict[str, Loader] = {}
        for name, (shape, dtype) in types.items():
            value = self.values.get(name)
            if value is None:
                continue
            if value.device.type == "meta":
                raise CheckpointError(
                    f"parameter {name!r} of the model is on the meta device: it has no values",
                    hint="load the model without a meta device, or give its folder",
                )
            if dtype.is_floating_point and not _plain_float(value):
                raise CheckpointError(
                    f"parameter {name!r} of the model is {value.dtype}: the model is quantized "
                    "already",
                    hint=QUANTIZED_HINT,
                )
            if tuple(value.shape) != shape:
                raise CheckpointError(
                    f"parameter {name!r} of the model has shape {list(value.shape)}; its "
                    f"configuration asks for {list(shape)}",
                    hint="resize the configuration with the model",
                )
            result[name] = self._loader(name, value, dtype)
        return result

    @staticmethod
    def _loader(name: str, value: torch.Tensor, dtype: torch.dtype) -> Loader:
        def load() -> torch.Tensor:
            tensor = checked(value.detach(), name, "the model in memory")
            return tensor.to("cpu", dtype, copy=True)

        return load


def _plain_float(value: torch.Tensor) -> bool:
    """Whether values are floats of 16 bits or more."""
    return value.dtype.is_floating_point and value.dtype.itemsize >= 2


def quantized_by(config: Any) -> str | None:
    """How a configuration says that its weights are quantized, e.g. "gptq"; None: it does not."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    name = settings.get("quant_method") if isinstance(settings, dict) else None
    name = name or getattr(settings, "quant_method", None) or "an unnamed method"
    return str(getattr(name, "value", name))


def checked(tensor: torch.Tensor, name: str, where: str) -> torch.Tensor:
    """``tensor``, or :class:`CheckpointError` if it holds NaN or infinity."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"tensor {name!r} in {where} holds {bad} NaN or infinite values",
            hint="the checkpoint is broken; download or train it again",
        )
    return tensor


def holds_weights(folder: Path) -> bool:
    """Whether there are weight files in ``folder``, of any form and state."""
    return any(any(folder.glob(f"*.{ending}")) for ending in ("safetensors", "bin", "pt*"))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    single = folder / "model.safetensors"
    if index.is_file():
        try:
            data: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
            names = sorted(set(data["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: {error}", hint=_CORRUPT_HINT) from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks weight files named in its index: {', '.join(missing)}",
                hint=_CORRUPT_HINT,
            )
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt*")
    )
    if pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({', '.join(pickles)}), which mqc never loads",
            hint="convert it: load it once with transformers and call "
            "save_pretrained(..., safe_serialization=True)",
        )
    raise CheckpointError(
        f"{folder} holds no model.safetensors", hint="give a complete Hugging Face checkpoint"
    )


@dataclass(frozen=True)
class _Swap:
    """Two axes that a checkpoint stores the other way round, always or where the shape says so."""

    axes: tuple[int, int]
    only_if_needed: bool

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        sizes = list(stored)
        one, two = self.axes
        sizes[one], sizes[two] = sizes[two], sizes[one]
        return tuple(sizes)


def _translated(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, tuple[str, _Swap | None]]:
    """Parameter name -> checkpoint key and how it is stored, as transformers converts on load.

    transformers' own functions do the renaming; this is the only place that calls them. A
    checkpoint whose tensors must be merged or split on load is refused.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        Transpose,
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    expected = model.state_dict()
    prefix = model.base_model_prefix
    result: dict[str, tuple[str, _Swap | None]] = {}
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = rename_source_key(key, [], [], prefix, expected)
        swap = None
        for converter in converters if pattern is not None else ():
            operations = converter.operations
            if pattern in converter.source_patterns and len(operations) == 1:
                (operation,) = operations
                if isinstance(operation, Transpose):
                    swap = _Swap((operation.dim0, operation.dim1), operation.check_dims)
        if pattern is not None and swap is None and name in expected:
            raise CheckpointError(
                f"tensor {key!r} needs a conversion of its values to become {name!r}, which mqc "
                "does not do",
                hint="load the model with transformers and save_pretrained() it first",
            )
        result[name] = (key, swap)
    return result
