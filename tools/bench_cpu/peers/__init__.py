"""The peers by name: which module runs them, what has to be installed, which parts they take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

LINEARS, DECODER, PROMPT = "linears", "decoder", "prompt"


@dataclass(frozen=True)
class Peer:
    """One row of the report.

    Attributes:
        title: as shown.
        module: has ``prepare(name, part, cache)`` and ``open_peer(name, part, cache, threads)``.
        needs: distributions.
        parts: what it can run.
        environment: variables that are set before it is loaded.
    """

    title: str
    module: str
    needs: tuple[str, ...]
    parts: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


_P = "bench_cpu.peers."
PEERS: dict[str, Peer] = {
    "mqc": Peer("mqc W4A8", _P + "mqc_onnx", ("onnxruntime",), (LINEARS, DECODER, PROMPT)),
    "mqc-plain": Peer(
        "mqc W4A8 in plain onnxruntime with its library",
        _P + "mqc_plain",
        ("onnxruntime",),
        (DECODER, PROMPT),
    ),
    "mqc-bodies": Peer(
        "mqc W4A8 without its library",
        _P + "mqc_onnx",
        ("onnxruntime",),
        (DECODER, PROMPT),
        {"MQC_ONNX_OPS": "none"},
    ),
    "openvino-int4": Peer(
        "OpenVINO int4 g128", _P + "openvino", ("openvino", "nncf"), (LINEARS, DECODER, PROMPT)
    ),
    "openvino-int8": Peer(
        "OpenVINO W8A8 static", _P + "openvino", ("openvino", "nncf"), (LINEARS, DECODER, PROMPT)
    ),
    "genai-int4": Peer(
        "onnxruntime-genai int4 g128", _P + "genai", ("onnxruntime-genai",), (DECODER,)
    ),
    "ort-nbits": Peer("ORT MatMulNBits int4 g128", _P + "ort", ("onnxruntime",), (LINEARS,)),
    "ort-int8": Peer("ORT QLinearMatMul u8 x s8", _P + "ort", ("onnxruntime",), (LINEARS,)),
    "llama-q4_0": Peer(
        "llama.cpp Q4_0", _P + "llama", ("llama-cpp-python", "gguf"), (LINEARS, DECODER)
    ),
    "torch-bf16": Peer("torch bf16", _P + "pytorch", ("torch",), (LINEARS, DECODER, PROMPT)),
}


def missing(name: str) -> str | None:
    """Why a peer cannot run here; None where it can."""
    absent = []
    for distribution in PEERS[name].needs:
        try:
            version(distribution)
        except PackageNotFoundError:
            absent.append(distribution)
    return f"{', '.join(absent)} not installed (pip install mqc[bench])" if absent else None


def versions() -> dict[str, str]:
    """What is installed of all that the peers need."""
    found = {}
    for distribution in sorted({name for peer in PEERS.values() for name in peer.needs}):
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    return found
