"""Which adapter belongs to which model type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PretrainedConfig

from mqc.capture.adapters.base import Adapter
from mqc.capture.locate import load_config

_REGISTRY: dict[str, type[Adapter]] = {}


def register(*model_types: str) -> Callable[[type[Adapter]], type[Adapter]]:
    """Class decorator: use the adapter for configurations of these ``model_type``.

    A name ``"model_type:tower"`` is for that model with a vision tower of type ``tower`` and goes
    before ``"model_type"``.
    """

    def add(adapter: type[Adapter]) -> type[Adapter]:
        for model_type in model_types:
            _REGISTRY[model_type] = adapter
        return adapter

    return add


def is_registered(model_type: str) -> bool:
    """Whether somebody has said which adapter fits ``model_type``; others get the default."""
    return model_type in _REGISTRY


def adapter_for(config: PretrainedConfig | str | Path, trust_remote_code: bool = False) -> Adapter:
    """The adapter of a configuration, or of a folder that holds a ``config.json``.

    Raises :class:`CheckpointError` where the folder has no readable configuration.
    """
    if isinstance(config, (str, Path)):
        config = load_config(Path(config), trust_remote_code)
    tower = getattr(getattr(config, "vision_config", None), "model_type", "")
    default = _REGISTRY.get(config.model_type, Adapter)
    return _REGISTRY.get(f"{config.model_type}:{tower}", default)(config)
