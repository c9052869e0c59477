"""Importing the operators must not import what only ONNX export needs."""

import subprocess
import sys


def test_operators_import_no_onnx() -> None:
    code = (
        "import sys, mqc.ops, mqc.numerics; "
        "heavy = {'onnx', 'onnxscript', 'onnxruntime', 'transformers'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_errors_and_package_import_no_torch() -> None:
    code = "import sys, mqc, mqc.errors; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
