"""What is quantized, how: frozen data with a versioned JSON form.

Bits of None mean that values stay in floating point. Everything else that a scheme does not say
(block sizes of rotations, which columns are split) is measured or derived from the graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from mqc.errors import UsageError
from mqc.spec.fields import nearest, read

FORMAT_VERSION = 1
COMPONENTS = ("vision", "embed", "decoder")

Method = Literal["rtn", "gptq"]
Observer = Literal["minmax", "percentile", "mse"]


def _require(condition: bool, message: str, hint: str) -> None:
    if not condition:
        raise UsageError(message, hint=hint)


@dataclass(frozen=True)
class WeightSpec:
    """Symmetric integer weights of linear layers.

    Attributes:
        bits: 8, 4, 3 or 2 (4 and fewer are stored as nibbles); None leaves weights in float.
        group_size: input columns that share a scale, e.g. 128 gives scales [N, K / 128]; None
            gives one scale per output channel, [N].
        method: ``rtn`` rounds to nearest; ``gptq`` compensates rounding errors with second-order
            statistics of the inputs (Frantar et al. 2022, arXiv 2210.17323).
        clip: search a scale below the largest magnitude that minimises the error.
        act_order: gptq quantizes columns by decreasing input energy.
        damping: gptq adds this share of the Hessian's mean diagonal to its diagonal.
        blocksize: columns gptq updates lazily at once (speed only).
    """

    bits: Literal[8, 4, 3, 2] | None = None
    group_size: int | None = None
    method: Method = "rtn"
    clip: bool = False
    act_order: bool = True
    damping: float = 0.01
    blocksize: int = 128

    def __post_init__(self) -> None:
        _require(self.bits in (8, 4, 3, 2, None), f"weights of {self.bits} bits", "use 8, 4, 3, 2")
        _require(
            self.group_size is None or self.group_size > 0,
            f"weight group size {self.group_size}",
            "use a positive divisor of the layers' input widths, or null for one scale a channel",
        )
        _require(self.method in ("rtn", "gptq"), f"method {self.method!r}", "use rtn or gptq")
        _require(0 < self.damping < 1, f"damping {self.damping}", "use a share such as 0.01")
        _require(self.blocksize > 0, f"blocksize {self.blocksize}", "use a width such as 128")

    @property
    def quantized(self) -> bool:
        return self.bits is not None


@dataclass(frozen=True)
class ActivationSpec:
    """Static symmetric int8 activations at the inputs of linear layers.

    Attributes:
        bits: 8, or None for floating point.
        observer: how calibration picks the clipping range: largest magnitude, a percentile of
            the magnitudes, or the range with the least squared error.
        percentile: of the ``percentile`` observer, in (0, 100].
        per_modality: one scale for text rows and one for visual rows (MSQ, arXiv 2502.00425)
            where a component's rows hold both.
    """

    bits: Literal[8] | None = None
    observer: Observer = "minmax"
    percentile: float = 99.99
    per_modality: bool = False

    def __post_init__(self) -> None:
        _require(self.bits in (8, None), f"activations of {self.bits} bits", "use 8 or null")
        _require(
            self.observer in ("minmax", "percentile", "mse"),
            f"observer {self.observer!r}",
            "use minmax, percentile or mse",
        )
        _require(0 < self.percentile <= 100, f"percentile {self.percentile}", "use one in (0, 100]")

    @property
    def quantized(self) -> bool:
        return self.bits is not None


@dataclass(frozen=True)
class ComponentScheme:
    """Weights and activations of one component; ``head``: the linear that gives the logits.

    ``head`` None leaves it in float. ``head_activations`` says what a quantized head reads: floats
    by default, for its errors reach the answer directly, or static int8 rows, where a target is
    faster with them.
    """

    weights: WeightSpec = field(default_factory=WeightSpec)
    activations: ActivationSpec = field(default_factory=ActivationSpec)
    head: WeightSpec | None = None
    head_activations: ActivationSpec = field(default_factory=ActivationSpec)

    def __post_init__(self) -> None:
        _require(
            self.weights.quantized or not self.activations.quantized,
            "integer activations with float weights",
            "give the weights bits too, or set the activations' bits to null",
        )

    @property
    def static_head(self) -> bool:
        """Whether the head is computed in integers."""
        quantized = self.head is not None and self.head.quantized
        return quantized and self.activations.quantized and self.head_activations.quantized

    @property
    def label(self) -> str:
        """Short name, e.g. ``W4A8``, ``W8A16`` (16 stands for floating point), ``float``."""
        if not self.weights.quantized:
            return "float"
        group = f"g{self.weights.group_size}" if self.weights.group_size else ""
        return f"W{self.weights.bits}{group}A{self.activations.bits or 16}"


@dataclass(frozen=True)
class Scheme:
    """A whole quantization scheme.

    Attributes:
        name: shown in reports.
        components: by component name (``COMPONENTS``); what is not given is filled in as float.
        rotate: fold norms into linears and rotate residual streams and V/O pairs offline
            (QuaRot, arXiv 2404.00456).
        online_hadamard: rotate the inputs of down projections while running.
        rms_suppress: split dominant weight columns off as a rank-k update.
        rms_threshold: a column is dominant where leaving it out shrinks the layer's quantization
            scales by this factor or more.
        aifs: reorder rows, visual first, so that each modality is one slice (arXiv 2502.00425).
        seed: of the random signs of the rotations.
        kv_cache: "float", or "int8" with one scale for each row of a head, found while running.
    """

    name: str
    components: Mapping[str, ComponentScheme] = field(default_factory=dict)
    rotate: bool = False
    online_hadamard: bool = False
    rms_suppress: bool = False
    rms_threshold: float = 1.25
    aifs: bool = False
    seed: int = 0
    kv_cache: Literal["float", "int8"] = "float"

    def __post_init__(self) -> None:
        for name in self.components:
            _require(name in COMPONENTS, f"unknown component {name!r}", nearest(name, COMPONENTS))
        filled = {name: self.components.get(name, ComponentScheme()) for name in COMPONENTS}
        object.__setattr__(self, "components", MappingProxyType(filled))
        _require(
            self.rms_threshold > 1, f"rms_threshold {self.rms_threshold}", "use a ratio above 1"
        )
        _require(
            not self.aifs or self.msq,
            "aifs without msq: rows are reordered for scales by modality, and there are none",
            "set msq to true, or aifs to false",
        )
        embed = self.component("embed")
        _require(
            embed.weights.bits in (None, 8) and not embed.activations.quantized,
            f"embeddings as {embed.label}",
            "embeddings are float or have 8-bit weights",
        )
        for name in ("vision", "embed"):
            _require(
                self.component(name).head is None,
                f"component {name!r} has no head",
                "set the head of the decoder",
            )
            _require(
                not self.component(name).activations.per_modality,
                f"component {name!r} holds one modality only",
                "set per_modality of the decoder",
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return (Scheme.from_json, (self.to_json(),))

    def component(self, name: str) -> ComponentScheme:
        """The scheme of component ``name``; float where none was given."""
        return self.components.get(name) or ComponentScheme()

    @property
    def msq(self) -> bool:
        """Whether the decoder has one activation scale per modality."""
        activations = self.component("decoder").activations
        return activations.quantized and activations.per_modality

    @property
    def quantize_head(self) -> bool:
        head = self.component("decoder").head
        return head is not None and head.quantized

    @property
    def quantize_embeddings(self) -> bool:
        return self.component("embed").weights.quantized

    @property
    def quantized(self) -> bool:
        """Whether anything at all is stored as integers."""
        return self.quantize_head or any(c.weights.quantized for c in self.components.values())

    @property
    def static_activations(self) -> bool:
        return any(c.activations.quantized for c in self.components.values())

    @property
    def needs_calibration(self) -> bool:
        """Whether a compile has to run the model on samples."""
        heads = [c.head for c in self.components.values() if c.head is not None]
        weights = [c.weights for c in self.components.values()]
        gptq = any(w.quantized and w.method == "gptq" for w in (*weights, *heads))
        return self.static_activations or gptq

    def describe(self) -> str:
        """One line for people: what each component becomes, and the methods in use."""
        parts = [f"{name} {self.component(name).label}" for name in ("vision", "decoder")]
        head = self.component("decoder").head
        if self.quantize_head and head is not None:
            static = self.component("decoder").static_head
            parts.append(f"head W{head.bits}{'A8' if static else ''}")
        if self.quantize_embeddings:
            parts.append("embeddings W8")
        methods = {
            "rotated": self.rotate,
            "online Hadamard": self.online_hadamard,
            "columns split": self.rms_suppress,
            "MSQ": self.msq,
            "AIFS": self.aifs,
            "int8 KV cache": self.kv_cache == "int8",
        }
        return ", ".join([*parts, *(name for name, used in methods.items() if used)])

    def replace(self, **changes: Any) -> Scheme:
        """A copy with other top-level fields."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """JSON data, with ``format``."""
        data: dict[str, Any] = {"format": FORMAT_VERSION}
        for item in dataclasses.fields(self):
            data[item.name] = getattr(self, item.name)
        data["components"] = {name: dataclasses.asdict(self.component(name)) for name in COMPONENTS}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scheme:
        """Inverse of :meth:`to_json`. Raises ``UsageError`` for unknown or wrong fields."""
        fields = dict(data)
        version = fields.pop("format", FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise UsageError(
                f"scheme format {version}; this mqc reads format {FORMAT_VERSION}",
                hint="install a newer mqc, or write the scheme again",
            )
        return read(cls, fields, "")
