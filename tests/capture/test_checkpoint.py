"""Checkpoints: names and shards read as transformers reads them, lazily; bad ones are refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mqc.capture import capture, weights
from mqc.capture.build import Source, link_weights
from mqc.capture.export import export_embed
from mqc.capture.importer import import_component
from mqc.errors import CheckpointError, MqcError
from mqc.ir import ParamStore
from mqc.testing.families import BASIC, build_family

SHARD = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    build_family("qwen2_vl")[0].save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})


def key_of(folder: Path, ending: str) -> str:
    """The one tensor in the file whose name has this ending."""
    (key,) = (name for name in load_file(folder / SHARD) if name.endswith(ending))
    return key


def refused(folder: Path | str, pattern: str) -> MqcError:
    """The error of capturing ``folder``; it matches ``pattern`` and names a remedy."""
    with pytest.raises(CheckpointError, match=pattern) as info:
        capture(folder)
    assert info.value.hint
    return info.value


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter of the model in ``folder``, read as capture reads it."""
    source = Source(folder)
    skeleton = source.skeleton(torch.float32)
    types = {
        name: (tuple(value.shape), value.dtype)
        for name, value in skeleton.model.named_parameters(remove_duplicate=False)
    }
    return {key: load() for key, load in source.weights.loaders(skeleton.model, types).items()}


def link_embedding(folder: Path) -> ParamStore:
    """Parameters of the embedding component alone (quick to export)."""
    source = Source(folder)
    skeleton = source.skeleton(torch.float32)
    component = import_component(export_embed(skeleton, source.adapter), skeleton.tied())
    return link_weights(source, skeleton, {"embed": component})


def same_as_from_pretrained(folder: Path) -> None:
    """All parameters are those that transformers loads, difference 0."""
    mine = read_all(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    parameters = dict(model.named_parameters())
    assert mine.keys() >= parameters.keys()
    for key, value in parameters.items():
        assert torch.equal(mine[key], value), key


def test_nothing_is_read_before_it_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = weights.checked

    def counting(tensor: torch.Tensor, name: str, where: str) -> torch.Tensor:
        if where.endswith(SHARD):
            read.append(name)
        return real(tensor, name, where)

    monkeypatch.setattr(weights, "checked", counting)
    program = capture(folder)
    assert read == []
    key = "model.visual.blocks.0.attn.qkv.weight"
    assert not program.params.is_loaded(key)
    assert program.params[key].shape == (120, 40)
    assert len(read) == 1


@pytest.mark.parametrize("family", [*sorted(BASIC), "qwen3_vl_moe"])
def test_names_of_first_releases(family: str, tmp_path: Path) -> None:
    """save_pretrained writes names, and for experts the order of axes, as first released."""
    build_family(family)[0].save_pretrained(tmp_path)
    head = {"qwen2_vl": "visual.", "llava": "language_model.lm_", "internvl": "language_model.lm_"}
    head["qwen3_vl_moe"] = "model.language_model.layers.0.mlp.experts."
    assert any(name.startswith(head[family]) for name in load_file(tmp_path / SHARD))
    same_as_from_pretrained(tmp_path)


def test_names_of_the_model_itself(folder: Path) -> None:
    model, _ = build_family("qwen2_vl")
    (folder / SHARD).unlink()
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, folder / SHARD, metadata={"format": "pt"})
    same_as_from_pretrained(folder)


def test_shards(tmp_path: Path) -> None:
    build_family("internvl")[0].save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    same_as_from_pretrained(tmp_path)
    assert len(Source(tmp_path).describe()["sha256"]) > 1
    first = sorted(tmp_path.glob("*-of-*.safetensors"))[0]
    first.unlink()
    refused(tmp_path, re.escape(first.name))


def test_tied_weight_under_its_other_name(folder: Path) -> None:
    embedding = key_of(folder, "embed_tokens.weight")
    edit(folder, lambda t: t.update({"lm_head.weight": t.pop(embedding)}))
    params = link_embedding(folder)
    (name,) = params
    assert torch.equal(params[name], load_file(folder / SHARD)["lm_head.weight"])


def test_truncated(folder: Path) -> None:
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: len(data) // 2])
    refused(folder, r"model\.safetensors is truncated or damaged")


def test_no_header(folder: Path) -> None:
    (folder / SHARD).write_bytes(b"")
    refused(folder, "truncated or damaged")


def test_missing_tensor(folder: Path) -> None:
    missing = key_of(folder, "embed_tokens.weight")
    edit(folder, lambda t: t.update({"else": t.pop(missing)}))
    with pytest.raises(CheckpointError, match=r"lacks model\.language_model\.embed_tokens") as info:
        link_embedding(folder)
    assert info.value.hint


def test_wrong_shape(folder: Path) -> None:
    name = key_of(folder, "model.norm.weight")
    edit(folder, lambda t: t.update({name: torch.ones(7)}))
    refused(folder, r"norm\.weight.*shape \[7\].*\[48\]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(folder: Path, value: float) -> None:
    key = key_of(folder, "embed_tokens.weight")
    edit(folder, lambda t: t.update({key: t[key].index_fill(0, torch.tensor([3]), value)}))
    params = link_embedding(folder)
    with pytest.raises(CheckpointError, match=r"embed_tokens.* holds 48 NaN or infinite"):
        _ = params["model.language_model.embed_tokens.weight"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.complex64])
def test_quantized_weights(folder: Path, dtype: torch.dtype) -> None:
    """Numbers of a quantized checkpoint mean nothing without its scales: never cast them."""
    key = key_of(folder, "0.self_attn.q_proj.weight")
    edit(folder, lambda t: t.update({key: t[key].to(dtype)}))
    error = refused(folder, r"q_proj\.weight.* is stored as .*quantized already")
    assert "dequantize" in str(error.hint)


def test_quantized_checkpoint_under_other_names(folder: Path) -> None:
    """Packed weights have names of their own: the configuration says why others are missing."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert set(read_all(folder)), "a note in config.json alone is no reason to refuse"
    key = key_of(folder, "embed_tokens.weight")
    edit(folder, lambda t: t.update({key.replace("weight", "qweight"): t.pop(key).int()}))
    with pytest.raises(CheckpointError, match=r"quantized already, by gptq: it lacks") as info:
        link_embedding(folder)
    assert info.value.hint


def test_quantized_model_in_memory() -> None:
    model, _ = build_family("llava")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*float8_e4m3fn.*quantized"):
        capture(model)


def test_pickled_weights(folder: Path) -> None:
    (folder / SHARD).rename(folder / "pytorch_model.bin")
    error = refused(folder, "only pickled weights")
    assert "save_pretrained" in str(error.hint)


def test_no_weights(folder: Path) -> None:
    (folder / SHARD).unlink()
    refused(folder, "no model.safetensors")


def test_damaged_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")
    refused(folder, "index.json is damaged")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, "no config.json")
    (folder / "manifest.json").touch()
    refused(folder, "is a compiled artifact")


def test_damaged_config(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text("{ not json")
    refused(folder, "config.json in .* cannot be read")
    config["text_config"]["hidden_size"] = "big"
    path.write_text(json.dumps(config))
    refused(folder, "hidden_size.*'big'")  # transformers says so in its second line


@pytest.mark.parametrize("model_type", ["bert", "no-such-model"])
def test_unsupported_architecture(folder: Path, model_type: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": model_type}))
    refused(folder, model_type if model_type == "bert" else "cannot be read")


def test_unknown_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "does not exist")
    refused("tiny-qwen", "neither a folder nor an embedded model")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file")


def test_offline_hub_id(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    error = refused("nobody/no-such-model", "fetching it from the hub failed")
    assert "tiny-qwen2-vl" in str(error.hint)


def test_model_on_meta() -> None:
    model, _ = build_family("llava")
    with pytest.raises(CheckpointError, match="meta device"):
        capture(model.to("meta"))


def test_text_only_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    with pytest.raises(MqcError, match="no vision tower|image token"):
        capture(LlamaForCausalLM(config))
