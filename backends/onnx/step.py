"""Decoding one token a sequence on the CPU, with everything bound once.

Between two steps nothing changes its shape: caches are buffers that the decoder fills in place, and
the mask is as wide as they are. So values are copied into arrays that stay bound, and a step costs
one call into onnxruntime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray


class Buffers(list[Any]):
    """The caches of a decoder in order of its ports, with the step that is bound to them."""

    step: Step | None = None


class Step:
    """A decoder's inputs and outputs for one token a sequence.

    Args:
        session: the decoder.
        given: its input ports but for the caches; sizes of other names than ``batch``, of one row
            each, and of the mask's columns, ``capacity``, are known.
        names: names of the caches' input ports.
        outputs: names of the outputs: logits, then the caches.
        dtypes: onnxruntime's type names -> NumPy's.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        given: Sequence[Any],
        names: Sequence[str],
        outputs: Sequence[str],
        caches: Sequence[Any],
        dtypes: Mapping[str, Any],
    ) -> None:
        self._session, self._binding = session, session.io_binding()
        batch, _, self.capacity = caches[0].shape()[:3]
        sizes = {"batch": batch, "past + tokens": self.capacity}
        self.inputs: dict[str, NDArray[Any]] = {}
        self._kept = []
        for port in given:
            shape = [n if isinstance(n, int) else sizes.get(n, 1) for n in port.shape]
            self.inputs[port.name] = np.zeros(shape, dtypes[port.type])
            value = ort.OrtValue.ortvalue_from_numpy(self.inputs[port.name])
            self._kept.append(value)
            self._binding.bind_ortvalue_input(port.name, value)
        for name, value in zip(names, caches, strict=True):
            self._binding.bind_ortvalue_input(name, value)
        logits, *made = outputs
        vocabulary = session.get_outputs()[0].shape[-1]
        self._logits = np.zeros((batch, 1, vocabulary), np.float32)
        value = ort.OrtValue.ortvalue_from_numpy(self._logits)
        self._kept.append(value)
        self._binding.bind_ortvalue_output(logits, value)
        for name, value in zip(made, caches, strict=True):
            self._binding.bind_ortvalue_output(name, value)

    def __call__(self, values: Mapping[str, NDArray[Any]], past: int) -> NDArray[Any]:
        """Logits [B, 1, vocab] after the rows of ``values``, by input; ``past`` rows are in use.

        The mask may have fewer columns than the buffers have rows.
        """
        for name, array in self.inputs.items():
            if name == "mask":
                array[..., : past + 1] = values[name]
            elif name == "past":
                array[0] = past
            else:
                array[...] = values[name]
        self._session.run_with_iobinding(self._binding)
        return self._logits.copy()
