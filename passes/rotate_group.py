"""One rotation applied to one group of channels: writers, readers, norms and what is online."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mqc.analysis.axes import move_axis
from mqc.analysis.flow import NORMS, ChannelFlow, Group, Site
from mqc.ir import Program, TensorType
from mqc.ir.edit import (
    argument,
    aten,
    call,
    get_param,
    insert_after,
    param_value,
    replace,
    set_param,
    tensor_type,
)
from mqc.numerics.hadamard import apply_hadamard, hadamard_plan


def hadamard(width: int) -> Tensor:
    """The orthogonal Hadamard matrix that ``mqc::hadamard`` applies; row 0 is constant."""
    return apply_hadamard(torch.eye(width, dtype=torch.float64), width).T.contiguous()


def has_fast(width: int) -> bool:
    """Whether one Hadamard matrix covers ``width`` channels, so that it is a fast transform."""
    return hadamard_plan(width).is_full


class GroupRotation:
    """Applies one rotation to one group: y = R x on every value of the group."""

    def __init__(
        self, program: Program, flow: ChannelFlow, group: Group, matrix: Tensor, keep_mean: bool
    ) -> None:
        self.program = program
        self.flow = flow
        self.group = group
        self.read = matrix.T.contiguous()
        # Where only LayerNorms of single rows see the stream itself, nobody needs its mean:
        # writers drop it (row 0 of R), and the norms need no centring.
        raw = [s for s in (*group.readers, *group.barriers) if not s.normed]
        row_norms = all(
            s.node.target == aten.layer_norm.default and s.blocks == 1 for s in group.norms
        )
        self.centred = keep_mean and row_norms and not raw
        self.fast = has_fast(group.width)
        self.write = matrix.clone()
        if self.centred:
            self.write[0] = 0.0
        self.keep_mean = keep_mean

    def run(self) -> None:
        for site in self.group.writers:
            self._writer(site)
        for site in self.group.constants:
            self._constant(site)
        for site in self.group.readers:
            self._reader(site)
        for site in self.group.sources:
            self._source(site)
        for site in self.group.barriers:
            self._barrier(site)
        for site in self.group.norms:
            if site.node.target == aten.layer_norm.default:
                self._layer_norm(site)

    def _param(self, node: fx.Node, index: int) -> Tensor | None:
        value = param_value(self.program.params, argument(node, index))
        return None if value is None else value.to(torch.float64)

    def _set(self, node: fx.Node, index: int, value: Tensor) -> None:
        set_param(self.program, node, index, value.to(self.program.dtype))

    def _writer(self, site: Site) -> None:
        node = site.node
        if node.target == aten.embedding.default:
            table = self._param(node, 0)
            assert table is not None
            self._set(node, 0, table @ self.write.T)
            return
        weight, bias = self._param(node, 1), self._param(node, 2)
        assert weight is not None
        self._set(node, 1, torch.tensordot(self.write, weight, dims=1))
        if bias is not None:
            self._set(node, 2, self.write @ bias)

    def _reader(self, site: Site) -> None:
        weight = self._param(site.node, 1)
        assert weight is not None
        blocks = weight.reshape(weight.shape[0], site.blocks, self.group.width) @ self.read
        if self.centred or (self.keep_mean and site.normed and site.blocks == 1):
            blocks[..., 0] = 0.0  # this channel is always zero here
        self._set(site.node, 1, blocks.reshape(weight.shape))

    def _constant(self, site: Site) -> None:
        """Rotate the parameter behind a constant, or the constant itself where it has moved."""
        chain, root = [site.value], site.value
        while root.op != "get_attr":
            root = root.all_input_nodes[0]
            chain.append(root)
        axis: tuple[int, int] | None = (-1, 1)
        for node in reversed(chain[:-1]):
            axis = None if axis is None else move_axis(node, *axis)
        private = all(len(node.users) == 1 for node in chain)
        values = self.program.params[str(root.target)].to(torch.float64)
        if axis == (site.axis, 1) and private:
            if values.shape[-1] != self.group.width:
                values = values.expand(*values.shape[:-1], self.group.width)
            rotated = (values @ self.write.T).to(self.program.dtype)
            with root.graph.inserting_before(root):
                replace(root, get_param(self.program, root.graph, str(root.target), rotated))
        else:
            self._apply(site.value, [site.node], site.axis, self.write)

    def _source(self, site: Site) -> None:
        users = [
            user
            for user in site.value.users
            if user.op == "output" or self.flow.group_of(user) is self.group
        ]
        signs = self.read[:, 0].sign() if self.fast else None
        fast = None if signs is None else hadamard(self.group.width) * signs
        if signs is None or fast is None or not torch.allclose(fast, self.read.T):
            self._apply(site.value, users, -1, self.write)
            return
        value = self._flip(site.value, users, signs)
        value = insert_after(
            value, torch.ops.mqc.hadamard.default, (self.group.width,), users=users
        )
        if self.centred:  # channel 0 holds the mean, which nobody reads
            mask = torch.ones(self.group.width, dtype=self.program.dtype)
            mask[0] = 0.0
            self._scale(value, users, mask)

    def _flip(self, value: fx.Node, users: list[fx.Node], signs: Tensor) -> fx.Node:
        """``value * signs`` for ``users``: folded into a norm's gain, or multiplied."""
        if bool((signs > 0).all()):
            return value
        gain = self._param(value, 2) if value.target in NORMS else None
        if gain is None or set(value.users) != set(users):
            return self._scale(value, users, signs.to(self.program.dtype))
        self._set(value, 2, gain * signs)
        shift = self._param(value, 3) if value.target == aten.layer_norm.default else None
        if shift is not None:
            self._set(value, 3, shift * signs)
        return value

    def _scale(self, value: fx.Node, users: list[fx.Node], factor: Tensor) -> fx.Node:
        with value.graph.inserting_after(value):
            param = get_param(self.program, value.graph, f"{value.name}.scale", factor)
        with value.graph.inserting_after(param):
            args = (value, param)
            result = call(value.graph, aten.mul.Tensor, args, tensor_type(value), value)
        for user in users:
            user.replace_input_with(value, result)
        return result

    def _barrier(self, site: Site) -> None:
        self._apply(site.value, [site.node], site.axis, self.read, site.blocks)

    def _apply(
        self, value: fx.Node, users: list[fx.Node], axis: int, matrix: Tensor, blocks: int = 1
    ) -> None:
        """Multiply the channel axis of ``value`` by ``matrix`` for ``users``: online."""
        graph, kind = value.graph, tensor_type(value)
        anchor = min(users)
        with graph.inserting_before(anchor):
            moved = value
            if axis != -1:
                moved = _transpose(moved, axis)
            weight = torch.block_diag(*[matrix] * blocks).to(self.program.dtype)
            param = get_param(self.program, graph, f"{value.name}.rotation", weight)
            result = call(graph, aten.linear.default, (moved, param), tensor_type(moved), value)
            result.meta["keep_float"] = "an online rotation, no weight of the model"
            if axis != -1:
                result = _transpose(result, axis)
        assert tensor_type(result) == kind
        for user in users:
            user.replace_input_with(value, result)

    def _layer_norm(self, site: Site) -> None:
        node, width = site.node, self.group.width * site.blocks
        source = site.node.args[0]
        assert isinstance(source, fx.Node)
        with node.graph.inserting_before(node):
            if not self.centred:
                source = self._centre(node, source, site.blocks)
            args = (source, [width], None, node.args[4])
            norm = call(node.graph, aten.rms_norm.default, args, tensor_type(node), node)
        replace(node, norm)

    def _centre(self, node: fx.Node, source: fx.Node, blocks: int) -> fx.Node:
        """Subtract the mean of all blocks, in the rotated basis.

        The constant direction is u = R (1, .., 1) / sqrt(width): one channel a block. For one
        block this zeroes channel 0; for several it is ``x - u (u . x)``.
        """
        graph, kind = node.graph, tensor_type(source)
        direction = torch.zeros(blocks, self.group.width, dtype=self.program.dtype)
        direction[:, 0] = 1.0
        if blocks == 1:
            mask = get_param(self.program, graph, f"{node.name}.centre", 1.0 - direction[0])
            return call(graph, aten.mul.Tensor, (source, mask), kind, node)
        unit = direction.flatten() / blocks**0.5
        param = get_param(self.program, graph, f"{node.name}.mean", unit)
        part = call(graph, aten.mul.Tensor, (source, param), kind, node)
        inner = TensorType((*kind.shape[:-1], 1), kind.dtype)
        total = call(graph, aten.sum.dim_IntList, (part, [-1], True), inner, node)
        mean = call(graph, aten.mul.Tensor, (total, param), kind, node)
        return call(graph, aten.sub.Tensor, (source, mean), kind, node)


def _transpose(value: fx.Node, axis: int) -> fx.Node:
    kind = tensor_type(value)
    shape = list(kind.shape)
    shape[axis], shape[-1] = shape[-1], shape[axis]
    args = (value, axis % kind.rank, kind.rank - 1)
    return call(value.graph, aten.transpose.int, args, kind.with_shape(*shape), value)
