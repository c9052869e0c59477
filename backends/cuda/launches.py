"""How many kernels a phase of a lowered program launches, by kind.

They are counted on a device that computes nothing: it needs no GPU, no library and no weights.

A launch costs a decode step two microseconds or so even where the kernel has nothing to do; what
torch computes between the library's kernels shows here by the name of its operator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mqc.backends.cuda import recurrence
from mqc.backends.cuda.engine import CudaEngine
from mqc.backends.cuda.kernels import Attention, FullAttention
from mqc.backends.cuda.native_attention import DECODE_TOKENS
from mqc.backends.cuda.slots import Sequences
from mqc.host.cache import is_buffer
from mqc.ir import ParamStore, Program
from mqc.ir.edit import tensor_type
from mqc.ir.symbols import ExampleSizes, evaluate_shape
from mqc.ir.types import is_cache
from mqc.ops._library import OPS

META = torch.device("meta")
PROMPT = 1024
"""Tokens of the prompt that is counted."""
_FREE = frozenset(
    f"aten.{name}" for name in "empty empty_like empty_strided new_empty detach lift_fresh".split()
)


class _Count(TorchDispatchMode):
    """Torch's operators that launch: all but views and allocations.

    Operators of `mqc.ops` that have no kernel count as what their definitions call.
    """

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mqc":
            with self:
                return OPS[func._opname].reference(*args, **kwargs)
        result = func(*args, **kwargs)
        name = str(func.overloadpacket)
        given, made = _storages((args, kwargs)), _storages(result)
        if name not in _FREE and (func._schema.is_mutable or not made <= given):
            self.found[f"torch {name.removeprefix('aten.')}"] += 1
        return result


def _storages(values: Any) -> set[int]:
    """Memory of the tensors that are not empty."""
    leaves = (t for t in tree_leaves(values) if isinstance(t, Tensor))
    return {t.untyped_storage()._cdata for t in leaves if t.numel()}


class CountingKernels:
    """:class:`~mqc.backends.cuda.kernels.Kernels` that compute nothing.

    ``found``: launches by kind. They count what
    :class:`~mqc.backends.cuda.native.NativeKernels` launches where the library has a kernel for
    everything.
    """

    knows_causal = True

    def __init__(self) -> None:
        self.device = META
        self.found: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Any other kernel writes where it is told: one launch under its name."""
        if name.startswith("_"):
            raise AttributeError(name)

        def launch(*_: Any) -> None:
            self.found[name] += 1

        return launch

    def linear_a16(self, out: Tensor, x: Tensor, *_: Any) -> None:
        """One launch, and torch's that make float16 of float32 rows."""
        self.found["linear"] += 1
        if x.dtype == torch.float32:
            self.found.update({"torch clamp": 1, "torch _to_copy": 1})

    def rms_norm_quantize(self, xq: Tensor, x_split: Tensor | None, *_: Any) -> None:
        """One launch, and torch's for split columns."""
        self.found["rms_norm_quantize"] += 1
        if x_split is not None:
            self.found["torch index_select"] += 1

    def hadamard(self, *_: Any) -> None:
        """One launch."""
        self.found["activation_quantize"] += 1

    def rms_norm(self, x: Tensor, eps: float) -> Tensor:
        """One launch."""
        self.found["rms_norm_quantize"] += 1
        return _like(x)

    def attention(self, call: Attention, out: Tensor) -> Tensor:
        """One that turns and writes the cache, one that reads it."""
        self.found["rotary_cache"] += 1
        few = call.end is None or call.q.shape[1] <= DECODE_TOKENS
        self.found["attention" if few else "torch scaled_dot_product_attention"] += 1
        return out

    def attention_full(self, call: FullAttention) -> Tensor:
        """One that turns packed heads, two for heads apart; torch's that reads them."""
        if call.cos is not None:
            self.found["rotate"] += 1 if call.k is None else 2
        self.found["torch scaled_dot_product_attention"] += 1
        q, _, v = call.apart()
        return torch.empty(*q.shape[:2], q.shape[2] * v.shape[3], dtype=q.dtype, device=META)

    def gated_delta(self, *args: Tensor) -> Tensor:
        """Torch's."""
        return recurrence.by_length(*args)

    def argmax(self, logits: Tensor) -> Tensor:
        """One launch."""
        self.found["top_k"] += 1
        return torch.empty(logits.shape[:-1], dtype=torch.int64, device=META)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=META)


def count_launches(program: Program) -> dict[str, dict[str, int]]:
    """Launches by kind of each phase: "vision" (one call), "prefill" (one prompt of ``PROMPT``
    tokens) and "decode" (one step of one sequence, as it is recorded).

    A phase that cannot be followed without values (linears whose rows the host counts) is left out,
    as is decoding by a program whose caches grow.
    """
    kernels = CountingKernels()
    bare = replace(program, params=_shapes(program))
    engine = CudaEngine(bare, kernels, record=_recorder(kernels))
    phases: dict[str, Callable[[], Any]] = {}
    if "vision" in program.components:
        phases["vision"] = partial(engine.vision, _inputs(engine, "vision", ExampleSizes(256)))
    if is_buffer(program.facts):
        sequences = Sequences(engine._pool.lend(1, PROMPT), 1, 0)
        sizes = {"batch": 1, "tokens": PROMPT, "rows": 1, "past": 0}
        inputs = _inputs(engine, "decoder", sizes)
        axes = engine.program.components["decoder"].input("position_ids").type.shape[:-2]
        phases["prefill"] = partial(engine.prefill, inputs, sequences, 0, causal=True)
        phases["decode"] = partial(engine.decode_step, sequences, tuple(map(int, axes)))
    result = {}
    for name, run in phases.items():
        with _counting(kernels):
            try:
                run()
            except RuntimeError:  # a value was asked for: meta has none
                continue
            result[name] = dict(sorted(kernels.found.items()))
    return result


@contextmanager
def _counting(kernels: CountingKernels) -> Iterator[None]:
    kernels.found.clear()
    with _Count(kernels.found):
        yield


def _recorder(kernels: CountingKernels) -> Any:
    """Counts a step by itself: what comes before it is done once."""

    def record(step: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
        kernels.found.clear()
        return step, step()

    return record


def _shapes(program: Program) -> ParamStore:
    params = ParamStore()
    for component in program:
        for node in component.graph.find_nodes(op="get_attr"):
            kind = tensor_type(node)
            params[str(node.target)] = torch.empty(
                [int(size) for size in kind.shape], dtype=kind.dtype, device=META
            )
    return params


def _inputs(engine: CudaEngine, name: str, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    return {
        port.name: torch.empty(
            evaluate_shape(port.type.shape, sizes), dtype=port.type.dtype, device=META
        )
        for port in engine.program.components[name].inputs
        if not is_cache(port) and port.name != "past"
    }
