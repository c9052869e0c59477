"""The buffered cache of attention through onnxruntime: written in place, or grown."""

from __future__ import annotations

import native_library as native
import numpy as np
import pytest
from operator_calls import arguments, feeds, model_of

from mqc.ops.onnx_functions import attach_functions

pytestmark = native.needs_library


@pytest.mark.parametrize("op_type", ["Attention_half", "AttentionInt8_half"])
def test_cache_is_written_in_place(op_type: str, rng: np.random.Generator) -> None:
    """One buffer bound to input and output: the new rows are written, the others stay."""
    calls = {op_type: arguments(op_type, rng)}
    names = [name for name in calls[op_type] if name.startswith(("key_", "value_"))]
    model, given = model_of(calls), feeds(calls)
    made = native.session(model.SerializeToString(), native=True)
    wanted = made.run(None, given)
    binding = made.io_binding()
    caches = {}
    for name, value in given.items():
        caches[name] = native.ort.OrtValue.ortvalue_from_numpy(value.copy())
        binding.bind_ortvalue_input(name, caches[name])
    binding.bind_output(f"{op_type}:out", "cpu")
    for name in names:
        binding.bind_ortvalue_output(f"{op_type}:new_{name}", caches[f"{op_type}.{name}"])
    made.run_with_iobinding(binding)
    out = binding.get_outputs()[0].numpy()
    got = [out, *(caches[f"{op_type}.{name}"].numpy() for name in names)]
    for left, right in zip(got, wanted, strict=True):
        assert np.array_equal(left, right)
    assert not np.array_equal(got[1], given[f"{op_type}.key_cache"])


@pytest.mark.parametrize("op_type", ["Attention", "AttentionInt8"])
@pytest.mark.parametrize("spare", [0, 5])
def test_cache_grows(spare: int, op_type: str, rng: np.random.Generator) -> None:
    """Where the cache has no rows left the result has past + S; its old rows are kept."""
    values = arguments(op_type, rng)
    for name in values:
        if name.startswith(("key_", "value_")):
            values[name] = np.ascontiguousarray(values[name][:, :, : 4 + spare])
    calls = {op_type: values}
    model = model_of(calls)
    got = native.session(model.SerializeToString(), native=True).run(None, feeds(calls))
    attach_functions(model)
    wanted = native.session(model.SerializeToString(), native=False).run(None, feeds(calls))
    for left, right in zip(got, wanted, strict=True):
        assert native.relative(left, right) <= 2e-6
