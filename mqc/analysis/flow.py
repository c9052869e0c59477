"""Where does a channel axis travel? Union-find over the dataflow of all components.

A *group* is a set of values that share one channel axis: a residual stream, or the output of a
linear until something mixes its channels. Each value of a group is tracked by the position of the
axis and by how many copies of the axis stand side by side in it (patch merging concatenates
``blocks`` neighbours). Everything here is found in the graph; no names, no sizes.

An orthogonal rotation of a group's axis is exact if every *writer* takes it on its output side,
every *reader* on its input side, and every other contact is known: *constants* added or
concatenated, *norms* (equivariant without gain), and *barriers*, where it must be undone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from mqc.analysis.axes import move_axis
from mqc.analysis.groups import CONVS, NORMS, Group, Site, Track
from mqc.ir import Program
from mqc.ir.edit import argument, aten, is_tensor, tensor_type
from mqc.ir.serialize import target_name
from mqc.ir.types import TensorType

_SCALING = (aten.sum.dim_IntList, aten.mul.Scalar, aten.div.Scalar)


class ChannelFlow:
    """The groups of a program.

    ``norms_open``: a norm's output starts a group of its own (to see who reads its gain); else a
    norm without gain stays in its input's group, and one with gain is a barrier.
    """

    def __init__(self, program: Program, *, norms_open: bool = False) -> None:
        self.program = program
        self.norms_open = norms_open
        self.tracks: dict[fx.Node, Track] = {}
        self._parent: list[int] = []
        self._groups: list[Group] = []
        self._component = ""
        self._constant: dict[fx.Node, bool] = {}
        for component in program:
            self._component = component.name
            self._link_inputs()
            for node in component.graph.nodes:
                if node.op == "call_function":
                    self._visit(node)
            self._visit_outputs()

    # ---- results -------------------------------------------------------------------------

    def groups(self) -> list[Group]:
        """Live groups in order of first appearance."""
        return [g for i, g in enumerate(self._groups) if self._find(i) == i]

    def group_of(self, value: fx.Node) -> Group | None:
        track = self.track(value)
        return None if track is None else self._groups[track.group]

    def track(self, value: Any) -> Track | None:
        """Where ``value`` holds a group's axis, with the group's representative index."""
        track = self.tracks.get(value) if isinstance(value, fx.Node) else None
        return None if track is None else track._replace(group=self._find(track.group))

    # ---- union-find ----------------------------------------------------------------------

    def _find(self, index: int) -> int:
        while self._parent[index] != index:
            self._parent[index] = self._parent[self._parent[index]]
            index = self._parent[index]
        return index

    def _open(self, value: fx.Node, axis: int, width: int) -> Group:
        index = len(self._groups)
        self._parent.append(index)
        self._groups.append(Group(width))
        self.tracks[value] = Track(index, axis)
        return self._groups[index]

    def _union(self, left: int, right: int) -> bool:
        left, right = self._find(left), self._find(right)
        if left == right:
            return True
        if self._groups[left].width != self._groups[right].width:
            return False
        keep, drop = min(left, right), max(left, right)
        self._groups[keep].absorb(self._groups[drop])
        self._parent[drop] = keep
        return True

    # ---- walking -------------------------------------------------------------------------

    def _site(self, node: fx.Node, value: fx.Node) -> Site:
        track = self.tracks[value]
        return Site(self._component, node, value, *track[1:])

    def _group(self, value: fx.Node) -> Group:
        return self._groups[self._find(self.tracks[value].group)]

    def _barrier(self, node: fx.Node, *values: Any) -> None:
        for value in values:
            if self.track(value) is not None:
                self._group(value).barriers.append(self._site(node, value))

    def _write(self, node: fx.Node, axis: int) -> None:
        width = tensor_type(node).shape[axis]
        if isinstance(width, int):
            site = Site(self._component, node, node, axis)
            self._open(node, axis, width).writers.append(site)

    def _source(self, value: fx.Node) -> None:
        """Let an untracked value join as an online-rotated source (channels last).

        What a constant was added to joins by itself: it may be easier to rotate than the sum.
        """
        width = tensor_type(value).shape[-1]
        assert isinstance(width, int)
        if value.target == aten.add.Tensor and len(value.args) == 2 and not value.kwargs:
            for inner, constant in (value.args, value.args[::-1]):
                if not (is_tensor(inner) and self.is_constant(constant) and is_tensor(constant)):
                    continue
                assert isinstance(inner, fx.Node) and isinstance(constant, fx.Node)
                if self.is_constant(inner) or tensor_type(inner).shape[-1:] != (width,):
                    continue
                self._source(inner)
                self.tracks[value] = self.tracks[inner]._replace(normed=False)
                self._group(value).constants.append(Site(self._component, value, constant))
                return
        self._open(value, -1, width).sources.append(Site(self._component, value, value))

    def is_constant(self, value: Any) -> bool:
        """Whether ``value`` depends on parameters alone (through views and expansions)."""
        if not isinstance(value, fx.Node):
            return not isinstance(value, (list, tuple)) or all(map(self.is_constant, value))
        if value.op == "get_attr":
            return True
        if value.op != "call_function":
            return False
        if value not in self._constant:
            inputs = [n for n in value.all_input_nodes if is_tensor(n)]
            self._constant[value] = bool(inputs) and all(map(self.is_constant, inputs))
        return self._constant[value]

    def _visit(self, node: fx.Node) -> None:
        rule = _RULES.get(node.target)
        if rule is not None:
            rule(self, node)
            return
        value = argument(node, 0)
        track = self.track(value)
        moved = None if track is None else move_axis(node, track.axis, track.blocks)
        if track is not None and moved is not None:
            scaled = track.scaled or node.target in _SCALING
            self.tracks[node] = Track(track.group, *moved, track.normed, scaled)
            self._barrier(node, *(n for n in node.all_input_nodes if n is not value))
        elif target_name(node.target) != "aten.sym_size.int":
            self._barrier(node, *node.all_input_nodes)

    def _link_inputs(self) -> None:
        for link in self.program.links:
            if link.target[0] != self._component:
                continue
            here = self.program.components[self._component].placeholder(link.target[1])
            there = self.program.components[link.source[0]].output_value(link.source[1])
            if self.track(there) is None:
                width = tensor_type(there).shape[-1]
                if not isinstance(width, int):
                    continue
                site = Site(link.source[0], there, there)
                self._open(there, -1, width).sources.append(site)
            track = self.tracks[there]
            if here not in self.tracks:
                self.tracks[here] = Track(track.group)
            self._union(self.tracks[here].group, track.group)

    def _visit_outputs(self) -> None:
        component = self.program.components[self._component]
        linked = {link.source for link in self.program.links}
        for port in component.outputs:
            value = component.output_value(port.name)
            if (component.name, port.name) not in linked:
                self._barrier(component.output_node, value)
            elif (track := self.track(value)) is not None and track.place != (-1, 1):
                self._barrier(component.output_node, value)
                del self.tracks[value]


# ---- rules per operator --------------------------------------------------------------------


def _linear(flow: ChannelFlow, node: fx.Node) -> None:
    value, weight = node.args[0], node.args[1]
    assert isinstance(value, fx.Node) and isinstance(weight, fx.Node)
    track = flow.track(value)
    if track is not None:
        foldable = track.axis == -1 and weight.op == "get_attr"
        group = flow._group(value)
        (group.readers if foldable else group.barriers).append(flow._site(node, value))
    if weight.op == "get_attr":
        flow._write(node, -1)
    else:
        flow._barrier(node, weight)


def _embedding(flow: ChannelFlow, node: fx.Node) -> None:
    weight = node.args[0]
    if isinstance(weight, fx.Node) and weight.op == "get_attr" and not flow.is_constant(node):
        flow._write(node, -1)


def _conv(flow: ChannelFlow, node: fx.Node) -> None:
    flow._barrier(node, *node.all_input_nodes)
    weight, groups = node.args[1], argument(node, 6)
    if isinstance(weight, fx.Node) and weight.op == "get_attr" and groups in (None, 1):
        flow._write(node, 1 - tensor_type(node).rank)


def _norm(flow: ChannelFlow, node: fx.Node) -> None:
    value, shape = node.args[0], node.args[1]
    assert isinstance(value, fx.Node) and isinstance(shape, (list, tuple))
    track = flow.track(value)
    plain = argument(node, 2) is None and (
        node.target == aten.rms_norm.default or argument(node, 3) is None
    )
    whole = (
        track is not None
        and track.axis == -1
        and list(shape) == [track.blocks * flow._group(value).width]
    )
    if whole:
        flow._group(value).norms.append(flow._site(node, value))
    if flow.norms_open:
        flow._write(node, -1)
    elif track is not None and whole and plain:
        flow.tracks[node] = track._replace(normed=True)
    else:
        if whole:
            flow._group(value).norms.pop()
        flow._barrier(node, value)


def _add(flow: ChannelFlow, node: fx.Node) -> None:
    left, right = node.args[0], node.args[1]
    if not (isinstance(left, fx.Node) or isinstance(right, fx.Node)):
        return
    if len(node.args) > 2 or node.kwargs or not (is_tensor(left) and is_tensor(right)):
        flow._barrier(node, left, right)
        return
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    for value, other in ((left, right), (right, left)):
        track = flow.track(other)
        if track is not None and flow.track(value) is None and not flow.is_constant(value):
            same = tensor_type(value).shape[-1:] == tensor_type(node).shape[-1:]
            if track.place == (-1, 1) and same:
                flow._source(value)
    one, two = flow.track(left), flow.track(right)
    if one is not None and two is not None:
        if one.place == two.place and one.blocks == 1 and flow._union(one.group, two.group):
            both = one._replace(normed=one.normed and two.normed)
            flow.tracks[node] = both._replace(scaled=one.scaled or two.scaled)
            flow._group(node).adds += 1
        else:
            flow._barrier(node, left, right)
        return
    value, constant = (left, right) if one is not None else (right, left)
    track = one or two
    if track is None:
        return
    if track.blocks == 1 and flow.is_constant(constant):
        flow.tracks[node] = track._replace(normed=False)
        flow._group(node).constants.append(Site(flow._component, node, constant, track.axis))
    else:
        flow._barrier(node, value)


def _scale(flow: ChannelFlow, node: fx.Node) -> None:
    """Multiplication or division by one number, or by one a row, keeps the axis."""
    value, factor = node.args[0], node.args[1]
    swaps = node.target == aten.mul.Tensor
    if swaps and (not isinstance(value, fx.Node) or flow.track(value) is None):
        value, factor = factor, value
    track = flow.track(value)
    scalar = not is_tensor(factor) or (
        isinstance(factor, fx.Node)
        and track is not None
        and flow.track(factor) is None
        and _is_one(tensor_type(factor), track.axis)
    )
    if track is not None and scalar and isinstance(value, fx.Node):
        flow.tracks[node] = track._replace(scaled=True)
    else:
        flow._barrier(node, value, factor)


def _is_one(kind: TensorType, axis: int) -> bool:
    """Whether a factor of this type is the same along ``axis`` (negative)."""
    return kind.rank < -axis or kind.shape[axis] == 1


def _join(flow: ChannelFlow, node: fx.Node, values: list[fx.Node], mixes_axis: bool) -> None:
    """A value made of rows of several: all must be in one group, or constant."""
    first = next((track for v in values if (track := flow.track(v)) is not None), None)
    if first is None:
        return
    good = not mixes_axis and first.blocks == 1
    for value in values:
        track = flow.track(value)
        if track is None:
            good = good and flow.is_constant(value)
        else:
            good = good and track.place == first.place and flow._union(first.group, track.group)
    if not good:
        flow._barrier(node, *values)
        return
    tracks = [flow.track(value) for value in values]
    normed = all(track is not None and track.normed for track in tracks)
    scaled = any(track is not None and track.scaled for track in tracks)
    flow.tracks[node] = first._replace(normed=normed, scaled=scaled)
    for value in values:
        if flow.track(value) is None:
            site = Site(flow._component, node, value, first.axis)
            flow._group(node).constants.append(site)


def _cat(flow: ChannelFlow, node: fx.Node) -> None:
    values, dim = node.args[0], argument(node, 1) or 0
    assert isinstance(values, (list, tuple)) and isinstance(dim, int)
    nodes = [value for value in values if isinstance(value, fx.Node)]
    rank = tensor_type(node).rank
    first = next((track for v in nodes if (track := flow.track(v)) is not None), None)
    _join(flow, node, nodes, first is not None and dim % rank == first.axis % rank)


def _masked_scatter(flow: ChannelFlow, node: fx.Node) -> None:
    value, source = node.args[0], node.args[2]
    assert isinstance(value, fx.Node) and isinstance(source, fx.Node)
    _join(flow, node, [value, source], False)


def _where(flow: ChannelFlow, node: fx.Node) -> None:
    """Rows of one value or of the other, as long as all channels of a row go together."""
    condition, left, right = node.args
    assert isinstance(condition, fx.Node)
    values = [value for value in (left, right) if isinstance(value, fx.Node)]
    first = next((track for v in values if (track := flow.track(v)) is not None), None)
    mixes = first is not None and not _is_one(tensor_type(condition), first.axis)
    same = all(tensor_type(value).rank == tensor_type(node).rank for value in values)
    _join(flow, node, values, mixes or not same)


_RULES: dict[Any, Callable[[ChannelFlow, fx.Node], None]] = {
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
    aten.add.Tensor: _add,
    aten.mul.Tensor: _scale,
    aten.div.Tensor: _scale,
    aten.cat.default: _cat,
    aten.masked_scatter.default: _masked_scatter,
    aten.where.self: _where,
    **dict.fromkeys(NORMS, _norm),
    **dict.fromkeys(CONVS, _conv),
}


def weight_type(node: fx.Node) -> TensorType:
    """Type of the weight parameter (argument 1) of a linear or convolution."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return tensor_type(weight)


def is_linear(node: fx.Node) -> bool:
    """A float linear with a parameter as its weight."""
    return (
        node.target == aten.linear.default
        and isinstance(node.args[1], fx.Node)
        and node.args[1].op == "get_attr"
    )


__all__ = [
    "CONVS",
    "NORMS",
    "ChannelFlow",
    "Group",
    "Site",
    "Track",
    "is_linear",
    "weight_type",
]
