"""llama.cpp through llama-cpp-python: Q4_0, the GGUF written by the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench_cpu import models


def prepare(name: str, part: str, cache: Path) -> None:
    """Write the GGUF file."""
    if part == "linears":
        return
    models.made(cache / name, lambda folder: write_gguf(models.text_only(cache), folder))


def open_peer(name: str, part: str, cache: Path, threads: int) -> Any:
    """The loaded model, or ggml's products."""
    if part == "linears":
        from bench_cpu.peers.ggml import Linears

        return Linears(threads)
    return Model(cache / name / "model.gguf", threads)


def write_gguf(source: Path, folder: Path) -> None:
    """A Qwen2 checkpoint as Q4_0; norms and biases in float32; no tokenizer."""
    import gguf
    import torch
    from safetensors.torch import load_file

    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    inside = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for layer in range(models.LAYERS):
        for old, new in inside.items():
            for kind in ("weight", "bias"):
                names[f"model.layers.{layer}.{old}.{kind}"] = f"blk.{layer}.{new}.{kind}"
    writer = gguf.GGUFWriter(folder / "model.gguf", "qwen2")
    writer.add_block_count(models.LAYERS)
    writer.add_context_length(models.POSITIONS)
    writer.add_embedding_length(models.HIDDEN)
    writer.add_feed_forward_length(models.INTERMEDIATE)
    writer.add_head_count(models.HEADS)
    writer.add_head_count_kv(models.KV_HEADS)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(models.VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    for name, value in load_file(source / "model.safetensors").items():
        array = value.to(torch.float32).numpy()
        if array.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor(names[name], gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(names[name], array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Model:
    """A context of llama.cpp's C interface."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self.library = llama_cpp
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path.name}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch = 2048, 2048
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.length = 0
        system = llama_cpp.llama_print_system_info()
        self.notes = {"system": system.decode(), "ubatch": options.n_ubatch}

    def _read(self, ids: list[int]) -> None:
        array = (self.library.llama_token * len(ids))(*ids)
        batch = self.library.llama_batch_get_one(array, len(ids))
        if self.library.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        self.library.llama_get_logits_ith(self.context, -1)
        self.length += len(ids)

    def prefill(self, tokens: int) -> None:
        memory = self.library.llama_get_memory(self.context)
        self.library.llama_memory_clear(memory, True)
        self.length = 0
        self._read(models.token_ids(tokens))

    def decode(self) -> None:
        self._read([100])
