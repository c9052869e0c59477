"""``capture``: a checkpoint or a model becomes a :class:`~mqc.ir.Program`."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from mqc.capture.adapters import Adapter, adapter_for, is_registered
from mqc.capture.experts import use_dense_experts
from mqc.capture.export import (
    cache_shape,
    export_decoder,
    export_embed,
    export_vision,
    side_names,
)
from mqc.capture.importer import Imported, import_component
from mqc.capture.locate import checkpoint_folder, load_config
from mqc.capture.processor import Processor, load_processor
from mqc.capture.recurrent import use_gated_delta
from mqc.capture.skeleton import Skeleton, build_skeleton
from mqc.capture.weights import (
    QUANTIZED_HINT,
    FolderWeights,
    ModelWeights,
    NoWeights,
    checked,
    holds_weights,
    quantized_by,
)
from mqc.errors import CaptureError, CheckpointError
from mqc.ir import Link, ParamStore, Program, TensorType

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""

LINKS = [
    Link(("vision", "image_embeds"), ("decoder", "inputs_embeds")),
    Link(("embed", "embeddings"), ("decoder", "inputs_embeds")),
]


class Source:
    """A model to capture: its configuration, where its weights are, how to build its skeleton."""

    def __init__(
        self,
        model: PreTrainedModel | PretrainedConfig | str | Path,
        revision: str | None = None,
        trust_remote_code: bool = False,
        *,
        weights: bool | None = True,
    ) -> None:
        """Locate and check the model; no weights are read, nor looked for without ``weights``.

        ``weights`` None: those that are on this machine; none are downloaded.

        Raises :class:`CheckpointError`, or :class:`CaptureError` for a model that cannot be
        represented.
        """
        self.folder: Path | None = None
        self.weights: FolderWeights | ModelWeights | NoWeights
        self.generation: GenerationConfig | None
        if isinstance(model, PreTrainedModel):
            self.config = copy.deepcopy(model.config)
            self.weights = NoWeights() if weights is False else ModelWeights(model)
            self.generation = getattr(model, "generation_config", None)
            self.facts: dict[str, Any] = {"name": type(model).__name__, "kind": "model"}
            kind = type(model)
            self._build: Callable[[], PreTrainedModel] = lambda: kind(self.config)
        else:
            if isinstance(model, PretrainedConfig):
                self.config = copy.deepcopy(model)
                self.facts = {"name": str(model.model_type), "kind": "config"}
                self.generation, self.weights = None, NoWeights()
            else:
                self.folder = checkpoint_folder(model, revision, weights=weights is True)
                self.config = load_config(self.folder, trust_remote_code)
                wanted = holds_weights(self.folder) if weights is None else weights
                self.weights = FolderWeights(self.folder) if wanted else NoWeights()
                self.generation = _generation_config(self.folder)
                self.facts = _provenance(model, self.folder)
            _require_supported(self.config, trust_remote_code)
            self._build = lambda: AutoModelForImageTextToText.from_config(
                self.config, trust_remote_code=trust_remote_code
            )
        self.adapter: Adapter = adapter_for(self.config)
        if not is_registered(self.config.model_type):
            logger.warning(
                "model type %r has no adapter of its own and is taken for a LLaVA-like model; "
                "compare its answers with transformers' before relying on them",
                self.config.model_type,
            )

    def skeleton(self, dtype: torch.dtype) -> Skeleton:
        """Build the model without weights. Raises :class:`CaptureError`."""
        self.config.dtype = dtype
        try:
            skeleton = build_skeleton(self._build, dtype)
            try:
                skeleton.model.set_attn_implementation("sdpa")
            except ValueError:
                self.adapter.fused_attention = False
            use_dense_experts(skeleton.model)
            use_gated_delta(skeleton.model, self.adapter.text_config)
            self.adapter.prepare(skeleton.model)
        except (CaptureError, CheckpointError):
            raise
        except Exception as error:
            raise CaptureError(
                f"a model of type {self.config.model_type!r} cannot be built: {error}",
                hint="check config.json against the transformers version in use",
            ) from error
        return skeleton

    def describe(self) -> dict[str, Any]:
        """Provenance for ``facts["source"]``: no paths of this machine, the same everywhere.

        A hub snapshot is named by its commit; the weight files of any other folder are hashed.
        """
        if isinstance(self.weights, FolderWeights) and self.facts["kind"] != "hub":
            return {**self.facts, "sha256": self.weights.digest()}
        return dict(self.facts)


def check_processor(folder: Path, trust_remote_code: bool = False) -> Processor:
    """The processor of a checkpoint that can be asked something; no weights are looked for.

    Raises :class:`CheckpointError` for a model that is no image-text model, for tokenizer and
    processor files that are missing or damaged, and without a chat template.
    """
    _require_supported(load_config(folder, trust_remote_code), trust_remote_code)
    processor = load_processor(folder, trust_remote_code)
    if not (
        getattr(processor.hf, "chat_template", None)
        or getattr(processor.tokenizer, "chat_template", None)
    ):
        raise CheckpointError(
            f"{folder} has no chat template: prompts cannot be written",
            hint="add chat_template.jinja (the original checkpoint has one)",
        )
    return processor


def capture(
    model_or_path: PreTrainedModel | str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Program:
    """Capture a vision-language model as a program of three graphs.

    Args:
        model_or_path: a folder in the Hugging Face layout, a hub id, the name of an embedded
            model, or a model in memory (which is not changed).
        dtype: compute dtype of the program; weights are cast to it when read.
        revision: branch, tag or commit of a hub id.
        trust_remote_code: let transformers run code that comes with the checkpoint.
        progress: called as the capture goes on.

    Returns:
        A program with the components ``vision``, ``embed`` and ``decoder``; see
        :mod:`mqc.capture` for their interfaces. Weights are read when first used.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete, damaged or not supported.
        CaptureError: a component could not be turned into a graph.
    """
    source = Source(model_or_path, revision, trust_remote_code)
    return _capture(source, dtype, progress or (lambda what, done, total: None))


def capture_shapes(
    model: PreTrainedModel | PretrainedConfig | str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Program:
    """Capture a model of which only the configuration is there: to plan with, not to run.

    As :func:`capture`, but parameters are fake tensors (shape and dtype, no storage), and a folder
    or hub id needs no weights. Passes that ask for no values work on such a program, at any size
    of model.
    """
    source = Source(model, revision, trust_remote_code, weights=False)
    return _capture(source, dtype, lambda what, done, total: None)


def _capture(source: Source, dtype: torch.dtype, report: Progress) -> Program:
    source.adapter.check()
    report("building the model", 0, 5)
    skeleton = source.skeleton(dtype)
    check_shapes(source, skeleton)
    tied = skeleton.tied()
    imported: dict[str, Imported] = {}
    exporters = component_exporters(source.adapter, skeleton, dtype)
    for step, (name, export) in enumerate(exporters.items(), start=1):
        report(f"capturing {name}", step, 5)
        imported[name] = import_component(export(), tied)
    report("linking weights", 4, 5)
    params = link_weights(source, skeleton, imported)
    facts = model_facts(source)
    tower = imported["vision"].component
    facts["tiles"] = all(port.axes[:1] == ("image",) for port in tower.inputs)
    report("captured", 5, 5)
    return Program(
        {name: item.component for name, item in imported.items()},
        params,
        [*LINKS, *(Link(("vision", n), ("decoder", n)) for n in side_names(source.adapter))],
        facts,
        dtype,
    )


def component_exporters(
    adapter: Adapter, skeleton: Skeleton, dtype: torch.dtype
) -> dict[str, Callable[[], Any]]:
    """What exports each component, by name."""

    def decoder() -> Any:
        adapter.check()
        return export_decoder(skeleton, adapter, dtype)

    return {
        "vision": lambda: export_vision(skeleton, adapter, dtype),
        "embed": lambda: export_embed(skeleton, adapter),
        "decoder": decoder,
    }


def check_shapes(source: Source, skeleton: Skeleton) -> None:
    """Raise :class:`CheckpointError` if a weight has another shape than the model's parameter."""
    types = {
        name: (tuple(value.shape), value.dtype)
        for name, value in skeleton.model.named_parameters(remove_duplicate=False)
    }
    source.weights.loaders(skeleton.model, types)


def link_weights(source: Source, skeleton: Skeleton, imported: dict[str, Imported]) -> ParamStore:
    """Loaders for every parameter that the graphs read, and the constants' values.

    Raises :class:`CheckpointError` naming parameters that the checkpoint does not hold.
    """
    types: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    constants: dict[str, torch.Tensor] = {}
    for item in imported.values():
        constants.update(item.constants)
        for node in item.component.graph.find_nodes(op="get_attr"):
            kind = node.meta["type"]
            assert isinstance(kind, TensorType)
            types[str(node.target)] = (tuple(int(n) for n in kind.shape), kind.dtype)
    aliases = _aliases(skeleton, types)
    loaders = source.weights.loaders(
        skeleton.model, {alias: types[name] for alias, name in aliases.items()}
    )
    params = ParamStore()
    missing = []
    for name in sorted(types):
        found = [alias for alias, target in aliases.items() if target == name and alias in loaders]
        if found:
            params[name] = loaders[name if name in found else found[0]]
        elif name in constants:
            params[name] = checked(constants[name], name, "the model's constants")
        else:
            missing.append(name)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        method = quantized_by(source.config)
        if method is not None:
            raise CheckpointError(
                f"the checkpoint {source.facts['name']!r} is quantized already, by {method}: it "
                f"lacks {', '.join(missing[:3])}{more}",
                hint=QUANTIZED_HINT,
            )
        raise CheckpointError(
            f"the checkpoint {source.facts['name']!r} lacks {', '.join(missing[:3])}{more}",
            hint="the download is incomplete, or config.json belongs to another model",
        )
    return params


def _aliases(skeleton: Skeleton, types: dict[str, Any]) -> dict[str, str]:
    """Every name under which a checkpoint may hold a parameter -> the graph's name for it."""
    tied = {alias: name for alias, name in skeleton.tied().items() if name in types}
    return {**{name: name for name in types}, **tied}


def model_facts(source: Source) -> dict[str, Any]:
    """What later stages and the run-time host need to know, as JSON data."""
    adapter, config = source.adapter, source.adapter.text_config
    layers, heads, head_dim = cache_shape(adapter)
    eos = _first(source.generation, "eos_token_id", config, source.config)
    pad = _first(source.generation, "pad_token_id", config, source.config)
    return {
        "adapter": str(source.config.model_type),
        "image_token_id": adapter.image_token_id,
        "eos_token_ids": [] if eos is None else [eos] if isinstance(eos, int) else list(eos),
        "pad_token_id": pad,
        "hidden_size": int(config.hidden_size),
        "vocab_size": int(config.vocab_size),
        "kv_layers": layers,
        "kv_heads": heads,
        "head_dim": head_dim,
        "max_positions": getattr(config, "max_position_embeddings", None),
        "rope_axes": adapter.rope_axes,
        "deepstack": side_names(adapter),
        "recurrent": adapter.recurrent,
        "attention_windows": list(adapter.attention_kinds().values()),
        "source": source.describe(),
    }


def _provenance(name: str | Path, folder: Path) -> dict[str, Any]:
    if folder.parent.name == "snapshots":  # huggingface_hub's cache: snapshots/<commit>
        return {"name": str(name), "kind": "hub", "revision": folder.name}
    return {"name": folder.name, "kind": "folder"}


def _first(generation: GenerationConfig | None, name: str, *configs: PretrainedConfig) -> Any:
    for holder in (generation, *configs):
        value = getattr(holder, name, None)
        if value is not None:
            return value
    return None


def _generation_config(folder: Path) -> GenerationConfig | None:
    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"generation_config.json in {folder} cannot be read: {error}",
            hint="repair the file or delete it",
        ) from error


def _require_supported(config: PretrainedConfig, trust_remote_code: bool) -> None:
    """Raise :class:`CheckpointError` unless transformers has an image-text model for ``config``."""
    known = type(config) in AutoModelForImageTextToText._model_mapping
    remote = "AutoModelForImageTextToText" in (getattr(config, "auto_map", None) or {})
    if known or (remote and trust_remote_code):
        return
    raise CheckpointError(
        f"model type {config.model_type!r} is not an image-text-to-text model of transformers",
        hint="the checkpoint brings its own code: allow it with trust_remote_code"
        if remote
        else "mqc compiles vision-language models such as Qwen2-VL, LLaVA and InternVL",
    )
