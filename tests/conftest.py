"""Shared by all tests: options; GPU tests are skipped where no GPU is."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile

import pytest

# torch's structured trace, once pytest captures it as log records, costs more than the tracing.
logging.getLogger("torch.__trace").propagate = False


RUN = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """A folder for what the processes of this run share (tests/shared.py), made by the first."""
    if "MQC_TEST_RUN" not in os.environ:
        config.stash[RUN] = os.environ["MQC_TEST_RUN"] = tempfile.mkdtemp(prefix="mqc-tests-")


def pytest_unconfigure(config: pytest.Config) -> None:
    if RUN in config.stash:
        shutil.rmtree(config.stash[RUN])
        del os.environ["MQC_TEST_RUN"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden/*.txt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Files with slow tests first: none of them is then what a worker ends with alone.
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)
    gpu = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
