"""Quantization schemes as frozen data with a versioned JSON form."""

from mqc.spec.named import SCHEMES, named_scheme
from mqc.spec.scheme import (
    COMPONENTS,
    ActivationSpec,
    ComponentScheme,
    Scheme,
    WeightSpec,
)

__all__ = [
    "COMPONENTS",
    "SCHEMES",
    "ActivationSpec",
    "ComponentScheme",
    "Scheme",
    "WeightSpec",
    "named_scheme",
]
