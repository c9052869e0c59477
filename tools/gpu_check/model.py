"""A model of given sizes, lowered for target cuda, with random weights made in packed form.

The graphs come from the ordinary way of a compile (capture, passes, lowering) on a configuration
without weights; only quantization is replaced by :class:`RandomQuantize`, which puts the integer
operators in without looking at values. :func:`prepare` writes them as a small file, so that the
machine with the GPU captures nothing.
"""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from mqc.analysis.flow import is_linear
from mqc.analysis.head import find_head
from mqc.backends.cuda.lower import lower
from mqc.backends.cuda.ops import LINEAR
from mqc.ir import Component, Link, ParamStore, Program, TensorType
from mqc.ir.edit import argument, aten, call, eliminate_dead_code, get_param, replace, tensor_type
from mqc.ir.serialize import component_from_json, component_to_json
from mqc.passes.aifs_reorder import AifsReorder
from mqc.passes.cleanup import Cleanup
from mqc.passes.modality_split import INPUT
from mqc.pipeline import make_passes
from mqc.spec import named_scheme
from mqc.transform import PassContext, PassManager

_mqc = torch.ops.mqc
PASSES = ("canonicalize", "fuse-norm", "hadamard-fuse", "hadamard-online", "modality-split")
PREPARED = "model.json.gz"
AIFS = "model-aifs.json.gz"
"""The same with the decoder's visual rows in front."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a Qwen2-VL model."""

    hidden: int = 3584
    intermediate: int = 18944
    layers: int = 28
    heads: int = 28
    kv_heads: int = 4
    vocabulary: int = 152064
    vision_depth: int = 32
    vision_width: int = 1280
    vision_heads: int = 16

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def config(self) -> Any:
        """A transformers configuration."""
        from transformers import Qwen2VLConfig

        half = self.head_dim // 2
        text = {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 32768,
            "rope_theta": 1000000.0,
            "rope_scaling": {
                "type": "mrope",
                "mrope_section": [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8],
            },
            "tie_word_embeddings": False,
        }
        vision = {
            "depth": self.vision_depth,
            "embed_dim": self.vision_width,
            "num_heads": self.vision_heads,
            "hidden_size": self.hidden,
            "mlp_ratio": 4,
            "patch_size": 14,
        }
        names = ("vision_start", "vision_end", "vision", "image", "video")
        last = self.vocabulary - len(names)
        tokens = {f"{name}_token_id": last + index for index, name in enumerate(names)}
        config = Qwen2VLConfig(
            text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens
        )
        config.architectures = ["Qwen2VLForConditionalGeneration"]
        return config


TINY = Sizes(192, 592, 2, 6, 2, 512, 2, 160, 5)
"""For dry runs."""


class RandomQuantize:
    """Linears to integer ones with parameters that have no values yet.

    The decoder gets 4-bit weights, two activation scales and one float column in front of its down
    projections, as ``rms-suppress`` finds there; tower and head get 8-bit weights.
    """

    def __init__(self, program: Program) -> None:
        self.program = program

    def run(self) -> None:
        """Rewrite the program in place."""
        for component in self.program:
            head = find_head(component)
            integers: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
            for node in list(component.graph.nodes):
                if is_linear(node):
                    bits = 4 if component.name == "decoder" and node is not head else 8
                    mixed = component.has_input(INPUT) and node is not head
                    modality = component.placeholder(INPUT) if mixed else None
                    self._replace(node, bits, modality, integers)
        self.program.dialect = "quantized"
        eliminate_dead_code(self.program)

    def _replace(
        self,
        node: fx.Node,
        bits: int,
        modality: fx.Node | None,
        integers: dict[fx.Node, tuple[fx.Node, fx.Node]],
    ) -> None:
        value, weight = node.args[0], node.args[1]
        assert isinstance(value, fx.Node) and isinstance(weight, fx.Node)
        graph, kind = node.graph, tensor_type(value)
        n, k = (int(size) for size in tensor_type(weight).shape)
        split: tuple[Any, Any] = (None, None)
        with graph.inserting_before(node):
            if value not in integers:
                scale = self._param(graph, f"{value.name}.x_scale", (1 if modality is None else 2,))
                args = (value, scale, modality)
                xq = call(
                    graph, _mqc.quantize_static.default, args, kind.with_dtype(torch.int8), node
                )
                integers[value] = (xq, scale)
            xq, scale = integers[value]
            if value.target is _mqc.hadamard.default and bits == 4:
                column = get_param(self.program, graph, f"{weight.target}.c", torch.tensor([0]))
                picked = kind.with_shape(*kind.shape[:-1], 1)
                at = (value, kind.rank - 1, column)
                x_split = call(graph, aten.index_select.default, at, picked, node)
                split = (x_split, self._param(graph, f"{weight.target}.w_split", (n, 1)))
            shape = (n, -(-k // 2)) if bits == 4 else (n, k)
            dtype = torch.uint8 if bits == 4 else torch.int8
            q = self._param(graph, f"{weight.target}.q", shape, dtype)
            w_scale = self._param(graph, f"{weight.target}.w_scale", (n,))
            target = (_mqc.linear_w4a8 if bits == 4 else _mqc.linear_w8a8).default
            bias = argument(node, 2)
            full = (xq, q, w_scale, scale, modality, bias, *split)
            new = call(graph, target, full, tensor_type(node), node)
        replace(node, new)

    def _param(
        self,
        graph: fx.Graph,
        hint: str,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
    ) -> fx.Node:
        return get_param(self.program, graph, hint, torch.empty(shape, dtype=dtype, device="meta"))


def make_program(sizes: Sizes) -> Program:
    """A quantized program; parameters of layers are meta tensors, constants have their values."""
    from mqc.capture import capture_shapes

    program = capture_shapes(sizes.config())
    scheme = named_scheme("w4a8")
    program = PassManager(make_passes(PASSES, scheme)).run(program, PassContext(seed=0))
    _without_storage(program)
    RandomQuantize(program).run()
    return program


def _without_storage(program: Program) -> None:
    """Fake parameters as meta tensors, which any pass may join and cast."""
    from torch._subclasses.fake_tensor import FakeTensor

    for name in list(program.params):
        value = program.params[name]
        if isinstance(value, FakeTensor):
            program.params[name] = torch.empty(value.shape, dtype=value.dtype, device="meta")


def prepare(folder: Path, sizes: Sizes, dtype: str) -> Path:
    """Write the graphs and constants of a program whose rows keep their order, and of the same with
    visual rows in front, each as one file; returns the first's path."""
    folder.mkdir(parents=True, exist_ok=True)
    program = make_program(sizes)
    passes = PassManager([AifsReorder(), Cleanup()])
    ordered = passes.run(program.copy(), PassContext(seed=0))
    _write(lower(ordered, dtype)[0], sizes, dtype, folder / AIFS)
    return _write(lower(program, dtype)[0], sizes, dtype, folder / PREPARED)


def _write(program: Program, sizes: Sizes, dtype: str, path: Path) -> Path:
    used = set().union(*(part.param_names() for part in program))
    real = {name: program.params[name] for name in used if not program.params[name].is_meta}
    data = {
        "sizes": asdict(sizes),
        "dtype": dtype,
        "facts": program.facts,
        "components": [component_to_json(part) for part in program],
        "constants": {
            name: {"dtype": str(value.dtype), "values": value.tolist()}
            for name, value in sorted(real.items())
        },
    }
    text = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    path.write_bytes(gzip.compress(text, mtime=0))
    return path


def load(path: Path, device: torch.device, seed: int = 0) -> tuple[Program, Sizes]:
    """A prepared program with random weights on ``device``, the same in every program by their
    names; without values on "meta"."""
    data = json.loads(gzip.decompress(path.read_bytes()))
    components = [component_from_json(item) for item in data["components"]]
    params = ParamStore()
    for name, entry in data["constants"].items():
        dtype = getattr(torch, entry["dtype"].removeprefix("torch."))
        params[name] = torch.tensor(entry["values"], dtype=dtype, device=device)
    generator = None if device.type == "meta" else torch.Generator(device)
    for part in components:
        scales = _scales(part)
        for node in part.graph.find_nodes(op="get_attr"):
            kind, name = node.meta["type"], str(node.target)
            assert isinstance(kind, TensorType)
            if name not in params:
                shape = tuple(int(size) for size in kind.shape)
                if generator is None:
                    params[name] = torch.empty(shape, dtype=kind.dtype, device=device)
                else:
                    generator.manual_seed(seed + zlib.crc32(name.encode()))
                    params[name] = random(shape, kind.dtype, generator, scales.get(name))
    program = Program(
        {part.name: part for part in components},
        params,
        [Link(("embed", "embeddings"), ("decoder", "inputs_embeds"))],
        data["facts"],
        {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[data["dtype"]],
        "cuda",
    )
    return program, Sizes(**data["sizes"])


def _scales(part: Component) -> dict[str, float]:
    """Values of scales by name: rows near one in, rows near one out."""
    found: dict[str, float] = {}
    for node in part.graph.nodes:
        if node.target is LINEAR:
            found[str(node.args[2].target)] = 0.0005
            found[str(node.args[3].target)] = 0.03
    return found


def random(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
    value: float | None = None,
) -> Tensor:
    """Random values of a size that keeps rows of a deep model near one, or ``value`` throughout."""
    device = generator.device
    if dtype in (torch.uint8, torch.int8):
        bits = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
        return bits.view(dtype)
    if value is not None:
        return torch.full(shape, value, dtype=dtype, device=device)
    result = torch.empty(shape, dtype=dtype, device=device)
    return result.normal_(0, 0.02, generator=generator)
