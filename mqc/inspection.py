"""What an artifact holds, from its manifest alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mqc.artifact import folder_size, read_manifest
from mqc.spec import Scheme


@dataclass(frozen=True)
class Inspection:
    """What an artifact holds: its manifest without file hashes, and one record a layer."""

    artifact: Path
    target: str
    scheme: Scheme | None
    layers: list[dict[str, Any]] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "artifact": str(self.artifact),
            "target": self.target,
            "scheme": self.scheme.to_json() if self.scheme else None,
            "layers": self.layers,
            "passes": self.passes,
            "facts": self.facts,
            "calibration": self.calibration,
            "bytes": self.bytes,
        }


def inspect(artifact: str | Path) -> Inspection:
    """What was done to each layer, from an artifact's manifest; no weights are read.

    Returns:
        ``layers`` has one mapping a layer: bits, scales by modality, columns split, SQNR in dB.

    Raises:
        ArtifactError: the folder is missing or no artifact, or its manifest is damaged.
    """
    manifest = read_manifest(artifact)
    history = manifest.get("history", [])
    calibration = dict(manifest.get("calibration") or {})
    calibration.pop("sha256", None)
    scheme = manifest.get("scheme")
    return Inspection(
        Path(artifact),
        manifest["target"],
        Scheme.from_json(scheme) if scheme else None,
        merge_details(history),
        [{key: v for key, v in entry.items() if key != "details"} for entry in history],
        manifest.get("facts", {}),
        calibration or None,
        folder_size(artifact),
    )


def merge_details(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The passes' per-layer details as one record a layer, in order of first mention."""
    layers: dict[str, dict[str, Any]] = {}
    for entry in history:
        for detail in entry.get("details", ()):
            facts = {key: value for key, value in detail.items() if key not in ("layer", "layers")}
            for name in detail.get("layers", [detail["layer"]] if "layer" in detail else []):
                base = str(name).partition("~")[0]  # a changed weight's name has a suffix
                if "bits" in facts:  # quantized layers stand in the order of the graph
                    layers[base] = layers.pop(base, {"layer": base})
                layers.setdefault(base, {"layer": base}).update(facts)
    return list(layers.values())
