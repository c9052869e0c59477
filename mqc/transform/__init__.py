"""Passes and the manager that runs them."""

from mqc.transform.base import (
    Journal,
    Pass,
    PassContext,
    PassResult,
    Progress,
    Skip,
    check_order,
    no_progress,
)
from mqc.transform.manager import PassManager, PassRecord

__all__ = [
    "Journal",
    "Pass",
    "PassContext",
    "PassManager",
    "PassRecord",
    "PassResult",
    "Progress",
    "Skip",
    "check_order",
    "no_progress",
]
