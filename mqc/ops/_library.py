"""The one torch library of mqc, and the registry of its operators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mqc.errors import UsageError

if TYPE_CHECKING:
    from mqc.ops._onnx_body import Body

LIBRARY = torch.library.Library("mqc", "DEF")

Arguments = Mapping[str, Any]
"""Arguments of one ONNX translation by schema name; tensors are onnx_ir values."""


@dataclass(frozen=True)
class OnnxForm:
    """How an operator is written in ONNX.

    Attributes:
        name: base op type, e.g. "LinearW4A8".
        flags: the variant of a call, in canonical order; op type = name + "_" + flags.
        inputs: input names of a variant, in order.
        body: writes the standard-op body of a variant and returns the names of its outputs.
        dtypes: tensor dtypes (ONNX names) an input or output may have; where not listed, those of
            "*", or "float".
        constants: extra inputs made from a call's arguments (name -> NumPy array).
        attributes: integer and float schema arguments that are kept as attributes.
        outputs: output names of a variant, in order. A variant may leave out the last results of
            the operator where they are empty by definition.
    """

    name: str
    flags: Callable[[Arguments], tuple[str, ...]]
    inputs: Callable[[Sequence[str]], tuple[str, ...]]
    body: Callable[[Body, Sequence[str]], str | tuple[str, ...]]
    dtypes: Mapping[str, str]
    constants: Callable[[Arguments], Mapping[str, Any]] | None = None
    attributes: tuple[str, ...] = ()
    outputs: Callable[[Sequence[str]], tuple[str, ...]] = lambda flags: ("y",)


@dataclass(frozen=True)
class OpDef:
    """An operator of the library `mqc`."""

    name: str
    schema: str
    reference: Callable[..., torch.Tensor | Sequence[torch.Tensor]]
    fake: Callable[..., torch.Tensor | Sequence[torch.Tensor]]
    onnx: OnnxForm

    @property
    def overload(self) -> torch._ops.OpOverload:
        """The function a graph calls: torch.ops.mqc.<name>.default."""
        overload: torch._ops.OpOverload = getattr(torch.ops.mqc, self.name).default
        return overload

    @property
    def arguments(self) -> tuple[str, ...]:
        """Argument names in schema order."""
        return tuple(argument.name for argument in self.overload._schema.arguments)

    @property
    def results(self) -> int:
        """How many tensors a call returns."""
        return len(self.overload._schema.returns)

    def attributes(self, arguments: Arguments) -> dict[str, int | float]:
        """The attributes of an ONNX node by name, as the schema types them."""
        kinds = {a.name: str(a.type) for a in self.overload._schema.arguments}
        return {
            name: float(arguments[name]) if kinds[name] == "float" else int(arguments[name])
            for name in self.onnx.attributes
        }


OPS: dict[str, OpDef] = {}
"""All operators by name."""


ADDED: set[str] = set()
"""Names of those that came through :func:`add_operator`."""


def add_operator(op: OpDef) -> OpDef:
    """Register an operator of another package as ``torch.ops.mqc.<name>``.

    Graphs of every dialect but ``cuda`` may then call it: target ``reference`` runs
    ``op.reference``, which computes in the dtype it is given (float64 while ``--verify-each``
    proves a pass); target ``onnx`` writes ``op.onnx``'s body into the file. Raises
    :class:`~mqc.errors.UsageError` for a name that is taken.
    """
    if op.name in OPS:
        raise UsageError(
            f"there is an operator mqc::{op.name} already", hint="give yours another name"
        )
    ADDED.add(op.name)
    return register(op)


def register(op: OpDef) -> OpDef:
    """Define an operator with its reference implementation for every device."""
    LIBRARY.define(f"{op.name}{op.schema}", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(op.name, op.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mqc::{op.name}", op.fake, lib=LIBRARY)
    OPS[op.name] = op
    return op
