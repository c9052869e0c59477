"""Calibration inputs of each component, made by running what stands in front of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mqc.calib.walk import Sample
from mqc.errors import CalibrationError
from mqc.host.batch import make_batch
from mqc.host.engine import merge, read
from mqc.host.program_engine import ProgramEngine
from mqc.host.prompt import Prompt
from mqc.ir import Component, Program


def component_samples(
    program: Program, prompts: Sequence[Prompt] | None, name: str
) -> list[Sample]:
    """Inputs of component ``name`` for every prompt; calls of equal shape are batched.

    The decoder's inputs come from the program's own vision component, quantized or not as it
    stands. Logits are asked for text rows, where a model is asked to go on.

    Raises:
        CalibrationError: there are no prompts, or none of them reaches the component.
    """
    if not prompts:
        raise CalibrationError(
            "there are no calibration samples",
            hint="give a data set, for example --calibration folder or file.jsonl",
        )
    if name == "vision":
        samples = [_cast(program, name, call) for p in prompts for call in p.vision_calls]
    elif name == "embed":
        samples = [{"input_ids": p.input_ids.masked_fill(p.visual_mask, 0)[None]} for p in prompts]
    else:
        recorder = _Recorder(program)
        for prompt in prompts:
            batch = make_batch([prompt])
            rows = (~prompt.visual_mask).nonzero().T
            read(recorder, merge(recorder, [prompt], batch), batch, rows)
        samples = recorder.samples
    if not samples:
        raise CalibrationError(
            f"no calibration sample reaches component {name!r}",
            hint="use samples with images: static scales of visual values need them",
        )
    return _batched(program.components[name], samples)


BATCH = 32
"""Most calls that are joined into one sample."""


def _batched(component: Component, samples: Sequence[Sample]) -> list[Sample]:
    """Join samples of equal shapes along the axis that counts them, up to :data:`BATCH`.

    A component without such an axis for every input (a tower of a variable grid) takes one call
    at a time.
    """
    axes = {}
    for port in component.inputs:
        axis = next((port.axes.index(r) for r in ("batch", "image") if r in port.axes), None)
        if axis is None:
            return list(samples)
        axes[port.name] = axis
    groups: dict[tuple[tuple[int, ...], ...], list[Sample]] = {}
    for sample in samples:
        groups.setdefault(tuple(tuple(sample[name].shape) for name in axes), []).append(sample)
    return [
        {name: torch.cat([sample[name] for sample in part], axis) for name, axis in axes.items()}
        for group in groups.values()
        for part in (group[at : at + BATCH] for at in range(0, len(group), BATCH))
    ]


def _cast(program: Program, name: str, inputs: Sample) -> Sample:
    ports = program.components[name].inputs
    return {port.name: inputs[port.name].to(port.type.dtype) for port in ports}


class _Recorder(ProgramEngine):
    """Runs vision and embeddings; keeps the decoder's inputs and runs nothing of it."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.samples: list[Sample] = []

    def _call(self, name: str, inputs: Sample) -> tuple[torch.Tensor, ...]:
        if name != "decoder":
            return super()._call(name, inputs)
        self.samples.append(_cast(self.program, name, inputs))
        caches = [inputs[port.name] for port in self._cache_ports()]
        return torch.zeros(*inputs["logit_index"].shape, 1), *caches
