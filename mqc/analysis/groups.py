"""What a channel axis is followed by: its tracks, its contacts, and the group they make."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx

from mqc.ir.edit import aten

NORMS = (aten.rms_norm.default, aten.layer_norm.default)
CONVS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


class Track(NamedTuple):
    """A value holds a group's axis at ``axis`` (negative index), ``blocks`` times side by side.

    ``normed``: the value passed a norm on its way (its mean, under LayerNorm, is gone).
    ``scaled``: rows were multiplied by numbers or summed on the way: a rotation does not mind, but
    what was added before is no longer what was added.
    """

    group: int
    axis: int = -1
    blocks: int = 1
    normed: bool = False
    scaled: bool = False

    @property
    def place(self) -> tuple[int, int]:
        return self.axis, self.blocks


class Site(NamedTuple):
    """A contact with a group: ``node`` in ``component``, touching it through ``value``."""

    component: str
    node: fx.Node
    value: fx.Node
    axis: int = -1
    blocks: int = 1
    normed: bool = False
    scaled: bool = False


@dataclass
class Group:
    """All contacts of one channel axis of ``width`` channels."""

    width: int
    writers: list[Site] = field(default_factory=list)
    readers: list[Site] = field(default_factory=list)
    constants: list[Site] = field(default_factory=list)
    norms: list[Site] = field(default_factory=list)
    barriers: list[Site] = field(default_factory=list)
    sources: list[Site] = field(default_factory=list)
    """Values that join the group without a foldable writer: they are rotated online."""
    adds: int = 0

    def absorb(self, other: Group) -> None:
        for name in ("writers", "readers", "constants", "norms", "barriers", "sources"):
            getattr(self, name).extend(getattr(other, name))
        self.adds += other.adds
