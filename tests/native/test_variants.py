"""Every operator variant in onnxruntime: the library's kernels against the bodies."""

from __future__ import annotations

import native_library as native
import numpy as np
import pytest
from operator_calls import RESULTS, VARIANTS, S, arguments, feeds, model_of

import mqc.ops
from mqc.ops.onnx_functions import attach_functions

pytestmark = native.needs_library


def test_operators_of_the_library_are_operators_of_mqc() -> None:
    """Others run by their bodies."""
    assert set(VARIANTS) < {op.onnx.name for op in mqc.ops.OPS.values()}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("op", VARIANTS)
def test_kernels_equal_bodies(op: str, threads: int, rng: np.random.Generator) -> None:
    """The library has a kernel for every variant: its model holds no bodies."""
    types = VARIANTS[op] if threads == 1 else VARIANTS[op][-3:]
    step = 7 if op == "ActivationQuantize" and threads == 1 else 1
    for start in range(step):  # one model of a part of the variants after the other
        calls = {t: arguments(t, rng) for t in types[start::step]}
        model = model_of(calls)
        names = [output.name for output in model.graph.output]
        every = threads == 1  # operators of the library
        data = model.SerializeToString()
        found = native.session(data, native=True, threads=threads, every=every)
        got = found.run(names, feeds(calls))
        attach_functions(model)
        wanted = native.session(model.SerializeToString(), native=False)
        expected = wanted.run(names, feeds(calls))
        for name, left, right in zip(names, got, expected, strict=True):
            assert left.dtype == right.dtype and left.shape == right.shape, name
            if left.dtype == np.float32:
                assert native.relative(left, right) <= 2e-6, name
            elif op in ("QuantizeStatic", "AttentionInt8") or name in RESULTS:
                assert np.array_equal(left, right), name
            else:
                assert native.steps_apart(left, right) <= 1, name
                assert (left != right).mean() <= 0.01, name
        if step > 1 and start == 1:
            break  # the others differ in flags that these have in other combinations


def test_library_is_preferred_to_the_body(rng: np.random.Generator) -> None:
    """A count of visual rows above the rows is an error of the kernel; the body accepts it."""
    calls = {"QuantizeStatic_count": arguments("QuantizeStatic_count", rng)}
    calls["QuantizeStatic_count"]["modality"][:] = S + 1
    model = model_of(calls)
    attach_functions(model)
    native.session(model.SerializeToString(), native=False).run(None, feeds(calls))
    with pytest.raises(Exception, match=r"counts 4 visual rows of 3"):
        native.session(model.SerializeToString(), native=True).run(None, feeds(calls))
