"""What runs on a GPU, on one that computes nothing: devices, memory, graphs, limits of launches."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cuda_cases
import pytest
import torch
from fake_gpu import DEVICE, FakeGpu

from mqc.backends.cuda import register
from mqc.backends.cuda.engine import CudaEngine
from mqc.backends.cuda.graphs import WARM_UP, record_graph
from mqc.backends.cuda.launches import PROMPT, count_launches
from mqc.backends.cuda.lower import lower
from mqc.backends.cuda.native import NativeKernels
from mqc.backends.cuda.ops import LINEAR
from mqc.backends.cuda.target import device_kernels, missing
from mqc.cuda.library import TopKArgs
from mqc.errors import TargetError
from mqc.ir.types import is_cache

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.gpu_check import end_to_end, linear_case, model, parts, sweep, timings
from tools.gpu_check.common import Recorder, stream_of


@pytest.fixture
def gpu(emulated: Any) -> FakeGpu:
    if torch.version.cuda is not None:
        pytest.skip("a CUDA build of torch asks the driver for its devices: use a CPU build")
    return FakeGpu(emulated)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model.prepare(tmp_path_factory.mktemp("model"), model.TINY, "bf16")


def recorder() -> Recorder:
    return Recorder(None, time.monotonic() + 300)


@pytest.mark.parametrize(
    "name", ["ceilings", "small", "rows", "linear-timings", "row-timings", "attention-timings"]
)
def test_part(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The GPU check's own code: every launch it makes and every graph it records."""
    monkeypatch.setattr(timings, "SHAPES", timings.SHAPES[2:3])
    monkeypatch.setattr(timings, "ROWS", (1, 4096))
    kept = recorder()
    with gpu.running(monkeypatch):
        context = parts.Context(gpu.library, kept, torch.Generator(DEVICE), 90)
        parts.PARTS[name].run(context)
    assert kept.results


@pytest.mark.parametrize("wgmma", [False, True])
def test_sweep(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, wgmma: bool) -> None:
    kept = recorder()
    with gpu.running(monkeypatch):
        generator = torch.Generator(DEVICE)
        sweep.run(
            *(gpu.library, kept, generator),
            architecture=90,
            wgmma=wgmma,
            shapes=sweep.SHAPES[2:3],
            rows=(3, 4096),
        )
    assert len(kept.results) > 4


@pytest.mark.parametrize("name", ["prefill", "decode", "vision", "order"])
def test_model_part(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, prepared: Path, name: str
) -> None:
    """A whole model: engine and baseline, eager and recorded."""
    kept = recorder()
    with gpu.running(monkeypatch):
        bench = end_to_end.Bench(kept, prepared, DEVICE, gpu.library, plan=end_to_end.DRY)
        getattr(end_to_end, name)(bench)
    assert kept.results and "linear" in gpu.library.launches
    assert bool(gpu.replays) == (name == "decode")


@pytest.mark.parametrize(
    ("overrides", "kv_cache"), [((), "int8"), (("aifs=true",), "float")], ids=["rows", "aifs"]
)
def test_engine(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], kv_cache: str
) -> None:
    """Prompts in chunks, causal and masked, then steps, then a larger cache and its own step."""
    program = cuda_cases.lowered("tiny-qwen2-vl", "bf16", overrides).copy()
    with gpu.running(monkeypatch):
        kernels = NativeKernels(gpu.library, DEVICE, lambda: stream_of(DEVICE))
        options: dict[str, Any] = {"record": record_graph, "kv_cache": kv_cache, "capacity": 64}
        engine = CudaEngine(program, kernels, **options)
        for batch in (1, 3):
            (sequences,) = engine.empty_cache(batch)
            past = 0
            for tokens, causal in ((9, True), (20, True), (20, False), (3, True), (40, False)):
                sequences = engine._pool.with_room(sequences, past + tokens)
                mask = torch.ones(batch, 1, tokens, past + tokens, dtype=torch.bool)
                inputs = prompt(program.components["decoder"], batch, tokens)
                engine.prefill(
                    {**inputs, "mask": engine._mask(mask, causal)}, sequences, past, causal
                )
                past += tokens
            step = engine.decode_step(sequences, (3,))
            for _ in range(2):
                mask = torch.ones(batch, 1, 1, past + 1, dtype=torch.bool)
                positions = torch.zeros(3, batch, 1, dtype=torch.int64)
                step.start(torch.zeros(batch, dtype=torch.int64), positions, mask, past)
                step.run()
        assert engine.embed(torch.zeros(2, 5, dtype=torch.int64)).device == DEVICE
    assert gpu.replays == 4 and {"attention", "top_k"} <= set(gpu.library.launches)


def test_recurrent_layers(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays where the recorded step rewrites it, float32 beside caches of int8."""
    program = lower(cuda_cases.quantized_family("minicpmv4_6")[0], "bf16")[0]
    with gpu.running(monkeypatch):
        kernels = NativeKernels(gpu.library, DEVICE, lambda: stream_of(DEVICE))
        engine = CudaEngine(program, kernels, record=record_graph, kv_cache="int8", capacity=64)
        (sequences,) = engine.empty_cache(3)
        mask = torch.ones(3, 1, 9, 9, dtype=torch.bool)
        inputs = {**prompt(program.components["decoder"], 3, 9), "mask": engine._mask(mask, True)}
        engine.prefill(inputs, sequences, 0, True)
        step = engine.decode_step(sequences, ())
        places = [value.data_ptr() for value in step.slot.memory]
        for past in (9, 10):
            ids, positions = torch.zeros(3, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64)
            step.start(ids, positions, torch.ones(3, 1, 1, past + 1, dtype=torch.bool), past)
            step.run()
        assert [value.data_ptr() for value in step.slot.memory] == places
    assert gpu.replays == 2 and len(places) == 4


def test_launches_are_as_counted(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan says of launches is what a device gets; a linear is one, a step has few more."""
    program = cuda_cases.lowered("tiny-qwen2-vl", "bf16").copy()
    said = count_launches(program)
    with gpu.running(monkeypatch):
        kernels = NativeKernels(gpu.library, DEVICE, lambda: stream_of(DEVICE))
        engine = CudaEngine(program, kernels, record=record_graph, capacity=64)
        (sequences,) = engine.empty_cache(1)
        sequences = engine._pool.with_room(sequences, PROMPT)
        inputs = prompt(program.components["decoder"], 1, PROMPT)
        mask = torch.ones(1, 1, PROMPT, PROMPT, dtype=torch.bool)
        gpu.library.launches.clear()
        engine.prefill({**inputs, "mask": engine._mask(mask, True)}, sequences, 0, True)
        prefilled = Counter(gpu.library.launches)
        gpu.library.launches.clear()
        engine.decode_step(sequences, (3,))
        found = {"prefill": prefilled, "decode": Counter(gpu.library.launches)}
    runs = {"prefill": 1, "decode": WARM_UP + 1}
    for phase, count in runs.items():
        ours = {name: n for name, n in said[phase].items() if not name.startswith("torch")}
        assert {name: n * count for name, n in ours.items()} == dict(found[phase])
    linears = program.components["decoder"].graph.find_nodes(op="call_function", target=LINEAR)
    assert said["decode"]["linear"] == len(linears)
    torchs = {name: n for name, n in said["decode"].items() if name.startswith("torch")}
    assert sum(torchs.values()) <= 16 and max(torchs.values()) == 2, torchs  # none in a layer


def test_the_second_device(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine works on its device while another is the current one; so do kernels by themselves,
    and torch's operators that lead to them."""
    program = cuda_cases.lowered("tiny-qwen2-vl", "bf16").copy()
    second = torch.device("cuda", 1)
    monkeypatch.setattr("mqc.cuda.library.load", lambda: gpu.library)
    monkeypatch.setattr(register, "_made", {})
    monkeypatch.setattr(register, "_libraries", [None])  # nothing is registered with torch
    with gpu.running(monkeypatch):
        kernels = device_kernels("cuda:1")
        assert kernels.device == second and gpu.library.asked == {1}
        engine = CudaEngine(program, kernels, record=record_graph, capacity=64)
        embeds = engine.embed(torch.zeros(1, 5, dtype=torch.int64))
        assert embeds.device == second
        mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
        where, index = torch.zeros(3, 1, 5, dtype=torch.int64), torch.tensor([[4]])
        text = torch.zeros(1, 5, dtype=torch.bool)
        _, cache = engine.decoder(embeds, where, mask, index, text, engine.empty_cache(1))
        mask, ids = torch.ones(1, 1, 1, 6, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
        engine.greedy_step(ids, torch.zeros(3, 1, 1, dtype=torch.int64), mask, cache)
        assert gpu.replays == 1 and gpu.current == 0 and gpu.library.asked == {1}
        x = torch.zeros(2, 64, device=second, dtype=torch.bfloat16)
        kernels.hadamard(torch.empty_like(x), x, 32)
        assert register.by_device("mqc::hadamard")(x, 32).device == second
        with pytest.raises(TargetError, match="no kernels on cuda:0"):
            register.by_device("mqc::hadamard")(x.to(DEVICE), 32)
        wrong = NativeKernels(gpu.library, DEVICE)
        with pytest.raises(AssertionError, match="on cuda:0 gets memory of cuda:1"):
            wrong.hadamard(torch.empty_like(x), x, 32)
        assert missing("cuda:1") == []
        (lacks,) = missing("cuda:2")
        assert "no device cuda:2, torch sees cuda:0, cuda:1" in lacks[0]


def test_out_of_memory(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device refuses is said with a remedy, and the engine goes on."""
    program = cuda_cases.lowered("tiny-qwen2-vl", "bf16").copy()
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB. Process 1 has 78 GiB."

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(said)

    with gpu.running(monkeypatch):
        kernels = NativeKernels(gpu.library, DEVICE, lambda: stream_of(DEVICE))
        engine = CudaEngine(program, kernels, record=record_graph, capacity=64)
        ids = torch.zeros(1, 5, dtype=torch.int64)
        with monkeypatch.context() as broken:
            broken.setattr(engine, "_run", refuse)
            with pytest.raises(TargetError, match=r"cuda:0 is not enough: .*2\.00 GiB") as caught:
                engine.embed(ids)
        assert "kv_cache=int8" in str(caught.value.hint) and "Process" not in caught.value.message
        assert engine.embed(ids).shape[:2] == (1, 5)


def prompt(decoder: Any, batch: int, tokens: int) -> dict[str, torch.Tensor]:
    sizes = {"batch": batch, "tokens": tokens, "rows": 1}
    return {
        port.name: torch.zeros(
            [size if isinstance(size, int) else sizes[size] for size in port.type.shape],
            dtype=port.type.dtype,
            device=DEVICE,
        )
        for port in decoder.inputs
        if not is_cache(port) and port.name not in ("past", "mask")
    }


def test_what_a_graph_may_not_do(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    host = torch.ones(3)

    def steps() -> dict[str, Any]:
        x = torch.zeros(3, device=DEVICE)
        return {
            "between host and device": lambda: x + host.to(DEVICE),
            "between host and device ": lambda: x.cpu(),
            "waits while": lambda: x.sum().item(),
            "synchronisation": torch.cuda.synchronize,
        }

    with gpu.running(monkeypatch):
        for match, step in steps().items():
            with (
                pytest.raises(AssertionError, match=match.strip()),
                torch.cuda.graph(torch.cuda.CUDAGraph()),
            ):
                step()
            gpu.memory.capturing = False
        with pytest.raises(Exception, match="devices"):
            torch.zeros(3, device=DEVICE) + host
        kept = [torch.zeros(3, device=DEVICE)]
        replay, _ = record_graph(lambda: kept[0] + 1)
        replay()
        kept.clear()
        with pytest.raises(AssertionError, match="memory that was freed"):
            replay()


def test_pointers_of_launches(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    with gpu.running(monkeypatch):
        x = torch.zeros(2, 100, device=DEVICE)
        found = torch.zeros(2, 1, device=DEVICE, dtype=torch.int64)
        fields = {"dtype": 3, "k": 1, "rows": 2, "columns": 100, "x_stride": 100}
        good = {"x": x.data_ptr(), "indices": found.data_ptr()}
        gpu.library.launch("top_k", TopKArgs(**fields, **good))
        wrong = {
            "no device memory": {"x": 4096},
            "x needs 800 bytes, there are 796": {"x": x.data_ptr() + 4},
            "indices needs 16 bytes, there are 8": {"indices": found[1:].data_ptr()},
        }
        for match, pointers in wrong.items():
            with pytest.raises(AssertionError, match=match):
                gpu.library.launch("top_k", TopKArgs(**fields, **{**good, **pointers}))
        del x
        with pytest.raises(AssertionError, match="freed"):
            gpu.library.launch("top_k", TopKArgs(**fields, **good))
        case = linear_case.LinearCase(3, 64, 128, linear_case.Options(), torch.Generator(DEVICE))
        monkeypatch.setattr(gpu, "_streams", [type(gpu._streams[0])(7, 0)])
        with pytest.raises(AssertionError, match="another stream"):
            gpu.library.launch("linear", case.arguments(torch.zeros(3, 64, device=DEVICE)), 0)
