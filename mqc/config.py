"""Recipes: a YAML file, named scheme or ``key=value`` overrides become a :class:`Scheme`.

A recipe starts from a named scheme (``base``) and overrides fields::

    base: w4a8
    rotate: true
    decoder:
      weights: {bits: 3, group_size: 64}
    passes: [my_pkg.my_mod:MyPass]

Keys are the fields of :class:`~mqc.spec.Scheme`, with the components' names at the top, and these
short forms: ``weights`` and ``activations`` (vision and decoder at once), ``msq``,
``quantize_head``, ``quantize_embeddings``. Unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mqc.errors import UsageError
from mqc.spec import COMPONENTS, Scheme, WeightSpec, named_scheme
from mqc.spec.fields import nearest

DEFAULT_SCHEME = "w4a8"
LINEARS = ("vision", "decoder")
SHORT_FORMS = ("weights", "activations", "msq", "quantize_head", "quantize_embeddings")
_FIELDS = tuple(f.name for f in dataclasses.fields(Scheme) if f.name != "components")
KEYS = (*_FIELDS, *COMPONENTS, *SHORT_FORMS)
_LABEL = re.compile(r"w(?P<weights>[2348])(g(?P<group>\d+))?a(?P<activations>8|16)", re.IGNORECASE)


@dataclass(frozen=True)
class Recipe:
    """A scheme, and the custom passes (``module:Class``) that a recipe adds."""

    scheme: Scheme
    passes: tuple[str, ...] = ()


def shipped_recipes() -> dict[str, Path]:
    """Recipes that come with mqc, by name."""
    folder = Path(str(files("mqc.recipes")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_recipe(source: str | Path) -> dict[str, Any]:
    """The mapping in a recipe file, or in a shipped recipe by name."""
    path = Path(source)
    if not path.exists() and str(source) in shipped_recipes():
        path = shipped_recipes()[str(source)]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text file"
        raise UsageError(
            f"cannot read recipe {str(source)!r}: {reason}",
            hint=f"give a YAML file or one of: {', '.join(shipped_recipes())}",
        ) from error
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"recipe {path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(
            f"recipe {path} must be a mapping of keys to values", hint="start it with base: w4a8"
        )
    return data


def parse_override(text: str) -> dict[str, Any]:
    """``"decoder.weights.bits=3"`` as the mapping ``{"decoder": {"weights": {"bits": 3}}}``."""
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UsageError(
            f"override {text!r} is not key=value", hint="for example: --set decoder.weights.bits=3"
        )
    try:
        data = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UsageError(f"override {text!r}: the value is not valid YAML") from error
    if data == "none":
        data = None
    for part in reversed(path):
        data = {part: data}
    return dict(data)


def component_override(component: str, label: str) -> dict[str, Any]:
    """``("decoder", "w3g64a8")`` as a mapping: weight bits, group size, activation bits.

    ``a16`` leaves activations in float, ``float`` the whole component; the decoder's rows are then
    not reordered, for there are no scales by modality.
    """
    match = _LABEL.fullmatch(label)
    if match is None and label.lower() != "float":
        raise UsageError(
            f"{component} {label!r} is no bit setting",
            hint="float, or weights of 8, 4, 3 or 2 bits and activations of 8 or 16: w4a8, "
            "w3g64a8 (groups of 64), w8a16",
        )
    static = match is not None and match["activations"] == "8"
    group = match["group"] if match else None
    weights = {
        "bits": int(match["weights"]) if match else None,
        "group_size": int(group) if group else None,
    }
    activations: dict[str, Any] = {"bits": 8 if static else None}
    changes: dict[str, Any] = {component: {"weights": weights, "activations": activations}}
    if component == "decoder":
        activations["per_modality"] = static
        if not static:
            changes["aifs"] = False
    return changes


def apply(scheme: Scheme, changes: Mapping[str, Any]) -> Scheme:
    """``scheme`` with the fields of a recipe-like mapping changed."""
    data = scheme.to_json()
    components = data["components"]
    for key, value in changes.items():
        if key not in KEYS:
            raise UsageError(f"unknown key {str(key)!r}", hint=nearest(str(key), KEYS))
        if key in COMPONENTS:
            _merge(components, {key: value})
        elif key in ("weights", "activations"):
            for name in LINEARS:
                _merge(components, {name: {key: value}})
        elif key == "msq":
            _merge(components, {"decoder": {"activations": {"per_modality": value}}})
        elif key == "quantize_head":
            head = dataclasses.asdict(WeightSpec(bits=8)) if _flag(key, value) else None
            components["decoder"]["head"] = head
        elif key == "quantize_embeddings":
            _merge(components, {"embed": {"weights": {"bits": 8 if _flag(key, value) else None}}})
        else:
            data[key] = value
    return Scheme.from_json(data)


def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{key} must be true or false, not {value!r}")
    return value


def _merge(into: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Merge nested mappings; anything else replaces."""
    for key, value in changes.items():
        old = into.get(key)
        if isinstance(value, Mapping) and isinstance(old, dict):
            _merge(old, value)
        else:
            into[key] = value


def _target_defaults(target: str, scheme: Scheme) -> Mapping[str, Any]:
    """What a target changes in a scheme where the user says nothing else."""
    from mqc.backends.registry import get_target

    defaults = getattr(get_target(target), "defaults", None)
    changes: Mapping[str, Any] = {} if defaults is None else defaults(scheme)
    return changes


def make_recipe(
    scheme: str | Scheme | None = None,
    recipe: str | Path | Mapping[str, Any] | None = None,
    overrides: Sequence[str | Mapping[str, Any]] = (),
    target: str | None = None,
) -> Recipe:
    """The recipe from all sources; later ones win: base scheme, target, recipe, overrides.

    Args:
        scheme: a scheme or its name; over the recipe's ``base``; ``w4a8`` where neither says.
        recipe: file, shipped recipe's name, or mapping.
        overrides: ``key=value`` texts or mappings, applied in order.
        target: name of the target whose own choices stand over a named scheme's; a
            :class:`Scheme` is taken as it is.

    Raises:
        UsageError: naming the key or value that is wrong.
    """
    data = dict(recipe) if isinstance(recipe, Mapping) else read_recipe(recipe) if recipe else {}
    base = data.pop("base", DEFAULT_SCHEME)
    passes = data.pop("passes", [])
    if not isinstance(passes, list) or not all(isinstance(item, str) for item in passes):
        raise UsageError(
            "recipe key 'passes' must be a list of texts", hint="passes: [my_pkg.my_mod:MyPass]"
        )
    start = (
        scheme
        if isinstance(scheme, Scheme)
        else named_scheme(str(base if scheme is None else scheme))
    )
    changes: dict[str, Any] = {}
    if target is not None and not isinstance(scheme, Scheme):
        _merge(changes, _target_defaults(target, start))
    for layer in (data, *overrides):
        _merge(changes, parse_override(layer) if isinstance(layer, str) else layer)
    return Recipe(apply(start, changes), tuple(passes))
