"""Operator calls that are wrong, or empty, as the tests of every library make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import onnxruntime as ort
from operator_calls import CONSTANT, B, Values, feeds, model_of

Session = Callable[[onnx.ModelProto], ort.InferenceSession]


def mutations(value: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """The value with other shapes: an axis less or more, one longer, one shorter, one empty."""
    if value.ndim:
        yield "flat", value.reshape(-1)[:1].reshape(())
    yield "wrapped", value[None]
    for axis in range(value.ndim):
        yield (
            f"longer{axis}",
            np.concatenate([value, value[(slice(None),) * axis + (slice(0, 1),)]], axis),
        )
        yield f"shorter{axis}", np.delete(value, 0, axis)
        yield f"empty{axis}", np.take(value, [], axis)
        if value.ndim > 1:
            yield f"dropped{axis}", np.take(value, 0, axis)


def check_malformed_shapes(
    op_type: str,
    values: Values,
    session: Session,
    valid: Sequence[str],
    constants: tuple[str, ...] = CONSTANT,
) -> None:
    """Every mutation of an argument is an error that names the operator, at session creation for
    constants, at run time for others; those of arguments in ``valid`` may be none."""
    calls = {op_type: values}
    good = session(model_of(calls, constants))
    good.run(None, feeds(calls, constants))
    raised = 0
    for name, value in values.items():
        for kind, changed in mutations(value):
            calls = {op_type: {**values, name: changed.copy()}}
            message = None
            try:
                made = session(model_of(calls, constants)) if name in constants else good
                made.run(None, feeds(calls, constants))
            except Exception as error:  # noqa: BLE001  (onnxruntime's own types)
                message, raised = str(error), raised + 1
            if message is None:
                assert name in valid, (name, kind)
            else:
                assert op_type in message, (name, kind)
    assert raised > len(values)


AXES = {
    # where the batch and the tokens of an input are; (0, 1) for all others that vary by row
    **dict.fromkeys(("key_cache", "value_cache", "key_scale", "value_scale"), (0, None)),
    "mask": (0, 2),
    **dict.fromkeys((*CONSTANT, "x_scale", "scale", "bias", "split", "past"), (None, None)),
}


def without_rows(op_type: str, values: Values, axis: int) -> Values:
    """The arguments for no sequences (axis 0), or for sequences of no tokens (axis 1)."""
    values = dict(values)
    for name, value in values.items():
        place = AXES.get(name, (0, 1))[axis]
        if name == "modality" and value.ndim == 1 and axis == 1:
            values[name] = np.zeros(B, np.int64)
        elif place is not None and not (op_type == "EmbeddingW8" and name != "ids"):
            values[name] = np.ascontiguousarray(np.take(value, [], place))
            if name == "mask" and axis == 1 and op_type.startswith("AttentionFull"):
                values[name] = values[name][..., :0]  # keys are rows, too
    return values
