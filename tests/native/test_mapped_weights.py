"""Weights in the kernels' layout stay in the file that onnxruntime maps."""

from __future__ import annotations

from pathlib import Path

import native_library as native
import numpy as np
import onnx
import pytest
import torch
from operator_calls import arguments, feeds, model_of

from mqc.numerics.packing import pack_c16k4
from mqc.ops.onnx_functions import variant_inputs

pytestmark = native.needs_library


def resident(kind: str) -> int:
    """MB of memory of this process: "RssAnon", or the pages of the mapped files of that name."""
    if kind.startswith("Rss"):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(kind)).split()[1]) // 1024
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            inside = line.endswith(kind)
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total // 1024


@pytest.mark.parametrize("op_type", ["LinearW4A8_c16k4", "LinearW8A8_c16k4", "LinearW4A16_c16k4"])
def test_weights_are_read_from_the_mapped_file(
    op_type: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """No copy of 24 MB is made, neither when the session is made nor when it runs."""
    if not Path("/proc/self/smaps").is_file():
        pytest.skip("needs /proc")
    bits, (n, k) = (4, (6144, 8192)) if "W4" in op_type else (8, (3072, 8192))
    weight = torch.from_numpy(rng.integers(-8, 8, (n, k), dtype=np.int8))
    x = rng.integers(0, 256, (1, 1, k), dtype=np.uint8)
    every = {
        "xq": x,
        "x": x.astype(np.float32) - 128,
        "qweight": pack_c16k4(weight, 1, bits).numpy(),
        "w_scale": np.ones(n, np.float32),
        "x_scale": np.ones(1, np.float32),
    }
    values = {name: every[name] for name in variant_inputs(op_type)}
    model, path, name = model_of({op_type: values}), tmp_path / "m.onnx", f"{op_type}.data"
    onnx.save_model(model, path, save_as_external_data=True, location=name)
    given = feeds({op_type: values})
    want = every["x"][0] @ weight.numpy().astype(np.float32).T  # sums below 2^24
    del values["qweight"], every, weight, model
    small = arguments(op_type, rng)  # the first session also registers the operator
    native.session(model_of({op_type: small}).SerializeToString(), native=True)
    before = resident("RssAnon")
    made = native.session(str(path), native=True)
    got = made.run(None, given)[0]
    assert np.array_equal(got[0], want)
    assert resident("RssAnon") - before < 16
    assert resident(name) >= 24
