"""The functions behind the command line, in one place."""

from mqc.compiler import CompileReport, PassOptions, compile, opt  # noqa: A004
from mqc.evaluation import Evaluation, evaluate
from mqc.inspection import Inspection, inspect
from mqc.loading import load, load_float, open_model
from mqc.planning import Plan, plan
from mqc.probing import probe

__all__ = [
    "CompileReport",
    "Evaluation",
    "Inspection",
    "PassOptions",
    "Plan",
    "compile",
    "evaluate",
    "inspect",
    "load",
    "load_float",
    "open_model",
    "opt",
    "plan",
    "probe",
]
