"""The intermediate representation: typed fx graphs, their parameters, and tools on them."""

from mqc.ir.params import ParamStore
from mqc.ir.printer import format_component, format_program
from mqc.ir.program import Component, Link, Program
from mqc.ir.scratch import NamedScratch, Scratch
from mqc.ir.serialize import load_program, save_program
from mqc.ir.types import SCALAR, TUPLE, Port, TensorType
from mqc.ir.verifier import verify

__all__ = [
    "SCALAR",
    "TUPLE",
    "Component",
    "Link",
    "NamedScratch",
    "ParamStore",
    "Port",
    "Program",
    "Scratch",
    "TensorType",
    "format_component",
    "format_program",
    "load_program",
    "save_program",
    "verify",
]
