"""Residual streams: the groups of channels that a rotation can take as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from mqc.analysis.flow import ChannelFlow, Group

MIN_ADDS = 2
"""A residual stream is added to at least twice (attention and feed-forward of one layer)."""


@dataclass(frozen=True)
class Stream:
    """A residual stream of ``width`` channels in the ``components`` it passes through."""

    group: Group

    @property
    def width(self) -> int:
        return self.group.width

    @property
    def components(self) -> list[str]:
        """The components that touch the stream, in order of first contact."""
        group = self.group
        sites = [*group.writers, *group.sources, *group.readers, *group.norms]
        return list(dict.fromkeys(site.component for site in sites))

    @property
    def online(self) -> int:
        """Contacts that a rotation cannot fold: it must be applied or undone at run time."""
        return len(self.group.sources) + len(self.group.barriers)

    def describe(self) -> dict[str, object]:
        """JSON data for reports."""
        group = self.group
        return {
            "width": group.width,
            "components": self.components,
            "adds": group.adds,
            "writers": len(group.writers),
            "readers": len(group.readers),
            "norms": len(group.norms),
            "constants": len(group.constants),
            "online": self.online,
        }


def find_streams(flow: ChannelFlow) -> list[Stream]:
    """Residual streams of a program, largest number of contacts first within a component."""
    return [Stream(group) for group in flow.groups() if group.adds >= MIN_ADDS]


def find_free_groups(flow: ChannelFlow) -> list[Group]:
    """Groups that are no streams, but that a rotation fits without any run-time cost.

    They pass a norm between their writers and readers, so rotating them spreads outliers; a plain
    chain of linears gains nothing and is left alone.
    """
    return [
        group
        for group in flow.groups()
        if group.adds < MIN_ADDS
        and group.writers
        and group.readers
        and group.norms
        and not (group.barriers or group.sources)
    ]
