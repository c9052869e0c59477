"""What differs between model families, in one small class each.

Everything else in mqc is found in the graph; an adapter says only what the graph cannot: how to
call the vision tower, how a processor's output splits into tower calls, and which positions the
tokens have. Adapters are made from a configuration alone, so the run-time host of a compiled
artifact uses the same ones: ``adapter_for(folder_with_config_json)``.

To add a family, subclass :class:`Adapter` (tiles of one fixed size) or :class:`GridAdapter`
(patches of a variable grid), override what differs, and decorate the class with
``@register("its_model_type")``. A family without an adapter gets :class:`Adapter` itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.vision_utils import get_vision_position_ids

from mqc.capture.segments import use_segment_attention
from mqc.errors import CaptureError, CheckpointError

Call = dict[str, torch.Tensor]


@dataclass(frozen=True)
class DynamicSize:
    """A size that may change from call to call: ``factor * symbol``, ``example`` at capture."""

    symbol: str
    factor: int = 1
    example: int = 6


@dataclass(frozen=True)
class VisionInput:
    """One input of the vision tower. ``dtype`` None means the program's compute dtype."""

    name: str
    shape: tuple[int | DynamicSize, ...]
    axes: tuple[str | None, ...]
    dtype: torch.dtype | None = None


class Adapter:
    """A tower over tiles of one fixed size: ``pixel_values`` [images, 3, height, width].

    Fits every family whose ``get_image_features`` returns one tensor [images, tokens, hidden] and
    whose text positions count 0, 1, 2, ...
    """

    rope_axes: int = 1
    """Rows of the position ids: 1 ([batch, tokens]) or 3 ([3, batch, tokens])."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config

    @property
    def text_config(self) -> PretrainedConfig:
        config: PretrainedConfig = self.config.get_text_config(decoder=True)
        return config

    @property
    def vision_config(self) -> Any:
        """The tower's configuration. Raises :class:`CaptureError` for a model without a tower."""
        config = getattr(self.config, "vision_config", None)
        if config is None:
            raise CaptureError(
                f"model type {self.config.model_type!r} has no vision tower",
                hint="mqc compiles image-text-to-text models",
            )
        return config

    @property
    def image_token_id(self) -> int:
        for name in ("image_token_id", "image_token_index"):
            value = getattr(self.config, name, None)
            if value is not None:
                return int(value)
        raise CheckpointError(
            f"config.json of model type {self.config.model_type!r} names no image token",
            hint='add "image_token_id" to config.json',
        )

    def check(self) -> None:
        """Raise :class:`CaptureError` for a model that three plain graphs would compute wrongly.

        The decoder takes one mask for all layers and keeps every key: layers with a sliding
        window or a recurrent state do not fit.
        """
        config = self.text_config
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
        window = getattr(config, "sliding_window", None)
        if window is not None and getattr(config, "use_sliding_window", True):
            limit = getattr(config, "max_position_embeddings", None)
            if limit is None or window < limit:
                kinds.add("sliding_attention")
        if kinds:
            raise CaptureError(
                f"the language model {config.model_type!r} has layers of kind "
                f"{', '.join(sorted(kinds))}; only full attention is supported",
                hint="use a model whose layers all attend to the whole context",
            )

    # -- capture ---------------------------------------------------------------------------------

    def prepare(self, model: PreTrainedModel) -> None:
        """Change ``model`` before it is traced (attention functions); default: nothing."""

    def vision_inputs(self) -> list[VisionInput]:
        """The tower's inputs, in the order :meth:`image_embeds` takes them."""
        size = getattr(self.vision_config, "image_size", None)
        if size is None:
            raise CaptureError(
                f"model type {self.config.model_type!r} has no adapter, and its vision tower has "
                "no fixed image size",
                hint="write an adapter: see mqc/capture/adapters.py",
            )
        height, width = _pair(size)
        channels = int(getattr(self.vision_config, "num_channels", 3))
        shape = (DynamicSize("images", example=3), channels, height, width)
        return [VisionInput("pixel_values", shape, ("image", None, None, None))]

    def image_embeds(self, model: PreTrainedModel, *inputs: torch.Tensor) -> torch.Tensor:
        """Tower and connector, traced: rows for the decoder, [visual_tokens, hidden]."""
        output = _base(model).get_image_features(inputs[0], return_dict=True)
        features = output.pooler_output
        if not isinstance(features, torch.Tensor):
            raise CaptureError(
                f"the vision tower of model type {self.config.model_type!r} returns "
                f"{len(features)} separate pieces, not one tensor",
                hint="write an adapter: see mqc/capture/adapters.py",
            )
        return features.reshape(-1, features.shape[-1])

    # -- run time --------------------------------------------------------------------------------

    def vision_calls(self, processed: Mapping[str, Any]) -> list[Call]:
        """Tower calls for one batch of a processor's output, in the order of its image tokens.

        Tiles of one image go together: a run of image tokens in ``input_ids`` that is ``n`` times
        as long as one tile's tokens takes ``n`` tiles.
        """
        pixels = processed.get("pixel_values")
        if pixels is None:
            return []
        pixels = torch.as_tensor(pixels)
        per_tile = self.tokens_per_tile()
        counts = [length // per_tile for length in self._image_runs(processed)] if per_tile else []
        if sum(counts) != len(pixels):
            counts = [1] * len(pixels)
        return [{"pixel_values": tiles} for tiles in pixels.split(counts)]

    def tokens_per_tile(self) -> int | None:
        """Image tokens that one tile becomes, or None where the configuration does not say."""
        value = getattr(self.config, "image_seq_length", None)
        return int(value) if value else None

    def position_ids(
        self, input_ids: torch.Tensor, processed: Mapping[str, Any]
    ) -> tuple[torch.Tensor, int]:
        """Positions of one sequence: (int64 [tokens] or [3, tokens], the next free position)."""
        length = int(input_ids.shape[-1])
        return torch.arange(length), length

    def _image_runs(self, processed: Mapping[str, Any]) -> Iterator[int]:
        ids = processed.get("input_ids")
        if ids is None:
            return
        for row in torch.as_tensor(ids).reshape(-1, torch.as_tensor(ids).shape[-1]).tolist():
            for is_image, run in groupby(row, key=lambda token: token == self.image_token_id):
                if is_image:
                    yield len(list(run))


class GridAdapter(Adapter):
    """A tower over patches of a variable grid: one call is one image of ``t * h * w`` patches.

    The processor gives flat patches ``pixel_values`` [patches, features] and ``image_grid_thw``
    [images, 3]; positions inside the grid are an input of the graph. Text positions follow the
    family's own ``get_rope_index``, called without a model.
    """

    rope_axes = 3

    def prepare(self, model: PreTrainedModel) -> None:
        use_segment_attention(model)

    @property
    def merge(self) -> int:
        """Patches along one side that become one visual token."""
        return int(self.vision_config.spatial_merge_size)

    def vision_inputs(self) -> list[VisionInput]:
        vision = self.vision_config
        features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = DynamicSize("blocks", self.merge**2)
        return [
            VisionInput("pixel_values", (patches, features), ("patch", None)),
            VisionInput("position_ids", (patches, 2), ("patch", None), torch.int64),
        ]

    def image_embeds(self, model: PreTrainedModel, *inputs: torch.Tensor) -> torch.Tensor:
        pixel_values, position_ids = inputs
        output = _base(model).visual(
            pixel_values,
            grid_thw=None,
            position_ids=position_ids,
            cu_seqlens=torch.zeros(2, dtype=torch.int32),
            max_seqlen=1,
        )
        embeds: torch.Tensor = output.pooler_output
        return embeds

    def vision_calls(self, processed: Mapping[str, Any]) -> list[Call]:
        pixels, grids = processed.get("pixel_values"), processed.get("image_grid_thw")
        if pixels is None or grids is None:
            return []
        grids = torch.as_tensor(grids).reshape(-1, 3)
        pieces = torch.as_tensor(pixels).split(grids.prod(-1).tolist())
        return [
            {"pixel_values": piece, "position_ids": get_vision_position_ids(grid[None], self.merge)}
            for piece, grid in zip(pieces, grids, strict=True)
        ]

    def position_ids(
        self, input_ids: torch.Tensor, processed: Mapping[str, Any]
    ) -> tuple[torch.Tensor, int]:
        ids = torch.as_tensor(input_ids).reshape(1, -1)
        grids = processed.get("image_grid_thw")
        image = ids == self.image_token_id
        if grids is None or not bool(image.any()):
            length = int(ids.shape[-1])
            return torch.arange(length).expand(3, -1).contiguous(), length
        positions, _ = _Unbound(self.config).get_rope_index(
            ids,
            mm_token_type_ids=image.to(torch.int32),
            image_grid_thw=torch.as_tensor(grids).reshape(-1, 3),
        )
        return positions[:, 0].contiguous(), int(positions.max()) + 1


class _Unbound:
    """The methods of the family's model class, callable with a configuration instead of a model."""

    def __init__(self, config: PretrainedConfig) -> None:
        from transformers import MODEL_MAPPING

        self.config = config
        self._class = MODEL_MAPPING[type(config)]

    def __getattr__(self, name: str) -> Any:
        value = inspect.getattr_static(self._class, name)
        return value.__get__(self, self._class) if hasattr(value, "__get__") else value


_REGISTRY: dict[str, type[Adapter]] = {}


def register(*model_types: str) -> Callable[[type[Adapter]], type[Adapter]]:
    """Class decorator: use the adapter for configurations of these ``model_type``."""

    def add(adapter: type[Adapter]) -> type[Adapter]:
        for model_type in model_types:
            _REGISTRY[model_type] = adapter
        return adapter

    return add


def adapter_for(config: PretrainedConfig | str | Path) -> Adapter:
    """The adapter of a configuration, or of a folder that holds a ``config.json``.

    Raises :class:`CheckpointError` where the folder has no readable configuration.
    """
    if isinstance(config, (str, Path)):
        try:
            config = AutoConfig.from_pretrained(str(config), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"no usable config.json in {config}: {error}",
                hint="give a folder in the Hugging Face layout",
            ) from error
    return _REGISTRY.get(config.model_type, Adapter)(config)


@register("qwen2_vl")
class Qwen2VLAdapter(GridAdapter):
    """Qwen2-VL: a grid tower and three-axis positions."""


@register("internvl")
class InternVLAdapter(Adapter):
    """InternVL: tiles, pixel shuffle and an MLP connector."""


@register("llava")
class LlavaAdapter(Adapter):
    """LLaVA: the hidden states of one or several tower layers through an MLP connector."""

    def prepare(self, model: PreTrainedModel) -> None:
        if self.vision_config.model_type == "pixtral":
            raise CaptureError(
                "LLaVA with a Pixtral tower (images of any size in one call) is not supported",
                hint="use a checkpoint with a CLIP or SigLIP tower",
            )

    def image_embeds(self, model: PreTrainedModel, *inputs: torch.Tensor) -> torch.Tensor:
        base = _base(model)
        states = base.vision_tower(inputs[0], output_hidden_states=True).hidden_states
        layers = self.config.vision_feature_layer
        chosen = [states[i] for i in ([layers] if isinstance(layers, int) else layers)]
        if self.config.vision_feature_select_strategy == "default":
            chosen = [state[:, 1:] for state in chosen]
        features = base.multi_modal_projector(torch.cat(chosen, -1) if chosen[1:] else chosen[0])
        return features.reshape(-1, features.shape[-1])  # type: ignore[no-any-return]


def _base(model: PreTrainedModel) -> Any:
    """The model below the language head."""
    return model.base_model


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, (list, tuple)):
        return int(value[0]), int(value[1])
    return int(value), int(value)
