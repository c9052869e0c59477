"""What one test process makes and all processes of a test run use."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mqc.ir import Program, load_program, save_program

VARIABLE = "MQC_TEST_RUN"
"""Names the folder of the run; tests/conftest.py sets it for the workers of pytest-xdist, too."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; ``path`` stays as an empty file."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def shared_program(name: str, make: Callable[[], Program]) -> Program:
    """The program that ``make`` gave in the first process of the run that asked for ``name``.

    It is read from its file in every process, so that tests do not depend on their order. Without a
    run (a tool that uses tests' programs) it is made.
    """
    if VARIABLE not in os.environ:
        return make()
    folder = Path(os.environ[VARIABLE]) / name
    with locked(folder.with_name(f"{name}.lock")):
        if not folder.is_dir():
            made = Path(tempfile.mkdtemp(dir=folder.parent))
            save_program(make(), made)
            made.rename(folder)
    return load_program(folder)
