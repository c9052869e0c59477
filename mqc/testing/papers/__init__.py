"""Structures of models that live outside transformers, as small modules written from the papers.

They have the dataflow of the originals, not their names or weights: what is tried on them is
whether capture, analyses and passes understand the structure. Importing this package registers
them with transformers' auto classes and their adapters with mqc, as a package outside would.
"""

from __future__ import annotations

from mqc.testing.papers.experts import ExpertsConfig, ExpertsModel
from mqc.testing.papers.frame import PaperConfig, PaperModel
from mqc.testing.papers.queries import QueriesConfig, QueriesModel
from mqc.testing.papers.slices import SlicesConfig, SlicesModel

__all__ = [
    "ExpertsConfig",
    "ExpertsModel",
    "PaperConfig",
    "PaperModel",
    "QueriesConfig",
    "QueriesModel",
    "SlicesConfig",
    "SlicesModel",
]
