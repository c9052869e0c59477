"""The engine of target ``onnx``: one onnxruntime session a component.

Tensors go in and out without copies where they are on the CPU: inputs are read where torch holds
them, and the cache stays inside onnxruntime as what the last call gave.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mqc.backends.onnx.library import (
    LAYOUT,
    LAYOUT_FACT,
    MODEL_ENTRY,
    PROVIDERS,
    THREADS_ENTRY,
    attention_in_place,
    ops_library,
    variable_of,
)
from mqc.backends.onnx.step import Buffers, Step
from mqc.errors import ArtifactError, TargetError, VerificationError
from mqc.host.cache import is_buffer, next_capacity, past_of
from mqc.host.engine import Cache, spread

try:
    import onnxruntime as ort
except ImportError as error:
    raise TargetError("onnxruntime is not installed", hint="pip install mqc[cpu]") from error

_HOST_INPUTS = ("inputs_embeds", "position_ids", "mask", "logit_index", "modality")
_LONGEST_ENTRY = 1024
"""Characters that the value of a session entry may have: onnxruntime takes some more."""
_PROVIDERS = dict(zip(PROVIDERS, ("CPUExecutionProvider", "CUDAExecutionProvider"), strict=True))
CHUNK = 2048  # half of it costs 4 % of the time (2B shape), a quarter 30 %
_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
    "tensor(int8)": torch.int8,
}
_NUMPY = {name: torch.empty(0, dtype=dtype).numpy().dtype for name, dtype in _DTYPES.items()}


class OnnxEngine:
    """:class:`~mqc.host.engine.Engine` over ``vision.onnx``, ``embed.onnx`` and ``decoder.onnx``.

    Files are looked for at once and opened when first used.

    Args:
        folder: where the files are.
        facts: the program's facts, from the artifact's manifest.
        threads: threads of each session; None takes torch's number (``OMP_NUM_THREADS``).
        provider: "cpu" or "cuda".
        profile: folder for onnxruntime's traces, a JSON file a session, written when it ends.

    Raises:
        ArtifactError: a file is missing or damaged, or weights are in a layout that this version
            does not know.
        TargetError: the provider is unknown or not present in this onnxruntime.
    """

    def __init__(
        self,
        folder: Path,
        facts: Mapping[str, Any],
        *,
        threads: int | None = None,
        provider: str = "cpu",
        profile: Path | None = None,
    ) -> None:
        self._facts = facts
        _require_layout(folder, facts)
        self._device = provider
        self._open = partial(open_session, provider=provider, threads=threads, profile=profile)
        self._paths = {name: folder / f"{name}.onnx" for name in ("vision", "embed", "decoder")}
        for path in self._paths.values():
            _require(path)
        self.sessions: dict[str, ort.InferenceSession] = {}
        """The components' sessions that were opened."""
        self._inputs: dict[str, list[Any]] = {}
        decoder = self.session("decoder")
        given = (*_HOST_INPUTS, "past", *facts.get("deepstack", ()))
        # Ports are objects made anew by every question for them: asked once.
        ports = self._inputs["decoder"]
        self._given = [port for port in ports if port.name in given]
        self._cache_inputs = [port for port in ports if port.name not in given]
        self._hidden = next(port.shape[-1] for port in ports if port.name == "inputs_embeds")
        self._outputs = [output.name for output in decoder.get_outputs()]
        self._in_place = is_buffer(facts) and attention_in_place(provider)

    @property
    def chunk(self) -> int | None:
        """Tokens of a prompt to read at once: activations then take no more memory than for these,
        and kernels are as fast. A cache that is copied by every call is rather grown once."""
        return CHUNK if self._in_place else None

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._facts

    def session(self, name: str) -> ort.InferenceSession:
        """The session of a component, opened when first asked for: without images the tower's
        weights take no memory."""
        if name not in self.sessions:
            self.sessions[name] = self._open(self._paths[name])
            self._inputs[name] = list(self.sessions[name].get_inputs())
        return self.sessions[name]

    def vision(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Rows [visual_tokens, hidden] of one tower call, all outputs side by side."""
        outputs = [rows.reshape(-1, rows.shape[-1]) for rows in self._run("vision", inputs)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings [B, T, hidden] of int64 ids [B, T]."""
        return self._run("embed", {"input_ids": ids})[0]

    def empty_cache(self, batch: int) -> Buffers:
        """One onnxruntime tensor [batch, kv_heads, 0, head_dim] per cache port."""
        cache = Buffers()
        for port in self._cache_inputs:
            sizes = {"batch": batch}
            shape = [n if isinstance(n, int) else sizes.get(n, 0) for n in port.shape]
            cache.append(_zeros(shape, port))
        return cache

    def decoder(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        mask: torch.Tensor,
        logit_index: torch.Tensor,
        modality: torch.Tensor,
        cache: Cache,
    ) -> tuple[torch.Tensor, Cache]:
        """See :meth:`mqc.host.engine.Engine.decoder`; the cache holds ``OrtValue`` tensors.

        Where kernels write in place, the tensors of the cache are buffers that go in and out;
        else they grow with every call, whatever form the decoder's inputs have.
        """
        session = self.session("decoder")
        values = (inputs_embeds, position_ids, mask, logit_index, modality)
        given = dict(zip(_HOST_INPUTS, values, strict=True))
        given.update(spread(inputs_embeds, self._facts.get("deepstack", ()), self._hidden))
        if self._in_place and mask.shape[3] > cache[0].shape()[2]:
            cache = Buffers(self._with_room(rows, mask) for rows in cache)
        one = mask.shape[2] == logit_index.shape[1] == 1
        if one and self._in_place and self._device == "cpu":
            assert isinstance(cache, Buffers)
            return self._step(given, past_of(mask), cache), cache
        given["past"] = torch.tensor([past_of(mask)])
        binding = session.io_binding()
        kept = [_value(given[port.name], port) for port in self._given]
        for port, value in zip(self._given, kept, strict=True):
            binding.bind_ortvalue_input(port.name, value)
        for port, past in zip(self._cache_inputs, cache, strict=True):
            binding.bind_ortvalue_input(port.name, past)
        logits_name, *present = self._outputs
        binding.bind_output(logits_name, "cpu")
        for index, name in enumerate(present):
            if self._in_place:
                binding.bind_ortvalue_output(name, cache[index])
            else:
                binding.bind_output(name, self._device)
        session.run_with_iobinding(binding)
        logits, *made = binding.get_outputs()
        return torch.from_numpy(logits.numpy()), cache if self._in_place else made

    def _step(self, given: Mapping[str, torch.Tensor], past: int, cache: Buffers) -> torch.Tensor:
        """Logits of a call with one row a sequence."""
        if cache.step is None:
            cache.step = Step(
                self.session("decoder"),
                self._given,
                [port.name for port in self._cache_inputs],
                self._outputs,
                cache,
                _NUMPY,
            )
        arrays = {name: value.detach().cpu().numpy() for name, value in given.items()}
        return torch.from_numpy(cache.step(arrays, past))

    def _with_room(self, cache: Any, mask: torch.Tensor) -> Any:
        """``cache``, or a larger copy where the call's keys do not fit."""
        batch, heads, current, *width = cache.shape()
        rows = next_capacity(mask.shape[3], current, self._facts.get("max_positions"))
        if rows == current:
            return cache
        used, old = past_of(mask), cache.numpy()
        larger = np.zeros((batch, heads, rows, *width), old.dtype)
        larger[:, :, :used] = old[:, :, :used]
        return ort.OrtValue.ortvalue_from_numpy(larger, self._device, 0)

    def _run(self, name: str, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        session, feeds = self.session(name), {}
        for port in self._inputs[name]:
            if port.name not in inputs:
                raise VerificationError(
                    f"component {name!r} has input {port.name!r}, which the host does not give",
                    hint=f"the host gives: {', '.join(inputs)}",
                )
            feeds[port.name] = _array(inputs[port.name], port)
        return [torch.from_numpy(array) for array in session.run(None, feeds)]


def open_session(
    path: Path, provider: str = "cpu", threads: int | None = None, profile: Path | None = None
) -> ort.InferenceSession:
    """A session of one file, with the operator library of the provider where there is one.

    ``profile``: see :class:`OnnxEngine`.

    Raises:
        ArtifactError: the file is missing, damaged, or asks for an operator that is not there.
        TargetError: the operator library cannot be loaded, or the provider is unknown or does not
            start.
    """
    _require(path)
    providers = _providers(provider)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    if profile is not None:
        profile.mkdir(parents=True, exist_ok=True)
        options.enable_profiling = True
        options.profile_file_prefix = str(profile / path.stem)
    _register_library(options, provider, path)
    if provider == "cpu":
        _share_memory(options)
    try:
        session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:
        if provider != "cpu" and "Could not find an implementation" in str(error):
            raise _not_started(provider) from error  # the library's kernels are the provider's
        raise ArtifactError(
            f"onnxruntime cannot open {path}: {_reason(error)}",
            hint="copy or compile the artifact again",
        ) from error
    if providers[0] not in session.get_providers():  # onnxruntime goes on without it
        raise _not_started(provider)
    _trim_heap()
    return session


def _not_started(provider: str) -> TargetError:
    return TargetError(
        f"onnxruntime cannot start its {_PROVIDERS[provider]}",
        hint="check the GPU's driver (nvidia-smi), and that CUDA and cuDNN of the versions that "
        "onnxruntime-gpu was built for are installed",
    )


def _share_memory(options: ort.SessionOptions) -> None:
    """One arena for the activations of all sessions, which grows by what is asked for and no more.

    By itself every session keeps an arena of its own that grows in powers of two, and plans for
    each shape of its inputs one block that holds all activations at once.
    """
    options.enable_mem_pattern = False
    _shared_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")


@cache
def _shared_arena() -> None:
    memory = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    by_request = {"arena_extend_strategy": 1, "initial_chunk_size_bytes": -1}
    config = {"max_mem": 0, "max_dead_bytes_per_chunk": -1, **by_request}
    # An application that has registered one of its own keeps it.
    with contextlib.suppress(RuntimeError):
        ort.create_and_register_allocator(memory, ort.OrtArenaCfg(config))


def _trim_heap() -> None:
    """Give free memory back to the system: bodies that unpack weights when a session is made leave
    several times their size in glibc's heap. Other C libraries have no such function."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _require(path: Path) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing", hint="copy or compile the artifact again")


def _require_layout(folder: Path, facts: Mapping[str, Any]) -> None:
    """Files of before the fact was recorded have the reference layout, which kernels pack."""
    layout = facts.get(LAYOUT_FACT, LAYOUT)
    if layout != LAYOUT:
        raise ArtifactError(
            f"the weights of {folder} are in layout {layout!r}, which this version of mqc does not "
            f"know; it knows {LAYOUT!r}",
            hint="compile the model again with this version, or install the one that compiled it",
        )


def _register_library(options: ort.SessionOptions, provider: str, path: Path) -> None:
    library = ops_library(provider)
    if library is None:
        return
    options.add_session_config_entry(THREADS_ENTRY, str(options.intra_op_num_threads))
    if len(str(path)) < _LONGEST_ENTRY:
        options.add_session_config_entry(MODEL_ENTRY, str(path))
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        raise TargetError(
            f"the operator library {library} cannot be loaded: {_reason(error)}",
            hint=f"set {variable_of(provider)}=none to run without a library, or build it again",
        ) from error


def _providers(name: str) -> list[str]:
    wanted = _PROVIDERS.get(name)
    if wanted is None:
        raise TargetError(
            f"unknown onnxruntime provider {name!r}", hint=f"use {' or '.join(_PROVIDERS)}"
        )
    if wanted not in ort.get_available_providers():
        raise TargetError(
            f"this onnxruntime has no {wanted}",
            hint="pip install mqc[gpu] in place of mqc[cpu]" if name == "cuda" else None,
        )
    return [wanted] if name == "cpu" else [wanted, _PROVIDERS["cpu"]]


def _array(tensor: torch.Tensor, port: Any) -> np.ndarray[Any, Any]:
    """The tensor's memory in the dtype of an input."""
    array: np.ndarray[Any, Any] = tensor.detach().to("cpu", _DTYPES[port.type]).contiguous().numpy()
    return array


def _zeros(shape: list[int], port: Any) -> Any:
    """An onnxruntime tensor of zeros in the dtype of an input."""
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, _NUMPY[port.type]))


def _value(tensor: torch.Tensor, port: Any) -> Any:
    return ort.OrtValue.ortvalue_from_numpy(_array(tensor, port))


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
