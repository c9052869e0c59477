"""The default adapter: tiles of one fixed size; and what every adapter can say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from mqc.errors import CaptureError, CheckpointError

Call = dict[str, torch.Tensor]
"""Inputs of one call of the vision tower, by name."""

LINEAR_ATTENTION = "linear_attention"
"""The kind of a recurrent layer (:mod:`mqc.capture.recurrent`)."""

Features = torch.Tensor | tuple[torch.Tensor, ...]
"""What a tower gives: rows [visual_tokens, hidden], the embeddings first, then the side inputs."""


@dataclass(frozen=True)
class DynamicSize:
    """A size that may change from call to call: ``factor * symbol``, ``example`` at capture.

    ``least`` and ``most`` bound the symbol where the model does (a table of positions, say).
    """

    symbol: str
    factor: int = 1
    example: int = 6
    least: int = 1
    most: int | None = None


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

    takes_modality: bool = False
    """Whether the decoder itself asks which rows are visual (weights of their own for them)."""

    video_reader: str | None = None
    """transformers' video processor class of the family (:mod:`mqc.capture.videos`); None where
    its prompts have no video."""

    mixes_media: bool = True
    """Whether one prompt may hold images and videos, as the family's processor gives them."""

    fused_attention: bool = True
    """False once a part of the model turned out to have no implementation with SDPA."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config

    @property
    def side_inputs(self) -> int:
        """Visual rows that the decoder takes besides its embeddings (``deepstack_i``): how many."""
        return 0

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

    @property
    def video_token_id(self) -> int | None:
        """The token that stands for rows of videos; None where the image token does, or none."""
        for name in ("video_token_id", "video_token_index") if self.video_reader else ():
            value = getattr(self.config, name, None)
            if value is not None:
                return int(value)
        return None

    def check(self) -> None:
        """Raise :class:`CaptureError` for a model that three plain graphs would compute wrongly.

        The decoder keeps every key, and the memory of gated DeltaNet layers.
        """
        kinds = set(self.attention_kinds()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise CaptureError(
                f"the language model {self.text_config.model_type!r} has layers of kind "
                f"{', '.join(sorted(kinds))}; only full, sliding and linear attention (gated "
                "DeltaNet) are supported",
                hint="use a model of such layers",
            )
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(self.text_config, name, None) is not None:
                raise CaptureError(
                    f"the language model {self.text_config.model_type!r} caps its logits "
                    f"({name}), which the captured graphs do not compute",
                    hint=f"use a model without {name}",
                )
        if not self.fused_attention:
            raise CaptureError(
                f"a part of model type {self.config.model_type!r} has no attention by "
                "scaled_dot_product_attention, and its own takes other masks",
                hint="use a model that transformers implements with SDPA",
            )
        if getattr(self.text_config, "is_encoder_decoder", False):
            raise CaptureError(
                f"the language model {self.text_config.model_type!r} is an encoder with a decoder; "
                "mqc compiles models whose one decoder reads the image's rows",
                hint="use a variant with a decoder-only language model",
            )

    def attention_kinds(self) -> dict[str, int | None]:
        """Kinds of the language model's layers -> how many tokens they look back (None: all).

        The decoder takes one mask per kind, in this order, on axis 1 of its input ``mask``.
        """
        config = self.text_config
        window = getattr(config, "sliding_window", None)
        limit = getattr(config, "max_position_embeddings", None)
        if not getattr(config, "use_sliding_window", True) or (limit and window and window > limit):
            window = None
        kinds = dict.fromkeys(getattr(config, "layer_types", None) or ())
        kinds.pop(LINEAR_ATTENTION, None)  # it takes no mask
        if not kinds:
            return {"full_attention": None} if window is None else {"sliding_attention": window}
        return {kind: window if kind == "sliding_attention" else None for kind in kinds}

    @property
    def recurrent(self) -> bool:
        """Whether layers of the language model keep a memory in place of keys and values."""
        return LINEAR_ATTENTION in (getattr(self.text_config, "layer_types", None) or ())

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
                hint="write an adapter: see mqc/capture/adapters",
            )
        height, width = _pair(size)
        channels = int(getattr(self.vision_config, "num_channels", 3))
        shape = (DynamicSize("images", example=3), channels, height, width)
        return [VisionInput("pixel_values", shape, ("image", None, None, None))]

    def image_embeds(self, model: PreTrainedModel, *inputs: torch.Tensor) -> Features:
        """Tower and connector, traced: rows for the decoder, [visual_tokens, hidden].

        A family with :attr:`side_inputs` returns as many further tensors of the same shape.
        """
        output = base_model(model).get_image_features(inputs[0], return_dict=True)
        features = output.pooler_output
        if not isinstance(features, torch.Tensor):
            raise CaptureError(
                f"the vision tower of model type {self.config.model_type!r} returns "
                f"{len(features)} separate pieces, not one tensor",
                hint="write an adapter: see mqc/capture/adapters",
            )
        return features.reshape(-1, features.shape[-1])

    def embed(self, model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [batch, tokens, hidden] of token ids, traced."""
        embeddings: torch.Tensor = model.get_input_embeddings()(input_ids)
        return embeddings

    def decoder_arguments(
        self, side: list[torch.Tensor], modality: torch.Tensor | None
    ) -> dict[str, Any]:
        """Further arguments of the decoder's call, traced.

        ``side``: the side inputs [batch, tokens, hidden], zero in text rows. ``modality``: bool
        [batch, tokens], True in visual rows, for a family that :attr:`takes_modality`.
        """
        return {}

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

    def video_calls(self, processed: Mapping[str, Any]) -> list[Call]:
        """Tower calls for the tokens of :meth:`modalities` 2, in the order of these tokens.

        Empty where :meth:`vision_calls` gives the frames: as images among images.
        """
        return []

    def modalities(self, input_ids: torch.Tensor) -> torch.Tensor:
        """What each token of one sequence stands for: int64 [tokens], 0 text, 1 image, 2 video."""
        kinds = (input_ids == self.image_token_id).to(torch.int64)
        if self.video_token_id is not None:
            kinds[input_ids == self.video_token_id] = 2
        return kinds

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

    def attention_blocks(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Tokens that attend each other both ways, for one sequence ``input_ids`` int64 [tokens].

        int64 [tokens]: tokens of one number >= 0 see each other, -1 is causal. None (the default)
        where attention is causal throughout.
        """
        return None

    def _image_runs(self, processed: Mapping[str, Any]) -> Iterator[int]:
        ids = processed.get("input_ids")
        if ids is None:
            return
        for row in torch.as_tensor(ids).reshape(-1, torch.as_tensor(ids).shape[-1]).tolist():
            for is_image, run in groupby(row, key=lambda token: token == self.image_token_id):
                if is_image:
                    yield len(list(run))


def base_model(model: PreTrainedModel) -> Any:
    """The model below the language head."""
    return model.base_model


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, (list, tuple)):
        return int(value[0]), int(value[1])
    return int(value), int(value)
