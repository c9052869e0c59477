"""The schemes that have names."""

from __future__ import annotations

from mqc.errors import UsageError
from mqc.spec.fields import nearest
from mqc.spec.scheme import ActivationSpec, ComponentScheme, Scheme, WeightSpec


def _gptq(bits: int) -> WeightSpec:
    return WeightSpec(bits=bits, method="gptq", clip=True)  # type: ignore[arg-type]


def _int8(**more: bool) -> ActivationSpec:
    """A few extreme values cost less when clipped than when every scale has to reach them."""
    return ActivationSpec(8, observer="percentile", **more)


def _static(name: str, vision: int, decoder: int) -> Scheme:
    """Both components with static int8 activations and all methods on."""
    return Scheme(
        name,
        {
            "vision": ComponentScheme(_gptq(vision), _int8()),
            "decoder": ComponentScheme(_gptq(decoder), _int8(per_modality=True)),
        },
        rotate=True,
        online_hadamard=True,
        rms_suppress=True,
        aifs=True,
    )


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        _static("w4a8", vision=8, decoder=4),
        _static("w4a8-all", vision=4, decoder=4),
        _static("w3a8", vision=8, decoder=3),
        _static("w3a8-all", vision=3, decoder=3),
        _static("w8a8", vision=8, decoder=8),
        Scheme(
            "w4a16",
            {"vision": ComponentScheme(_gptq(8)), "decoder": ComponentScheme(_gptq(4))},
        ),
        Scheme("float"),
    )
}
"""The first number is the decoder's weight bits; ``-all`` gives the vision tower the same, else it
has 8. ``w4a8`` is the main setting of MQuant (arXiv 2502.00425)."""


def named_scheme(name: str) -> Scheme:
    """The scheme of that name. Raises ``UsageError`` with the nearest name."""
    if name not in SCHEMES:
        raise UsageError(f"unknown scheme {name!r}", hint=nearest(name, SCHEMES))
    return SCHEMES[name]
