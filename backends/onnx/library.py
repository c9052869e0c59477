"""Where the native library of ``ai.mqc`` operators is, if there is one.

Every ``ai.mqc`` operator in a file has a body in standard operators, so no library is needed. A
custom-op library for onnxruntime (a shared object that exports ``RegisterCustomOps``) makes them
faster: its kernels take precedence over the bodies. Kernels are found by operator type, e.g.
``LinearW4A8_mask_bias``; :func:`mqc.ops.onnx_functions.variant_inputs` names the inputs of each.
"""

from __future__ import annotations

import os
from pathlib import Path

from mqc.errors import TargetError

VARIABLE = "MQC_ONNX_OPS"


def ops_library() -> Path | None:
    """The library named by the environment variable ``MQC_ONNX_OPS``, or None.

    Raises:
        TargetError: the variable names a file that does not exist.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    path = Path(name)
    if not path.is_file():
        raise TargetError(
            f"the operator library {path} named by {VARIABLE} does not exist",
            hint=f"unset {VARIABLE} to run without a library, or correct it",
        )
    return path
